"""Times on a GPU, for ``smi-fast verify``: ops beside their alternatives, and whole iterations.

What :mod:`smi_fast.verify.correctness` has found wrong isn't timed.
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

from smi_fast import recipes
from smi_fast.engine.precision import FLOAT32, PRECISIONS
from smi_fast.inversion import SparseInverter
from smi_fast.inversion.cuda_graph import CapturedCall
from smi_fast.ops import backends, reference
from smi_fast.ops.grid import patch_mask
from smi_fast.schedules import Dense, Selection
from smi_fast.verify import isolation
from smi_fast.verify.cases import OpCall, random_kept
from smi_fast.verify.correctness import answers
from smi_fast.verify.gpu_engine_grid import GPU_STEPS

HEADS, WIDTH, PATCH, SIDE = 6, 64, 16, 224
# K: all patches of an image, and as many as the published schedule keeps.
KEPT = (196, 46)
WARM_UP, REPEATS = 5, 30
# The ways to take an iteration: eager PyTorch, and what auto takes in each precision.
STEPS = (
    *(("reference", kept, FLOAT32) for kept in KEPT),
    *((backends.AUTO, kept, precision) for precision in PRECISIONS for kept in KEPT),
)
# Pairs of a backend and an op that compute something wrong.
Wrong = frozenset[tuple[str, str]]
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


def entries(device: torch.device, wrong: Wrong, limit: float) -> Iterator[dict[str, Any]]:
    """All times of a GPU: those of each op and of each iteration from a process of its own.

    An entry that couldn't be timed says why.
    """
    for op in dict.fromkeys(call.op for call in _deit_calls(batch=1)):
        yield from _isolated({"op": op}, _send_op_times, op, wrong, device=device, limit=limit)
    times: dict[tuple[str, int, str], float | None] = {}
    for step in STEPS:
        backend, kept, precision = step
        named = {"backend": backend, "precision": precision}
        entry: dict[str, Any] = {"step": f"{kept} of {KEPT[0]} patches", **named}
        wrong_ones = _wrong_in_step(device, wrong) if backend == backends.AUTO else []
        if wrong_ones:
            found = [entry | {"not_timed": f"{', '.join(wrong_ones)} is wrong"}]
        else:
            found = list(_isolated(entry, _send_step_time, *step, device=device, limit=limit))
        yield from found
        times[step] = found[0].get("milliseconds")
    dense = times["reference", KEPT[0], FLOAT32]
    sparse = times[backends.AUTO, KEPT[-1], FLOAT32]
    if dense is not None and sparse is not None:
        yield {"step": "dense eager PyTorch over sparse smi_fast", "ratio": dense / sparse}


def _isolated(
    named: dict[str, Any], work: Callable[..., None], *arguments: Any, **options: Any
) -> Iterator[dict[str, Any]]:
    device = str(options["device"])
    try:
        yield from isolation.messages(work, device, *arguments, **options)
    except isolation.Ended as reason:
        yield named | {"not_timed": str(reason)}


def _send_op_times(send: Callable[[object], None], device: str, op: str, wrong: Wrong) -> None:
    torch.set_float32_matmul_precision("highest")
    for entry in op_times(torch.device(device), op, wrong):
        send(entry)


def _send_step_time(send: Callable[[object], None], device: str, *step: Any) -> None:
    import timm

    torch.set_float32_matmul_precision("highest")
    teacher = timm.create_model("deit_small_patch16_224")
    send(step_time(torch.device(device), teacher, *step))


def _wrong_in_step(device: torch.device, wrong: Wrong) -> list[str]:
    """The ops of an iteration, their gradients and the steps of blocks, that auto would take from a
    wrong kernel.
    """
    found = [f"triton {step}" for step in GPU_STEPS if ("triton", step) in wrong]
    for op in backends.OPS:
        chosen = backends.choose(op, device, torch.float32).name
        names = (op, f"{op}_backward")
        found += [f"{chosen} {name}" for name in names if (chosen, name) in wrong]
    return found


def op_times(
    device: torch.device, op: str, wrong: Wrong = frozenset(), batch: int = 32
) -> Iterator[dict[str, Any]]:
    """Milliseconds of every way to compute an op, for each of its calls and data types.

    A way that raises an error has its message instead.
    """
    for call in _deit_calls(batch):
        if call.op != op:
            continue
        attention = call.op.startswith("gather_attention")
        for dtype in (torch.float32, torch.bfloat16) if attention else (torch.float32,):
            ways = _ways(call.converted(dtype, str(device)), device, dtype)
            times: dict[str, float] = {}
            failed: dict[str, str] = {}
            for way, prepare in ways.items():
                if (way, op) in wrong:
                    failed[way] = "it is wrong"
                    continue
                try:
                    times[way] = milliseconds(prepare(), device)
                except Exception as problem:
                    failed[way] = isolation.described(problem)
                    if not answers(device):
                        break
            yield {
                "op": call.op,
                "of": f"{batch} images, {call.label}",
                "dtype": str(dtype).removeprefix("torch."),
                "milliseconds": times,
                "failed": failed,
            }
            if not answers(device):
                raise RuntimeError("the device answers no more")


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
    for backend in backends.BACKENDS:
        name = op.removesuffix("_backward")
        runs = backend.why_not(name, device, dtype) is None and call.fits(backend, device, dtype)
        if runs and backend.name != "reference":
            ways[backend.name] = partial(partial, getattr(backend.functions, op), *arguments)
    if op == "gather_attention":
        ways["sdpa"] = lambda: partial(_sdpa, arguments[0])
    if op == "gather_attention_backward":
        ways["sdpa"] = lambda: _sdpa_backward(*arguments[:2])
    return ways


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
    """Milliseconds of one iteration.

    Args:
        device: where to run.
        teacher: a Vision Transformer with any weights.
        backend: of the ops.
        kept: patches of each image that are kept, of every ``KEPT[0]``.
        precision: of the teacher's products.
        batch: images inverted together.
    """
    inverter = SparseInverter(
        teacher.to(device),
        mean=[0.5] * 3,
        std=[0.25] * 3,
        backend=backend,
        precision=precision,
        **recipes.smi().options(schedule=Dense(), iterations=WARM_UP + REPEATS),
    )
    state = inverter.start([0] * batch)
    count = inverter.teacher.num_patches * kept // KEPT[0]
    state.keep(Selection(state.kept[:, :count].contiguous()))
    # Eager PyTorch launches kernel by kernel, as it would without this package.
    graph = device.type == "cuda" and backend == backends.AUTO
    step = CapturedCall(state.step, device) if graph else state.step
    return {
        "step": f"{batch} images, {count} patches",
        "backend": backend,
        "precision": precision,
        "captured": graph,
        "milliseconds": milliseconds(step, device),
    }
