"""What :mod:`test_engine` runs in processes of its own: the engine of GPUs on tensors of the CPU.

Its kernels are interpreted, or only counted. Products are torch's own on the CPU, where TF32 is no
precision of them; those that are fused with a step lose the digits that TF32 drops.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from timm.layers import GELUTanh, QuickGELU, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from smi_fast import SparseViT
from smi_fast.engine import gpu_run
from smi_fast.engine.folding import FoldedBlock
from smi_fast.engine.gpu import GpuEngine
from smi_fast.engine.gpu_steps import BACKEND
from smi_fast.engine.loss import cross_entropy
from smi_fast.engine.precision import products_in
from smi_fast.ops.constants import constant
from smi_fast.verify.budget import errors
from smi_fast.verify.cases import random_kept
from tests.backends.triton import runs
from tests.helpers.engine_steps import in_float64, run_by_steps
from tests.helpers.host_guard import HostGuard
from tests.helpers.inversions import make
from tests.helpers.launches import Launches
from tests.helpers.teachers import (
    EVA,
    make_teacher,
    random_images,
    relative_error,
    tiny_vit,
    with_gradient,
)

BF16 = torch.bfloat16
# Width of tokens and number of heads.
SIZES = ((192, 3), (96, 2), (200, 5))
# Norms and activations other than LayerNorm and exact GELU, SwiGLU, and norms inside of a block.
KINDS: dict[str, dict[str, Any]] = {
    "tanh": {"act_layer": GELUTanh},
    "quick": {"act_layer": QuickGELU, "norm_layer": RmsNorm},
    "inner": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "all": {
        "mlp_layer": SwiGLU,
        "act_layer": nn.SiLU,
        "norm_layer": RmsNorm,
        "scale_attn_norm": True,
        "scale_mlp_norm": True,
    },
}
# Images, tokens, and rows of the last block.
ROWS = ((2, 7, 1), (1, 1, 1), (3, 70, 2), (2, 5, 5), (3, 9, 1))
SHAPES = ((2, 7), (1, 17), (3, 1), (2, 0), (0, 5))


@cache
def _interpret() -> None:
    from tests.backends.triton import guard

    guard.install()
    torch.set_num_threads(1)
    from smi_fast import kernels

    runs._set_up(functions=kernels)


def _blocks(width: int, heads: int, depth: int = 3, **kinds: Any) -> nn.Sequential:
    """Frozen blocks whose every parameter is random; each norm has an eps of its own."""
    torch.manual_seed(width)
    blocks = nn.Sequential(
        *(Block(width, heads, qkv_bias=True, init_values=0.3, **kinds) for _ in range(depth))
    )
    with torch.no_grad():
        for parameter in blocks.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.05 * noise if parameter.dim() > 1 else 1 + 0.2 * noise)
    for index, block in enumerate(blocks):
        block.norm1.eps, block.norm2.eps = 0.1 + index, 0.5 + index
    return blocks.requires_grad_(False).eval()


def _tokens(batch: int, count: int, width: int) -> Tensor:
    return torch.randn(batch, count, width, requires_grad=True)


def _gradient(y: Tensor, x: Tensor, **options: bool) -> Tensor:
    return torch.autograd.grad(y.sin().sum(), x, **options)[0]


def _errors_of(y: Tensor, x: Tensor, plain: Tensor, z: Tensor) -> list[float]:
    return [relative_error(y, plain), relative_error(_gradient(y, x), _gradient(plain, z))]


def whole_blocks(precision: str, width: int, heads: int, kind: str | None = None) -> float:
    """The greatest error of tokens after blocks, and of their gradient, against float64."""
    _interpret()
    blocks, worst = _blocks(width, heads, **({} if kind is None else KINDS[kind])), 0.0
    engine, exact = GpuEngine(blocks, precision), copy.deepcopy(blocks).double()
    for batch, count in SHAPES:
        x = _tokens(batch, count, width)
        y = engine.run(x, 0, 3)
        assert y.shape == x.shape and y.dtype == torch.float32
        if x.numel():
            z = x.detach().double().requires_grad_()
            worst = max(worst, *_errors_of(y, x, exact(z), z))
    x = _tokens(7, 2, width).transpose(0, 1)
    assert relative_error(engine.run(x, 1, 3), blocks[1:](x)) < 0.02
    return worst


def first_rows(precision: str, width: int, heads: int, kind: str | None = None) -> float:
    """The same of the first rows after the last block, or the last two, and maybe a norm; and of
    their probabilities.
    """
    _interpret()
    blocks, worst = _blocks(width, heads, **({} if kind is None else KINDS[kind])), 0.0
    engine, exact = GpuEngine(blocks, precision), copy.deepcopy(blocks).double()
    norm = type(blocks[0].norm1)(width, eps=0.2).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.normal_(1, 0.2)
    exact_norm = copy.deepcopy(norm).double()
    for (batch, count, rows), start in zip(ROWS, (2, 1, 0, 1, 2), strict=True):
        x, behind = _tokens(batch, count, width), None if start == 0 else norm
        z = x.detach().double().requires_grad_()
        y, probabilities = engine.run_to_rows(x, start, rows, behind)
        assert y.dtype == probabilities.dtype == torch.float32
        assert not probabilities.requires_grad
        before, last = exact[start:-1](z), exact[-1]
        result = last(before)[:, :rows]
        worst = max(worst, *_errors_of(y, x, result if behind is None else exact_norm(result), z))
        qkv = last.attn.qkv(last.norm1(before)).unflatten(2, (3, heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        shares = (q[:, :, :rows] @ k.mT * last.attn.scale).softmax(dim=-1)
        worst = max(worst, relative_error(probabilities, shares))
    return worst


class _Doubling(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def other_norm() -> float:
    """The error of rows behind a norm with a forward of its own, and of their gradient."""
    _interpret()
    blocks, norm = _blocks(96, 2), _Doubling(96).requires_grad_(False)
    x, exact = _tokens(2, 5, 96), copy.deepcopy(nn.Sequential(*blocks, norm)).double()
    z = x.detach().double().requires_grad_()
    rows, _ = GpuEngine(blocks).run_to_rows(x, 0, 1, norm)
    return max(_errors_of(rows, x, exact(z)[:, :1], z))


def in_bfloat16(part: str | None = None) -> list[tuple[float, float]]:
    """Errors of what blocks add in bfloat16, and their budgets, against float64 of the rounded
    weights; with one percent more in one of the first block's matrices, if a part is named.
    """
    _interpret()
    found = []
    for width, heads in SIZES if part is None else SIZES[:1]:
        blocks = _blocks(width, heads, depth=3 if part is None else 1)
        if part in ("qkv", "proj"):  # random attention is close to uniform, its output small
            for layer in (blocks[0].attn.qkv, blocks[0].attn.proj):
                layer.weight.mul_(2)
        folded = [FoldedBlock.of(block).stored_as(BF16) for block in blocks]
        folded = [replace(block, q_bias=block.q_bias.to(BF16).float()) for block in folded]
        engine = GpuEngine(blocks, "bfloat16")
        tokens, grad = torch.randn(2, 2, 47, width)
        engine.run(tokens, 0, len(blocks))
        if part is not None:
            getattr(engine._runs[0, len(blocks), False].blocks[0], part).mul_(1.01)
        leaf = tokens.clone().requires_grad_()
        result = engine.run(leaf, 0, len(blocks))
        ours = result.detach(), torch.autograd.grad(result, leaf, grad)[0]
        eager = run_by_steps(folded, tokens, grad)
        exact = run_by_steps([in_float64(b) for b in folded], tokens.double(), grad.double())
        for start, *results in zip((tokens, grad), ours, eager, exact, strict=True):
            found += [(e.value, e.budget) for e in errors(*(r - start for r in results))]
    return found


class _Settings(TorchDispatchMode):
    """What torch's settings say of products while products run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, bool]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "mm" in str(func):
            settings = torch.backends.cuda.matmul
            reduces = settings.allow_bf16_reduced_precision_reduction
            self.seen.add((settings.fp32_precision, reduces))
        return func(*args, **(kwargs or {}))


