"""Where the time of a step of our sparse loop goes, when the fewest patches are kept."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks.harness.environment import record
from benchmarks.harness.timing import rounded
from benchmarks.speed.loops import BATCHES, Case, deit, our_loop
from smi_fast import StopSchedule

STEPS = 20
WARM_UP = 15
# By what the profiler calls an op; its own time, without that of the ops it calls.
KINDS = {
    "gemm": ("aten::mm", "aten::addmm", "mkl::", "mkldnn::"),
    "attention": (
        *("smi_fast::gather_attention", "smi_fast::attend_", "aten::bmm", "aten::_softmax"),
    ),
    "norm_and_gelu": (
        *("smi_fast::add_normalize_", "smi_fast::normalize_backward_", "smi_fast::gelu_"),
        *("smi_fast::multiply_", "aten::native_layer_norm", "aten::gelu", "aten::mul_"),
    ),
}
PIXEL_OPS = ("smi_fast::gather_patches", "smi_fast::total_variation", "smi_fast::adam_clamp_")


def kind(name: str, shapes: list[list[int]], images: list[int]) -> str:
    """What a profiled op is for. Pixel work is all that reads a whole image, by any op."""
    if name.startswith(PIXEL_OPS) or images in shapes:
        return "pixels"
    kinds = (kind for kind, prefixes in KINDS.items() if name.startswith(prefixes))
    return next(kinds, "other_tensor_ops")


def measure(case: Case, stops: StopSchedule, steps: int = STEPS) -> dict[str, Any]:
    """Shares of the time of steps after the last stop, and the ops that take most of it."""
    start = stops.at[-1] + WARM_UP
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    edges: list[float] = []

    def callback(iteration: int, images: Tensor, kept: Tensor) -> None:
        if iteration == start:
            profiler.start()
            edges.append(time.perf_counter())
        if iteration == start + steps:
            edges.append(time.perf_counter())
            profiler.stop()

    our_loop(case)(stops, start + steps + 1, callback)
    wall = edges[1] - edges[0]
    seconds = dict.fromkeys(
        ("gemm", "attention", "norm_and_gelu", "pixels", "other_tensor_ops"), 0.0
    )
    ops: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        own = event.self_cpu_time_total / 1e6
        seconds[kind(event.key, event.input_shapes, list(case.init.shape))] += own
        ops[event.key] = ops.get(event.key, 0.0) + own
    seconds["python_and_rest"] = wall - sum(seconds.values())
    longest = sorted(ops.items(), key=lambda item: -item[1])[:15]
    return {
        "batch": len(case.targets),
        "patches": stops.counts(case.vit.patch_embed.num_patches)[-1],
        "seconds_per_step": rounded(wall / steps),
        "shares": {name: rounded(part / wall) for name, part in seconds.items()},
        "longest_ops": {name: rounded(part / wall) for name, part in longest},
    }


def main() -> None:
    stops = StopSchedule((2, 4, 6, 8))
    models = {name: measure(deit(name), stops) for name in BATCHES}
    record("step_profile", {"steps": STEPS, "models": models})
