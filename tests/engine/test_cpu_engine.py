"""The engine of the CPU: the plain blocks' results, from memory that is planned and reused."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import smi_fast.engine.cpu
from smi_fast import SparseInverter, SparseViT, StopSchedule
from smi_fast.engine.cpu import CpuEngine, FoldedRun, LastBlock
from tests.helpers.inversions import PUBLISHED
from tests.helpers.kernels import needs_cpp
from tests.helpers.teachers import make_teacher, random_images, relative_error, with_gradient

pytestmark = needs_cpp


@pytest.fixture
def teacher() -> VisionTransformer:
    return make_teacher("vit_tiny_patch16_224", img_size=64, depth=4, init_values=0.3)


@pytest.fixture
def engine(teacher: VisionTransformer) -> FoldedRun:
    return FoldedRun(teacher.requires_grad_(False).blocks[:3])


def by_onednn(dtype: torch.dtype) -> bool:
    found: bool = torch.ops.smi_fast.products_by_onednn(torch.empty(0, dtype=dtype))
    return found


def tokens(batch: int = 2, count: int = 7) -> Tensor:
    return torch.randn(batch, count, 192, requires_grad=True)


def plain(teacher: VisionTransformer, x: Tensor) -> Tensor:
    for block in teacher.blocks[:3]:
        x = block(x)
    return x


def gradients(y: Tensor, x: Tensor, **options: bool) -> Tensor:
    return torch.autograd.grad(y.sin().sum(), x, **options)[0]


def check(
    engine: FoldedRun, teacher: VisionTransformer, x: Tensor, tolerance: float = 1e-5
) -> None:
    ours, theirs = engine(x), plain(teacher, x)
    assert relative_error(ours, theirs) < tolerance
    assert relative_error(gradients(ours, x), gradients(theirs, x)) < tolerance


def test_equals_the_blocks(engine: FoldedRun, teacher: VisionTransformer) -> None:
    for x in (tokens(), tokens(), tokens(1, 17), tokens(3, 1)):
        check(engine, teacher, x)
    check(engine, teacher, tokens().transpose(0, 1))
    check(FoldedRun(teacher.double().blocks[:3]), teacher, tokens().double(), 1e-13)


@pytest.mark.parametrize(("batch", "count", "rows"), [(2, 7, 1), (1, 1, 1), (3, 17, 2), (2, 5, 5)])
def test_first_rows_are_those_of_the_block(
    teacher: VisionTransformer, batch: int, count: int, rows: int
) -> None:
    """And no other is computed after attention."""
    block = teacher.requires_grad_(False).blocks[-1]
    x = tokens(batch, count)
    first, probabilities = LastBlock(block, rows)(x)
    plain = block(x)[:, :rows]
    assert relative_error(first, plain) < 1e-5
    assert first.grad_fn.saved_tensors[-1].shape == (batch * rows, block.mlp.fc1.out_features)
    assert relative_error(gradients(first, x), gradients(plain, x)) < 1e-5
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    assert relative_error(probabilities, (q[:, :, :rows] @ k.mT / 8).softmax(dim=-1)) < 1e-5
    assert not probabilities.requires_grad
    doubled = copy.deepcopy(block).double()
    exact, _ = LastBlock(doubled, rows)(x.double())
    assert relative_error(exact, doubled(x.double())[:, :rows]) < 1e-13


def test_every_norm_has_its_own_eps(teacher: VisionTransformer) -> None:
    for index, block in enumerate(teacher.blocks):
        block.norm1.eps, block.norm2.eps = 0.1 + index, 0.5 + index
    check(FoldedRun(teacher.requires_grad_(False).blocks[:3]), teacher, tokens())


@pytest.mark.parametrize("norms", [("attn",), ("mlp",), ("attn", "mlp")])
def test_every_inner_norm_has_its_own_eps(teacher: VisionTransformer, norms: tuple) -> None:
    """Those in front of the projection of attention, and of the second layer of the MLP."""
    teacher.double().requires_grad_(False)
    for index, block in enumerate(teacher.blocks):
        for name in norms:
            module = getattr(block, name)
            width = (module.proj if name == "attn" else module.fc2).in_features
            module.norm = nn.LayerNorm(width, eps=0.2 * (index + len(name)), dtype=torch.float64)
            nn.init.normal_(module.norm.weight), nn.init.normal_(module.norm.bias)
            module.norm.requires_grad_(False)
    x = tokens().double().detach().requires_grad_()
    check(FoldedRun(teacher.blocks[:3]), teacher, x, 1e-12)
    first, expected = LastBlock(teacher.blocks[-1], 2)(x)[0], teacher.blocks[-1](x)[:, :2]
    assert relative_error(first, expected) < 1e-12
    assert relative_error(gradients(first, x), gradients(expected, x)) < 1e-12


def test_large_scores_do_not_overflow(teacher: VisionTransformer) -> None:
    """Float32 has no exponential of numbers above 88."""
    block, x = teacher.requires_grad_(False).blocks[-1], tokens()
    width = block.attn.proj.in_features
    with torch.no_grad():
        block.attn.qkv.weight[: 2 * width] *= 10
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    assert (q[:, :, :1] @ k.mT / 8).max() > 100
    first, _ = LastBlock(block, 1)(x)
    assert relative_error(first, block(x)[:, :1]) < 1e-4


def test_passes_may_read_other_numbers_of_rows(teacher: VisionTransformer) -> None:
    blocks, x = teacher.requires_grad_(False).blocks, tokens()
    engine = CpuEngine(blocks)
    for rows in (1, 3, 1):
        first, _ = engine.last_block_rows(x, rows)
        assert relative_error(first, blocks[-1](x)[:, :rows]) < 1e-5


def test_nothing_to_compute(engine: FoldedRun) -> None:
    for x in (tokens(2, 0), tokens(0, 5)):
        assert engine(x).shape == gradients(engine(x), x).shape == x.shape


@pytest.mark.skipif(
    not torch.backends.mkl.is_available() and not by_onednn(torch.float32),
    reason="only MKL and oneDNN pack",
)
def test_packed_products_are_the_same(
    engine: FoldedRun, teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start when a shape has come often; MKL's end with another one."""
    packed_product = "mkldnn::packed" if by_onednn(torch.float32) else "mkl::packed"

    def products() -> int:
        with torch.autograd.profiler.profile() as profile:
            engine(tokens(2, 7))
        return sum(event.name == packed_product for event in profile.function_events)

    monkeypatch.setattr(smi_fast.engine.cpu, "_PASSES_UNPACKED", 2)

    def is_packed() -> bool:
        return bool(engine.packed)

    assert products() == 0
    by_shape = (
        (7, True),
        (9, False),
        (7, False),
        (7, True),
        (7, True),
        (9, False),
        (9, True),
        (7, False),
    )
    any_shape = ((7, True), (9, True), (7, True))
    for count, packed in any_shape if by_onednn(torch.float32) else by_shape:
        check(engine, teacher, tokens(2, count))
        assert is_packed() == packed
    check(engine, teacher, tokens(2, 7))
    assert products() == 12, "four of each block"
    x, other = tokens(2, 7), tokens(1, 9)
    of_x, of_other = engine(x), engine(other)
    assert relative_error(gradients(of_x, x), gradients(plain(teacher, x), x)) < 1e-5
    for _ in range(2):
        check(engine, teacher, tokens(40, 17))
        assert is_packed() == by_onednn(torch.float32), "many rows hide the packing"
    assert relative_error(of_other, plain(teacher, other)) < 1e-5