def settings_of_products(precision: str) -> list[tuple[str, bool]]:
    """The settings that products see, whatever the process has set before; that is restored."""
    _interpret()
    engine, x = GpuEngine(_blocks(96, 2), precision), _tokens(1, 3, 96)
    settings, seen = torch.backends.cuda.matmul, _Settings()
    for allowed in (True, False):
        settings.allow_tf32 = allowed
        settings.allow_bf16_reduced_precision_reduction = allowed or (False, False)
        before = settings.fp32_precision
        with pytest.raises(KeyError), products_in(precision):
            raise KeyError
        with seen:
            y, _ = engine.last_block_rows(engine.run(x, 0, 2), 1)
            _gradient(y, x)
        assert settings.fp32_precision == before and settings.allow_tf32 == allowed
        assert settings.allow_bf16_reduced_precision_reduction == allowed
        assert settings.allow_bf16_reduced_precision_reduction_split_k == allowed
    return sorted(seen.seen)


def memory() -> None:
    """Buffers are planned once, and are those of one pass as long as its graph lives."""
    _interpret()
    engine = GpuEngine(_blocks(96, 2), "bfloat16")

    def addresses() -> list[int]:
        buffers = engine._runs[0, 3, False].free
        assert buffers is not None
        return [saved.qkv.data_ptr() for saved in buffers.saved]

    a, b = _tokens(2, 7, 96), _tokens(2, 7, 96)
    expected = [_gradient(engine.run(x, 0, 3), x) for x in (a, b)]
    first = addresses()
    assert len(set(first)) == 3
    of_a, of_b = engine.run(a, 0, 3), engine.run(b, 0, 3)
    assert torch.equal(_gradient(of_a, a, retain_graph=True), expected[0])
    assert torch.equal(_gradient(of_b, b), expected[1])
    assert torch.equal(_gradient(of_a, a), expected[0])
    with pytest.raises(RuntimeError, match="a second time"):
        of_a.backward(torch.ones_like(of_a))
    del of_a, of_b
    of_a, of_b = (engine.run_to_rows(x, 1, 1, None)[0] for x in (a, b))
    of_rows = _gradient(of_a, a)
    assert not torch.equal(_gradient(of_b, b), of_rows)
    assert torch.equal(_gradient(engine.run_to_rows(a, 1, 1, None)[0], a), of_rows)
    with pytest.raises(RuntimeError, match="a second time"):
        of_a.backward(torch.ones_like(of_a))
    with torch.inference_mode():
        expected_rows = engine.last_block_rows(engine.run(a, 0, 3), 1)
    kept = addresses()
    assert len(set(kept)) == 1, "without a gradient nothing is kept for backward"
    with torch.no_grad():
        rows = engine.last_block_rows(engine.run(a, 0, 3), 1)
    assert all(map(torch.equal, rows, expected_rows)) and addresses() == kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_run, "_is_captured", lambda device: True)
        captured = engine.run(a, 0, 3)
        assert torch.equal(_gradient(captured, a), expected[0])
    del captured
    assert engine._runs[0, 3, False].free is None, "buffers of a graph are its own"
    assert torch.equal(_gradient(engine.run(a, 0, 3), a), expected[0])


