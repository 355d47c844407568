"""What :mod:`test_triton_execution` runs in its own process: kernels on the guarded interpreter.

A kernel may make twice the error, against the reference in float64, that the reference makes in the
data type of the case. triton is imported inside of functions, for the tests' own process imports
this module too.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from tests.conftest import random_kept
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smi_fast.ops import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLANTED = "smi_fast.kernels.planted"


@cache
def _kernels() -> ModuleType:
    import triton_guard

    triton_guard.install()
    torch.set_num_threads(1)
    from smi_fast import kernels

    return kernels


class PoisonedOutputs(TorchFunctionMode):
    """New tensors are full of nan, so that an element which is never written shows."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (Tensor.new_empty, torch.empty_like):
            result.fill_(torch.nan if result.is_floating_point() else -1)
        return result


def _run(op: str, *arguments: Any, kernels: Any = None) -> Any:
    with PoisonedOutputs():
        return getattr(kernels or _kernels(), op)(*arguments)


def _in_float64(argument: Any) -> Any:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _within_budget(results: Any, eager: Any, exact: Any) -> None:
    for index, (ours, theirs, truth) in enumerate(
        zip(*map(_tensors, (results, eager, exact)), strict=True)
    ):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not truth.numel():
            continue
        error, allowed = ((t.double() - truth).abs().max() for t in (ours, theirs))
        # One rounding of the largest value, and the noise of float32 sums, for where the reference
        # happens to be almost exact.
        rounding = torch.finfo(ours.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        allowed = 2 * allowed + rounding * truth.abs().max()
        assert error <= allowed, f"output {index}: error {error:.2e}, allowed {allowed:.2e}"


def _check(op: str, *arguments: Any, kernels: Any = None) -> Any:
    """Runs an op, compares it, and returns the outputs of the reference in its data type."""
    function = getattr(reference, op)
    eager = function(*arguments)
    exact = function(*map(_in_float64, arguments))
    _within_budget(_run(op, *arguments, kernels=kernels), eager, exact)
    return eager


def _strided(*shape: int) -> Tensor:
    """Random values of a shape in an order and with gaps that no kernel may rely on."""
    base = torch.full([2 * n for n in reversed(shape)], torch.nan)
    view = base[tuple(slice(1, None, 2) for _ in shape)].permute(*reversed(range(len(shape))))
    return view.copy_(torch.randn(shape))


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(DTYPES[dtype])  # keeps strides, and turns gaps into other gaps


def gather_patches(
    dtype: str, count: int, size: int, shift: tuple[int, int], flip: bool, strided: bool = False
) -> None:
    torch.manual_seed(0)
    rows, columns = 3, 4
    make = _strided if strided else torch.randn
    images = _cast(make(2, 2, rows * size, columns * size), dtype)
    kept = random_kept(2, count, rows * columns)
    jitter = (torch.tensor(shift), torch.tensor(flip))
    expected = reference.gather_patches(images, kept, *jitter, size)
    got = _run("gather_patches", images, kept, *jitter, size)
    assert all(map(torch.equal, got, expected))
    grad = torch.randn(2, 1, 1).to(images).expand_as(expected[0]) if strided else expected[0]
    back = (grad, kept, *jitter, size, *images.shape[2:])
    got = _run("gather_patches_backward", *back)
    assert torch.equal(got, reference.gather_patches_backward(*back))


def total_variation(
    dtype: str,
    count: int | None,
    shape: tuple[int, int, int, int],
    size: int,
    strided: bool = False,
    kernels: Any = None,
) -> None:
    torch.manual_seed(0)
    images = _cast((_strided if strided else torch.randn)(*shape), dtype)
    patches = (shape[2] // size) * (shape[3] // size)
    kept = None if count is None else random_kept(shape[0], count, patches)
    parts = _check("total_variation", images, kept, size, kernels=kernels)
    grads = torch.rand(2).to(images)
    _check("total_variation_backward", *grads, images, kept, size, parts, kernels=kernels)


def batch_norm_matching(
    dtype: str, shape: tuple[int, int, int, int], strided: bool = False
) -> None:
    torch.manual_seed(0)
    x = _cast((_strided if strided else torch.randn)(*shape) * 3 + 1, dtype)
    channel = [_cast(torch.rand(shape[1]) + 0.5, dtype) for _ in range(6)]
    _check("batch_norm_matching", x, *channel[:4], 1e-5)
    grad = _cast(torch.randn(1), dtype).expand(shape) if strided else torch.randn_like(x)
    _check("batch_norm_matching_backward", grad, x, *channel[1:3], 1e-5, *channel[4:])


def adam_clamp(
    dtype: str,
    count: int | None,
    shape: tuple[int, int, int, int],
    size: int,
    strided: bool = False,
    step: int = 3,
    betas: tuple[float, float] = (0.5, 0.99),
) -> None:
    torch.manual_seed(0)
    make = _strided if strided else torch.randn
    state = [_cast(make(*shape), dtype) for _ in range(3)]
    state.append(state[2].abs())
    patches = (shape[2] // size) * (shape[3] // size)
    kept = None if count is None else random_kept(shape[0], count, patches)
    bounds = [_cast(torch.full([shape[1]], bound), dtype) for bound in (-0.5, 0.75)]
    settings = (torch.tensor(step), 0.25, *betas, *bounds, kept, size)
    eager = [t.clone() for t in state]
    exact = [t.double() for t in state]
    reference.adam_clamp_(*eager, *settings)
    reference.adam_clamp_(*exact, *map(_in_float64, settings))
    _run("adam_clamp_", *state, *settings)
    _within_budget(state, eager, exact)


def gather_attention(
    dtype: str,
    count: int,
    width: int,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    gathered: bool = True,
    strided: bool = False,
    kernels: Any = None,
) -> None:
    torch.manual_seed(0)
    tokens, heads = (count + 3 if gathered else count), 2
    make = _strided if strided else torch.randn
    qkv = _cast(make(batch, tokens, 3, heads, width), dtype)
    kept = random_kept(batch, count, tokens) if gathered else None
    ragged = None if lengths is None else torch.tensor(lengths)
    if ragged is not None and not gathered:
        for image, length in enumerate(lengths or ()):
            qkv[image, length:] = 1e4  # mustn't matter, however large
    out, _ = _check("gather_attention", qkv, kept, ragged, True, kernels=kernels)
    grad = torch.randn(1).to(qkv).expand_as(out) if strided else torch.randn_like(out)
    _check("gather_attention_backward", grad, qkv, kept, ragged, kernels=kernels)


def empty() -> None:
    """No images or no kept patches: the result of the reference, without a launch."""
    for batch, count in ((0, 3), (2, 0)):
        images, kept = torch.randn(batch, 3, 8, 8), torch.zeros(batch, count, dtype=torch.int64)
        jitter = (torch.tensor([0, 0]), torch.tensor(False))
        patches, _ = _check("gather_patches", images, kept, *jitter, 4)
        _check("gather_patches_backward", patches, kept, *jitter, 4, 8, 8)
        qkv = torch.randn(batch, 5, 3, 2, 16)
        out, _ = _check("gather_attention", qkv, kept, None, False)
        _check("gather_attention_backward", out, qkv, kept, None)
        _check("total_variation", images, kept, 4)


def deterministic() -> None:
    """Two runs give the same bytes, whatever lay in the outputs before."""
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
    """The guard's bfloat16 is torch's, and its poison and its tf32 are there."""
    _kernels()
    import triton_guard

    values = torch.cat([torch.randn(4096) * 10.0**e for e in range(-30, 30, 5)])
    ties = (torch.arange(0, 2**16, 3, dtype=torch.int32) << 15).view(torch.float32)
    values = torch.cat([values, ties[ties.isfinite()], torch.tensor([torch.inf, -torch.inf])])
    ours = torch.from_numpy(triton_guard.round_to_bfloat16(values.numpy()))
    assert torch.equal(ours, values.bfloat16().float())
    assert triton_guard.drop_tf32(torch.tensor([1 + 2**-11]).numpy())[0] == 1


def planted_fault(file: str, old: str, new: str, case: str, *arguments: Any) -> str:
    """Runs a case on a kernel file with one piece replaced; returns what the harness says."""
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
            globals()[case](*arguments, kernels=module)
        except Exception as error:
            cause = error.__cause__ or error
            return f"{type(cause).__name__}: {cause}"
    return "nothing"


def out_of_bounds_index() -> str:
    """A kept patch that doesn't exist."""
    qkv, kept = torch.randn(1, 20, 3, 2, 32), torch.tensor([[0, 5, 20]])
    try:
        _kernels().gather_attention(qkv, kept, None, False)
    except Exception as error:
        return f"{type(error.__cause__).__name__}: {error.__cause__}"
    return "nothing"


def traffic(op: str) -> tuple[int, int]:
    """Bytes that an op moves, and its floor: each input read once, each output written once."""
    torch.manual_seed(0)
    kernels = _kernels()
    import triton_guard

    x, kept, size = torch.randn(1, 3, 224, 224), random_kept(1, 46, 196), 16
    jitter = (torch.tensor([7, -3]), torch.tensor(True))
    patches = torch.randn(1, 46, 768)
    half = torch.randn(1, 46, 3, 2, 64).bfloat16()
    one, channel = torch.tensor(1.0), torch.rand(3)
    parts = torch.ones(3, 4)
    image, patch, qkv = 4 * x.numel(), 4 * patches.numel(), 2 * half.numel()
    cases = {
        "gather_patches": (2 * patch, (x, kept, *jitter, size)),
        "gather_patches_backward": (patch + image, (patches, kept, *jitter, size, 224, 224)),
        "total_variation": (image // 3, (x[:, :1], None, 1)),
        "total_variation_backward": (2 * image // 3, (one, one, x[:, :1], None, 1, parts)),
        "batch_norm_matching": (2 * image, (x, *[channel] * 4, 1e-5)),
        "batch_norm_matching_backward": (
            3 * image,
            (x.clone(), x, *[channel] * 2, 1e-5, *[channel] * 2),
        ),
        "adam_clamp_": (
            7 * patch,
            (
                *(x.clone() for _ in range(4)),
                torch.tensor(1),
                0.1,
                0.5,
                0.9,
                -channel,
                channel,
                kept,
                size,
            ),
        ),
        "gather_attention": (qkv * 4 // 3, (half, None, None, True)),
        "gather_attention_backward": (qkv * 7 // 3, (half[:, :, 0].flatten(2), half, None, None)),
    }
    floor, arguments = cases[op]
    launches = triton_guard.MEMORY.launches
    launches.clear()
    getattr(kernels, op)(*arguments)
    return sum(launch.loaded + launch.stored for launch in launches), floor
