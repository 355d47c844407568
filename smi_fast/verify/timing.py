"""Times on a GPU, for ``smi-fast verify``: ops beside their alternatives, and whole iterations.

:mod:`smi_fast.verify.correctness` checks the kernels before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.inversion import SparseInverter
from smi_fast.inversion.cuda_graph import CapturedCall
from smi_fast.ops import backends, reference
from smi_fast.schedules import Dense, Selection
from smi_fast.verify.cases import OpCall, random_kept

HEADS, WIDTH, PATCH, SIDE = 6, 64, 16, 224
# K: all patches of an image, and as many as the published schedule keeps.
KEPT = (196, 46)
WARM_UP, REPEATS = 5, 30
# Larger than the L2 cache of any GPU.
FLUSHED_BYTES = 512 * 2**20


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, on a GPU with a cold L2 cache."""
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        return statistics.median(_seconds(call) for _ in range(REPEATS)) * 1e3
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    with torch.cuda.device(device):
        for start, stop in events:
            flushed.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(stop) for start, stop in events]
    return statistics.median(times)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _deit_calls(batch: int) -> Iterator[OpCall]:
    """Calls as large as those of DeiT-S, in float32."""
    images, jitter = torch.rand(batch, 3, SIDE, SIDE), (torch.tensor([5, -9]), torch.tensor(True))
    bounds, channel = (-torch.ones(3), torch.ones(3)), torch.rand(4, 64) + 0.5
    one, sums = torch.ones(()), torch.ones(3, 4)
    features = torch.randn(batch, 64, 56, 56)
    for count in KEPT:
        kept = random_kept(batch, count, KEPT[0])
        active = kept if count < KEPT[0] else None
        patches = torch.randn(batch, count, 3 * PATCH**2)
        qkv = torch.randn(batch, count + 1, 3, HEADS, WIDTH)
        back = (kept, *jitter, PATCH, SIDE, SIDE)
        adam = (torch.tensor(3), 0.25, 0.5, 0.99, *bounds, active, PATCH)
        calls: dict[str, tuple[Any, ...]] = {
            "gather_patches": (images, kept, *jitter, PATCH),
            "gather_patches_backward": (patches, *back),
            "gather_attention": (qkv, None, None, False),
            "gather_attention_backward": (qkv[:, :, 0].flatten(2), qkv, None, None),
            "total_variation": (images, active, PATCH),
            "total_variation_backward": (one, one, images, active, PATCH, sums),
            "adam_clamp_": (*[images] * 4, *adam),
        }
        for op, arguments in calls.items():
            yield OpCall(f"{count} patches", op, arguments)
    statistic = (*channel, 1e-5)
    yield OpCall("64 channels of 56 x 56", "batch_norm_matching", (features, *statistic))


def op_times(device: torch.device, batch: int = 32) -> Iterator[dict[str, Any]]:
    """Milliseconds of every way to compute an op, for each op and data type."""
    for call in _deit_calls(batch):
        attention = call.op.startswith("gather_attention")
        for dtype in (torch.float32, torch.bfloat16) if attention else (torch.float32,):
            ways = _ways(call.converted(dtype, str(device)), device, dtype)
            yield {
                "op": call.op,
                "of": f"{batch} images, {call.label}",
                "dtype": str(dtype).removeprefix("torch."),
                "milliseconds": {way: milliseconds(run, device) for way, run in ways.items()},
            }


def _ways(
    call: OpCall, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Eager PyTorch, torch.compile, every backend that can, and SDPA for attention."""
    op, arguments = call.op, call.arguments
    plain: Callable[..., object] = getattr(reference, op)
    ways: dict[str, Callable[[], object]] = {
        "eager": partial(plain, *arguments),
        "torch.compile": partial(torch.compile(plain, dynamic=False), *arguments),
    }
    for backend in backends.BACKENDS:
        name = op.removesuffix("_backward")
        runs = backend.why_not(name, device, dtype) is None and call.fits(backend, device, dtype)
        if runs and backend.name != "reference":
            ways[backend.name] = partial(getattr(backend.functions, op), *arguments)
    if op == "gather_attention":
        ways["sdpa"] = partial(_sdpa, arguments[0])
    if op == "gather_attention_backward":
        leaf = arguments[1].clone().requires_grad_()
        out = _sdpa(leaf)
        ways["sdpa"] = lambda: torch.autograd.grad(out, leaf, arguments[0], retain_graph=True)
    return ways


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def step_times(
    device: torch.device, teacher: nn.Module, batch: int = 32
) -> Iterator[dict[str, Any]]:
    """Milliseconds of one iteration, dense and sparse, with our kernels and without.

    The last entry is the ratio of dense eager PyTorch to sparse smi_fast.

    Args:
        device: where to run.
        teacher: a Vision Transformer with any weights.
        batch: images inverted together.
    """
    times: list[float] = []
    for backend in ("reference", backends.AUTO):
        inverter = SparseInverter(
            teacher.to(device),
            schedule=Dense(),
            mean=[0.5] * 3,
            std=[0.25] * 3,
            iterations=WARM_UP + REPEATS,
            backend=backend,
        )
        patches = inverter.teacher.num_patches
        for count in (patches, patches * KEPT[1] // KEPT[0]):
            state = inverter.start([0] * batch)
            state.keep(Selection(state.kept[:, :count].contiguous()))
            # Eager PyTorch launches kernel by kernel, as it would without this package.
            graph = device.type == "cuda" and backend == backends.AUTO
            step = CapturedCall(state.step, device) if graph else state.step
            times.append(milliseconds(step, device))
            yield {
                "step": f"{batch} images, {count} patches",
                "backend": backend,
                "captured": graph,
                "milliseconds": times[-1],
            }
    yield {"step": "dense eager PyTorch over sparse smi_fast", "ratio": times[0] / times[-1]}