def followed_weights() -> None:
    """Changed weights are noticed, and copies of a teacher have their own."""
    _interpret()
    teacher = tiny_vit()
    options = {"backend": BACKEND, "precision": "tf32"}
    ours, images = SparseViT(teacher, **options), random_images(teacher)
    before, _ = with_gradient(ours, images)
    with torch.no_grad():
        teacher.blocks[0].mlp.fc1.weight.mul_(1.5)
    after, gradient = with_gradient(ours, images)
    assert relative_error(before, after) > 1e-3
    expected, expected_gradient = with_gradient(SparseViT(teacher, backend="reference"), images)
    assert relative_error(after, expected) < 0.01
    assert relative_error(gradient, expected_gradient) < 0.01
    assert torch.equal(with_gradient(copy.deepcopy(ours), images)[0], after)


def teacher(name: str, narrow: dict[int, float] | None) -> list[float]:
    """Errors of the logits, the gradient and the importance that a teacher has on kept patches."""
    _interpret()
    torch.manual_seed(0)
    patch14 = name in EVA or name.startswith("aimv2")
    vit = make_teacher(name, **({} if patch14 else {"img_size": 64, "depth": 3}))
    options = {"narrow": narrow, "probe": narrow is None}
    ours, plain = (SparseViT(vit, backend=each, **options) for each in (BACKEND, "reference"))
    assert ours._blocks.engine_for(ours.device, ours.dtype).backend == BACKEND
    images, kept = random_images(vit), random_kept(2, 7, ours.num_patches)
    found = [
        (*with_gradient(model, images, kept), model(images, kept, importance=True).importance)
        for model in (ours, plain)
    ]
    return [relative_error(*pair) for pair in zip(*found, strict=True)]