def test_memory_is_planned_once(engine: FoldedRun) -> None:
    def addresses() -> list[int]:
        assert engine.free is not None
        return [to_attention.data_ptr() for to_attention in engine.free.normalized[::4]]

    x = tokens()
    gradients(engine(x), x)
    first = addresses()
    gradients(engine(x), x)
    assert addresses() == first and len(set(first)) == 3
    with torch.no_grad():
        engine(x)
    assert len(set(addresses())) == 1, "without a gradient nothing is kept for backward"


def test_fewer_rows_take_the_memory_of_more(engine: FoldedRun) -> None:
    x = tokens()
    fewer = x[:1, :-2].detach().clone().requires_grad_()
    alone = gradients(engine(fewer), fewer)
    gradients(engine(x), x)
    assert engine.free is not None
    first = engine.free.normalized[0].data_ptr()
    torch.testing.assert_close(gradients(engine(fewer), fewer), alone, rtol=1e-6, atol=1e-7)
    assert engine.free.normalized[0].data_ptr() == first
    assert engine.free.attended.shape[:2] == fewer.shape[:2]


def test_passes_may_overlap(engine: FoldedRun) -> None:
    """Backward of one pass after another one's forward, and twice through one pass."""
    a, b = tokens(), tokens()
    expected = [gradients(engine(x), x) for x in (a, b)]
    of_a, of_b = engine(a), engine(b)
    got = [gradients(of_a, a, retain_graph=True), gradients(of_b, b)]
    again = gradients(of_a, a)
    for ours, theirs in zip([*got, again], [*expected, expected[0]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_engine_follows_its_teacher(teacher: VisionTransformer) -> None:
    """The owner of the weights may change them, or their data type."""
    ours, plain = (SparseViT(teacher, backend=name) for name in ("cpp", "reference"))
    images = random_images(teacher)
    before, _ = with_gradient(ours, images)
    with torch.no_grad():
        teacher.blocks[0].mlp.fc1.weight.mul_(1.5)
    after, gradient = with_gradient(ours, images)
    assert relative_error(before, after) > 1e-3
    expected, expected_gradient = with_gradient(plain, images)
    assert relative_error(after, expected) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-4
    exact, _ = with_gradient(ours.double(), images.double())
    assert exact.dtype == torch.float64 and relative_error(exact, expected) < 1e-5


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch32_224"])
def test_twenty_iterations_give_the_images_of_the_reference(name: str) -> None:
    """The images agree to 1e-3, or as float32 agrees with float64: signs steer Adam at first."""
    teacher, init = make_teacher(name), torch.randn(2, 3, 224, 224)
    stops = StopSchedule((5, 10), (0.5, 0.5))

    def images(backend: str, dtype: torch.dtype) -> Tensor:
        options = {"schedule": stops, "iterations": 20, "backend": backend, **PUBLISHED}
        inverter = SparseInverter(copy.deepcopy(teacher).to(dtype), **options)
        generator = torch.Generator().manual_seed(0)
        result = inverter.invert([1, 4], init=init, generator=generator, progress=False)
        return result.images.double()

    ours, plain = images("cpp", torch.float32), images("reference", torch.float32)
    exact = images("reference", torch.float64)
    close = (ours - plain).abs().max() < 1e-3
    assert close or (ours - exact).abs().mean() < 3 * (plain - exact).abs().mean()
    assert (ours - exact).abs().mean() < 1e-3
