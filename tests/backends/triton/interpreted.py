"""What :mod:`test_execution` runs in a process of its own: kernels on the guarded interpreter.

triton is imported inside of functions, because the process of the tests imports this module too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smi_fast.engine import reference as engine_reference
from smi_fast.engine.precision import products_in
from smi_fast.ops import reference
from smi_fast.verify.budget import errors
from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.cases import OpCall, WrongResult, random_kept
from smi_fast.verify.gpu_engine_grid import gpu_engine_calls
from tests.backends.planted import Factor, ScaledResults

PLANTED = "smi_fast.kernels.planted"


@cache
def _kernels() -> ModuleType:
    from tests.backends.triton import guard

    guard.install()
    torch.set_num_threads(1)
    from smi_fast import kernels

    return kernels


@cache
def _calls() -> dict[str, OpCall]:
    return {str(call): call for call in (*op_calls(), *gpu_engine_calls())}


class PoisonedOutputs(TorchFunctionMode):
    """Fills new tensors with NaN, which shows any element that a kernel leaves out."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (Tensor.new_empty, torch.empty_like):
            result.fill_(torch.nan if result.is_floating_point() else -1)
        return result


class Poisoned:
    """The functions of a module of kernels, run on poisoned outputs."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with PoisonedOutputs():
                return getattr(self.module, op)(*arguments)

        return run


def check(call: str, dtype: torch.dtype) -> None:
    """Holds a call of the grid to the error budget.

    PyTorch's own kernels take the sets of tokens that one program can't hold. Their rounding in
    float32 isn't ours to judge, so what we pass to them is checked in float64.
    """
    chosen, functions = _calls()[call], Poisoned(_kernels())
    if dtype == torch.float32 and _is_too_large(chosen):
        sdpa = sys.modules["smi_fast.kernels._sdpa"]
        functions = SimpleNamespace(
            gather_attention=sdpa.attention, gather_attention_backward=sdpa.attention_backward
        )
        dtype = torch.float64
    chosen.check(functions, dtype)


def _is_too_large(call: OpCall) -> bool:
    size = call.size
    if size is None:
        return False
    qkv, index = call.arguments[size.gradient : size.gradient + 2]
    attention = sys.modules["smi_fast.kernels.gather_attention"]
    return not attention.fits(qkv, index, backward=size.gradient)


def with_factor(call: str, dtype: torch.dtype, part: str, factor: float) -> str | None:
    """Runs a call with a factor on "q", "k", "v" or the "result"; returns the error it raises."""
    kernels = _kernels()
    wrong = ScaledResults(kernels, factor) if part == "result" else Factor(kernels, part, factor)
    try:
        _calls()[call].check(wrong, dtype)
    except WrongResult as error:
        return str(error)
    return None


def attend_rows_in_bfloat16(call: str) -> None:
    """Attention of a few rows that reads bfloat16, against float64 of the rounded numbers."""
    chosen = _calls()[call]
    rounded = [
        value if index == chosen.op.count("backward") + 1 or index == 4 else value.bfloat16()
        for index, value in enumerate(chosen.arguments)
    ]
    run = getattr(engine_reference, chosen.op)
    ours = getattr(Poisoned(_kernels()), chosen.op)(*rounded)
    eager = run(*(value.float() for value in rounded))
    exact = run(*(value.double() for value in rounded))
    for found, in_float32, result in zip(ours, eager, exact, strict=True):
        for error in errors(found, in_float32.to(found.dtype), result):
            if not error.allowed:
                raise WrongResult(f"{call}: {error}")


def products_by_precision() -> dict[str, float]:
    """The largest error of products with a step, as a share of the largest number."""
    (call,) = (c for c in gpu_engine_calls() if str(c) == "linear_gelu_-94x192x768")
    (exact, _) = call.converted(torch.float64).run(engine_reference)
    found = {}
    for precision in ("float32", "tf32"):
        with products_in(precision):
            ours, _ = call.run(_kernels())
        found[precision] = float((ours - exact).abs().max() / exact.abs().max())
    return found


def overflow() -> None:
    """A variance that overflows gives NaN, and no number that looks like a result."""
    x, normalized, rstd = 1e20 * torch.randn(3, 40), torch.empty(3, 40), torch.empty(3)
    x[1] = torch.randn(40)
    _kernels().add_normalize_(x, None, None, 1e-6, normalized, rstd)
    assert normalized[[0, 2]].isnan().all() and rstd[[0, 2]].isnan().all()
    assert normalized[1].isfinite().all()


def sums_of_float16() -> None:
    """The number of differences of one image, and their sum, exceed the largest float16."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224).half()
    exact = reference.total_variation(images.double(), None, 1)
    sums = _kernels().total_variation(images, None, 1)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)