def images() -> dict[str, float]:
    """Mean errors of images after three iterations in bfloat16, and how far they are apart."""
    _interpret()
    torch.manual_seed(1)
    teacher, init = tiny_vit(), torch.randn(2, 3, 32, 48)

    def run(model: VisionTransformer, backend: str, precision: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        inverter = make(
            model,
            iterations=3,
            schedule=runs.StopSchedule((2,), (0.5,)),
            backend=backend,
            precision=precision,
        )
        options = {"init": init.to(next(model.parameters()).dtype), "progress": False}
        result = inverter.invert([1, 4], generator=generator, **options)
        assert result.precision == ("float64" if precision == "float32" else precision)
        return result.images.double()

    exact = run(copy.deepcopy(teacher).double(), "reference", "float32")
    ours, cpu = (run(teacher, backend, "bfloat16") for backend in (BACKEND, "cpp"))
    tf32 = run(teacher, BACKEND, "tf32")
    pairs = {
        "ours": (ours, exact),
        "cpu": (cpu, exact),
        "apart": (ours, cpu),
        "tf32": (tf32, exact),
    }
    return {name: float((a - b).abs().mean()) for name, (a, b) in pairs.items()}


def kernels_of_blocks(
    precision: str, kind: str | None = None, rotary: bool = False
) -> Iterator[Counter[str]]:
    """The kernels of two blocks, of three, and of the first row of one and the norm behind it,
    forward and backward.
    """
    from triton.runtime.jit import JITFunction

    from smi_fast import kernels

    counter = Launches()

    def count(kernel: Any, grid: Any) -> Any:
        return lambda *_, **__: counter.kernels.update([kernel.fn.__name__])

    JITFunction.__getitem__ = count
    runs._set_up(functions=kernels)
    engine = GpuEngine(_blocks(192, 3, **({} if kind is None else KINDS[kind])), precision)
    x, norm = _tokens(2, 47, 192), nn.LayerNorm(192).requires_grad_(False)
    rotations = [torch.rand(2, 46, 1, 128)] * 3 if rotary else None
    found = []
    for run in (
        lambda: engine.run(x, 0, 2, rotations),
        lambda: engine.run(x, 0, 3, rotations),
        lambda: engine.run_to_rows(x, 2, 1, norm, rotations)[0],
        lambda: engine.run_to_rows(x, 1, 1, norm, rotations)[0],
    ):
        run()  # folds
        counter.kernels.clear()
        with HostGuard(), counter:
            y = run()
            torch.autograd.grad(y, x, torch.ones_like(y))
        counter.kernels.pop("aten.ones_like.default")
        found.append(Counter(counter.kernels))
    return found


def loss() -> list[float]:
    """Errors of cross-entropy and of its gradient, with weights, of classes and probabilities."""
    _interpret()
    found, classes = [], torch.tensor([3, 0, 11, 3])
    for targets in (classes, torch.rand(4, 12)):
        for weight in (1.0, 0.3):
            x = torch.randn(4, 12, requires_grad=True)
            z = x.detach().double().requires_grad_()
            exact = F.cross_entropy(z, targets if targets is classes else targets.double())
            value = cross_entropy(x, targets)
            grads = constant(weight, x), constant(weight, z)
            ours, theirs = (
                torch.autograd.grad(*pair)
                for pair in zip((value, exact), (x, z), grads, strict=True)
            )
            found += [relative_error(value, exact), relative_error(ours[0], theirs[0])]
    return found
