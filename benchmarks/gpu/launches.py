"""The kernels of an iteration on a GPU: how often each runs, how long, and what lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from smi_fast.engine.precision import BFLOAT16, FLOAT32
from smi_fast.inversion.cuda_graph import WARM_UP, CapturedCall
from smi_fast.verify import timing
from smi_fast.verify.stages import attempt

BATCH, ITERATIONS = 32, 5
# Kernels that are listed by name; the others are counted.
LISTED = 40


def send_launches(send: Callable[[object], None], device_name: str) -> None:
    """Send a table of the kernels of a captured iteration of DeiT-S, dense and sparse."""
    device = torch.device(device_name)
    teacher = timm.create_model("deit_small_patch16_224").to(device)
    for precision in (BFLOAT16, FLOAT32):
        for kept in reversed(timing.KEPT):
            named = {"kind": "launches", "precision": precision, "kept": kept, "batch": BATCH}
            attempt(send, named, "not_timed", launches, teacher, precision, kept, device)


def launches(teacher: nn.Module, precision: str, kept: int, device: torch.device) -> dict[str, Any]:
    """The :func:`table` of an iteration."""
    state = timing.started(teacher, "auto", kept, precision, BATCH)
    step = CapturedCall(state.step, device)
    for _ in range(WARM_UP + 1):
        step()
    milliseconds, _ = timing.sustained(step, device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ITERATIONS):
            step()
        torch.cuda.synchronize(device)
    return table(found.key_averages(), ITERATIONS, milliseconds)


def table(events: Iterable[Any], iterations: int, milliseconds: float) -> dict[str, Any]:
    """What kernels an iteration has.

    Args:
        events: averages of the profiler, with ``key``, ``count`` and ``self_device_time_total`` in
            microseconds.
        iterations: that were profiled.
        milliseconds: that an iteration takes without the profiler.

    Returns:
        the longest kernels, the number of all in an iteration, the microseconds in which one runs,
        and those in which none does for each kernel.
    """
    ran = [event for event in events if event.self_device_time_total > 0]
    ran.sort(key=lambda event: -event.self_device_time_total)
    count = sum(event.count for event in ran) / iterations
    busy = sum(event.self_device_time_total for event in ran) / iterations
    return {
        "kernels": [
            {
                "name": event.key,
                "count": event.count / iterations,
                "microseconds": round(event.self_device_time_total / iterations, 2),
            }
            for event in ran[:LISTED]
        ],
        "count": count,
        "busy": round(busy, 1),
        "gap": round((milliseconds * 1e3 - busy) / count, 3) if count else None,
    }