def deterministic() -> None:
    """Two runs give the same bytes."""
    torch.manual_seed(0)
    x, channel = torch.randn(2, 3, 40, 40), [torch.rand(3) for _ in range(4)]
    qkv = torch.randn(1, 20, 3, 2, 32)
    runs = [
        [
            *_kernels().batch_norm_matching(x, *channel, 1e-5),
            _kernels().total_variation(x, None, 1),
            *_kernels().gather_attention(qkv, None, None, True),
        ]
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


def rounding() -> None:
    """The guard rounds to bfloat16 as torch does, and to tf32."""
    _kernels()
    from tests.backends.triton import guard

    values = torch.cat([torch.randn(4096) * 10.0**e for e in range(-30, 30, 5)])
    ties = (torch.arange(0, 2**16, 3, dtype=torch.int32) << 15).view(torch.float32)
    values = torch.cat([values, ties[ties.isfinite()], torch.tensor([torch.inf, -torch.inf])])
    ours = torch.from_numpy(guard.round_to_bfloat16(values.numpy()))
    assert torch.equal(ours, values.bfloat16().float())
    assert guard.drop_tf32(torch.tensor([1 + 2**-11]).numpy())[0] == 1


def planted_fault(file: str, old: str, new: str, calls: tuple[str, ...]) -> str:
    """Runs calls on a kernel file with one piece replaced; returns the first error."""
    kernels = _kernels()
    source = (Path(kernels.__file__).parent / file).read_text()
    assert old in source
    with TemporaryDirectory() as folder:  # a file, because the interpreter reads kernels from there
        path = Path(folder) / file
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(PLANTED, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PLANTED] = module
        spec.loader.exec_module(module)
        try:
            for call in calls:
                _calls()[call].check(Poisoned(module), torch.float32)
        except Exception as error:
            cause = error.__cause__ or error
            return f"{type(cause).__name__}: {cause}"
    return "nothing"


def out_of_bounds_index() -> str:
    """Attends to a token that doesn't exist; returns the error."""
    qkv, index = torch.randn(1, 20, 3, 2, 32), torch.tensor([[0, 5, 20]])
    try:
        _kernels().gather_attention(qkv, index, None, False)
    except Exception as error:
        return f"{type(error.__cause__).__name__}: {error.__cause__}"
    return "nothing"


def traffic(op: str) -> tuple[int, int]:
    """Bytes that an op moves, and its floor: each input read once, each output written once."""
    torch.manual_seed(0)
    kernels = _kernels()
    from tests.backends.triton import guard

    x, kept, size = torch.randn(1, 3, 224, 224), random_kept(1, 46, 196), 16
    jitter = (torch.tensor([[7, -3]]), torch.tensor([True]))
    patches = torch.randn(1, 46, 768)
    half = torch.randn(1, 46, 3, 2, 64).bfloat16()
    one, channel = torch.tensor(1.0), torch.rand(3)
    x32, rows, rstd = torch.randn(3, 64, 384), torch.randn(4, 64, 384).bfloat16(), torch.rand(64)
    elements = rows[0].numel()
    sums, kv, channels = torch.ones(3, 4), half[:, :, 1:].contiguous(), torch.rand(128)
    shares, gated = torch.rand(1, 2, 1, 46), torch.randn(2, 64, 768).bfloat16()
    rotation, biases = torch.rand(1, 45, 1, 128), torch.rand(256)
    turned = 4 * rotation.numel()
    image, patch, qkv = 4 * x.numel(), 4 * patches.numel(), 2 * half.numel()
    cases = {
        "gather_patches": (2 * patch, (x, kept, *jitter, size)),
        "gather_patches_backward": (patch + image, (patches, kept, *jitter, size, 224, 224)),
        "gather_sigmoid_patches": (
            2 * patch,
            (x, kept, *jitter, channel, channel, None, None, size),
        ),
        "gather_sigmoid_patches_backward": (
            2 * patch + image,
            (patches, x, kept, *jitter, channel, None, size),
        ),
        "total_variation": (image // 3, (x[:, :1], None, 1)),
        "total_variation_backward": (2 * image // 3, (one, one, x[:, :1], None, 1, sums)),
        "batch_norm_matching": (2 * image, (x, *[channel] * 4, 1e-5)),
        "batch_norm_matching_backward": (
            3 * image,
            (x.clone(), x, *[channel] * 2, 1e-5, *[channel] * 2),
        ),
        "adam_clamp_": (
            7 * patch,
            (
                *(x.clone() for _ in range(4)),
                *(torch.tensor(1), one.double(), 0.5, 0.9, 0.01),
                *(-channel, channel, kept, size),
            ),
        ),
        "add_normalize_": (
            12 * elements,
            (x32[0], rows[0], x32[1, 0].contiguous(), 1e-6, rows[1], rstd),
        ),
        "normalize_backward_": (14 * elements, (x32[0], rows[0], rows[1], rstd, rows[2])),
        "gelu_": (6 * elements, (rows[0], x32[0, 0], rows[1])),
        "multiply_": (6 * elements, (rows[0], rows[1])),
        "swiglu_": (10 * elements, (gated[0], torch.rand(768), rows[0])),
        "swiglu_backward_": (10 * elements, (rows[0], *gated)),
        "rotate_": (qkv * 4 // 3 + turned, (half.clone(), biases, rotation, True)),
        "rotate_backward_": (qkv * 4 // 3 + turned, (half.clone(), 2, rotation, False)),
        "attend_rows": (2 * half[:, :, 1:].numel(), (half[:, :1, 0].flatten(2), channels, kv)),
        "attend_rows_backward": (
            4 * half[:, :, 1:].numel(),
            *((half[:, :1, 0].flatten(2), half[:, :1, 0].flatten(2), channels, kv, shares),),
        ),
        # Logits are read twice, but the second time from the cache.
        "cross_entropy": (8 * 40_000, (torch.randn(40, 1000), torch.zeros(40, dtype=torch.int64))),
        "gather_attention": (qkv * 4 // 3, (half, None, None, True)),
        "gather_attention_backward": (qkv * 7 // 3, (half[:, :, 0].flatten(2), half, None, None)),
    }
    floor, arguments = cases[op]
    launches = guard.MEMORY.launches
    launches.clear()
    getattr(kernels, op)(*arguments)
    return sum(launch.loaded + launch.stored for launch in launches), floor
