"""Times on a GPU, for ``smi-fast verify``: ops beside their alternatives, and whole iterations.

What computes something wrong isn't timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from smi_fast import recipes
from smi_fast.engine.precision import FLOAT32, PRECISIONS
from smi_fast.inversion import SparseInverter
from smi_fast.inversion.cuda_graph import CapturedCall
from smi_fast.inversion.state import InversionState
from smi_fast.ops import backends, reference
from smi_fast.ops.grid import patch_mask
from smi_fast.ops.timer import replayed_milliseconds
from smi_fast.schedules import Dense, Selection
from smi_fast.verify import isolation, stages
from smi_fast.verify.cases import OpCall, random_kept
from smi_fast.verify.correctness import answers, verdict

HEADS, WIDTH, PATCH, SIDE = 6, 64, 16, 224
# K: all patches of an image, and as many as the published schedule keeps.
KEPT = (196, 46)
WARM_UP, REPEATS = 5, 30
# The ways to take an iteration: eager PyTorch, and what auto takes in each precision.
STEPS = (
    *(("reference", kept, FLOAT32) for kept in KEPT),
    *((backends.AUTO, kept, precision) for precision in PRECISIONS for kept in KEPT),
)
# Seconds that iterations are timed for, and their numbers at least and at most.
SECONDS, FEWEST, MOST = 0.5, 3, 50
# Iterations of an inversion that is timed, at least as many as are taken.
ROWS = 200
# Kernels of PyTorch's attention.
PINNED = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)
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


def sustained(call: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Milliseconds of a call among others, with the time of the host, and how many were timed."""
    for _ in range(WARM_UP):
        call()
    synchronize(device)
    count, start = 0, time.perf_counter()
    while count < FEWEST or (count < MOST and time.perf_counter() - start < SECONDS):
        call()
        count += 1
    synchronize(device)
    return (time.perf_counter() - start) / count * 1e3, count


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def deit_calls(batch: int) -> Iterator[OpCall]:
    """Calls as large as those of DeiT-S, in float32."""
    images = torch.rand(batch, 3, SIDE, SIDE)
    jitter = torch.tensor([5, -9]).expand(batch, 2), torch.tensor(True).expand(batch)
    bounds, channel = (-torch.ones(3), torch.ones(3)), torch.rand(4, 64) + 0.5
    one, sums, space = torch.ones(()), torch.ones(3, 4), (torch.rand(3), torch.rand(3) + 0.5)
    features = torch.randn(batch, 64, 56, 56)
    for count in KEPT:
        kept = random_kept(batch, count, KEPT[0])
        active = kept if count < KEPT[0] else None
        rows = SIDE // PATCH
        frozen = None if active is None else ~patch_mask(kept, rows, rows)
        still = None if frozen is None else images, frozen
        patches = torch.randn(batch, count, 3 * PATCH**2)
        qkv = torch.randn(batch, count + 1, 3, HEADS, WIDTH)
        back = (kept, *jitter, PATCH, SIDE, SIDE)
        lr = torch.tensor(0.25, dtype=torch.float64)
        adam = (torch.tensor(3), lr, 0.5, 0.99, 0.0, *bounds, active, PATCH)
        calls: dict[str, tuple[Any, ...]] = {
            "gather_patches": (images, kept, *jitter, PATCH),
            "gather_patches_backward": (patches, *back),
            "gather_sigmoid_patches": (images, kept, *jitter, *space, *still, PATCH),
            "gather_sigmoid_patches_backward": (
                *(patches, images, kept, *jitter, space[1], still[1], PATCH),
            ),
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


def op_entries(device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """The times of every op, each in a process of its own."""
    ops = dict.fromkeys(call.op for call in deit_calls(batch=1))
    yield from stages.in_turn([({"op": op}, _send_op_times, (op,)) for op in ops], device, seconds)


def step_entries(device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """The times of iterations, each in a process of its own, and what sparse ones gain."""
    parts = [
        (
            {"step": f"{kept} of {KEPT[0]} patches", "backend": backend, "precision": precision},
            _send_step_time,
            (backend, kept, precision),
        )
        for backend, kept, precision in STEPS
    ]
    times = {}
    for entry in stages.in_turn(parts, device, seconds):
        times[entry["backend"], entry["precision"], entry.get("kept")] = entry.get("milliseconds")
        yield entry
    dense = times.get(("reference", FLOAT32, KEPT[0]))
    sparse = times.get((backends.AUTO, FLOAT32, KEPT[-1]))
    if dense and sparse:
        what = "dense eager PyTorch over sparse smi_fast"
        yield {"kind": "time", "step": what, "ratio": dense / sparse}


def _send_op_times(send: Callable[[object], None], device: str, op: str) -> None:
    torch.set_float32_matmul_precision("highest")
    for entry in op_times(torch.device(device), op):
        send(entry)


def _send_step_time(send: Callable[[object], None], device: str, *step: Any) -> None:
    import timm

    torch.set_float32_matmul_precision("highest")
    teacher = timm.create_model("deit_small_patch16_224")
    send(step_time(torch.device(device), teacher, *step))


def op_times(device: torch.device, op: str, batch: int = 32) -> Iterator[dict[str, Any]]:
    """Milliseconds of every way to compute an op, for each of its calls and data types.

    "milliseconds" are those of a call by itself, with a cold L2 cache, "replayed" those of a call
    among others in a CUDA graph. A way that raises an error, or is wrong, has a reason instead.
    """
    for call in deit_calls(batch):
        if call.op != op:
            continue
        attention = call.op.startswith("gather_attention")
        for dtype in (torch.float32, torch.bfloat16) if attention else (torch.float32,):
            ways = _ways(call.converted(dtype, str(device)), device, dtype)
            times: dict[str, float] = {}
            replayed: dict[str, float] = {}
            failed = wrong_backends(call, device, dtype)
            for way, prepare in ways.items():
                if way in failed:
                    continue
                try:
                    prepared = prepare()
                    times[way] = milliseconds(prepared, device)
                    if device.type == "cuda":
                        replayed[way] = replayed_milliseconds(prepared, device)
                except Exception as problem:
                    failed[way] = isolation.described(problem)
                    if not answers(device):
                        break
            yield {
                "kind": "time",
                "op": call.op,
                "of": f"{batch} images, {call.label}",
                "dtype": str(dtype).removeprefix("torch."),
                "milliseconds": times,
                "replayed": replayed,
                "failed": failed,
            }
            if not answers(device):
                raise RuntimeError("the device answers no more")


def wrong_backends(call: OpCall, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Why a call isn't to be timed, for each backend that computes it wrong."""
    return {
        backend.name: "; ".join(failures)
        for backend in _running(call, device, dtype)
        if (failures := verdict(backend, device, dtype, [call]).failures)
    }


def _running(call: OpCall, device: torch.device, dtype: torch.dtype) -> Iterator[backends.Backend]:
    """The backends but the reference that can run a call."""
    name = call.op.removesuffix("_backward")
    for backend in backends.BACKENDS:
        runs = backend.why_not(name, device, dtype) is None and call.fits(backend, device, dtype)
        if runs and backend.name != "reference":
            yield backend


def _ways(
    call: OpCall, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Eager PyTorch, torch.compile, every backend that can, and SDPA for attention.

    Each is a function that prepares the call to time.
    """
    op, arguments = call.op, call.arguments
    plain: Callable[..., object] = getattr(reference, op)
    ways: dict[str, Callable[[], Callable[[], object]]] = {
        "eager": lambda: partial(plain, *arguments),
        "torch.compile": lambda: partial(torch.compile(plain, dynamic=False), *arguments),
    }
    for backend in _running(call, device, dtype):
        ways[backend.name] = partial(partial, getattr(backend.functions, op), *arguments)
    if op.startswith("gather_attention"):
        ways["sdpa"] = partial(_sdpa_call, op, arguments)
        for kind in PINNED if device.type == "cuda" else ():
            ways[f"sdpa {kind.name.lower()}"] = partial(_sdpa_call, op, arguments, kind)
    return ways


def _sdpa_call(
    op: str, arguments: tuple[Any, ...], kind: SDPBackend | None = None
) -> Callable[[], object]:
    """A call of PyTorch's attention, by one of its kernels or by that which it chooses."""
    plain = partial(_sdpa, arguments[0])
    with nullcontext() if kind is None else sdpa_kernel(kind):
        if op != "gather_attention":
            return _sdpa_backward(*arguments[:2])
    if kind is None:
        return plain

    def pinned() -> Tensor:
        with sdpa_kernel(kind):
            return plain()

    return pinned


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _sdpa_backward(grad: Tensor, qkv: Tensor) -> Callable[[], object]:
    leaf = qkv.clone().requires_grad_()
    out = _sdpa(leaf)
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)


def step_time(
    device: torch.device,
    teacher: nn.Module,
    backend: str,
    kept: int,
    precision: str = FLOAT32,
    batch: int = 32,
) -> dict[str, Any]:
    """Milliseconds of one iteration among others.

    Args:
        device: where to run.
        teacher: a Vision Transformer with any weights.
        backend: of the ops.
        kept: patches of each image that are kept, of every ``KEPT[0]``.
        precision: of the teacher's products.
        batch: images inverted together.
    """
    state = started(teacher.to(device), backend, kept, precision, batch)
    # Eager PyTorch launches kernel by kernel, as it would without this package.
    graph = device.type == "cuda" and backend == backends.AUTO
    step = CapturedCall(state.step, device) if graph else state.step
    taken, iterations = sustained(step, device)
    return {
        "kind": "time",
        "step": f"{batch} images, {state.kept.shape[1]} patches",
        "kept": kept,
        "backend": backend,
        "precision": precision,
        "captured": graph,
        "milliseconds": taken,
        "iterations": iterations,
    }


def started(
    teacher: nn.Module, backend: str, kept: int, precision: str, batch: int
) -> InversionState:
    """An inversion before its first iteration, see :func:`step_time`."""
    inverter = SparseInverter(
        teacher,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        backend=backend,
        precision=precision,
        **recipes.smi().options(schedule=Dense(), iterations=ROWS),
    )
    state = inverter.start([0] * batch)
    count = inverter.teacher.num_patches * kept // KEPT[0]
    state.keep(Selection(state.kept[:, :count].contiguous()))
    return state
