"""Where the time of an iteration of our sparse loop goes, after the last stop."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks.harness.environment import record
from benchmarks.harness.timing import rounded
from benchmarks.speed.loops import BATCHES, QUICK_BATCH, Workload, deit, our_loop
from smi_fast import StopSchedule
from smi_fast.engine.precision import BFLOAT16, FLOAT32

STOPS = StopSchedule((2, 4, 6, 8))
ITERATIONS, QUICK_ITERATIONS = 20, 5
# Iterations after the last stop that are not profiled. The loop allocates and packs weights there.
WARM_UP = 15
# The kind of an op by the prefix of its name in the profiler. An op's time doesn't include the ops
# that it calls.
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
    """The kind of a profiled op. Every op that reads a whole batch of images is pixel work."""
    if name.startswith(PIXEL_OPS) or images in shapes:
        return "pixels"
    kinds = (kind for kind, prefixes in KINDS.items() if name.startswith(prefixes))
    return next(kinds, "other_tensor_ops")


def measure(
    workload: Workload,
    stops: StopSchedule,
    iterations: int = ITERATIONS,
    precision: str = FLOAT32,
) -> dict[str, Any]:
    """The shares of each kind of op in an iteration after the last stop, and the longest ops."""
    start = stops.at[-1] + WARM_UP
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    edges: list[float] = []

    def callback(iteration: int, images: Tensor, kept: Tensor) -> None:
        if iteration == start:
            profiler.start()
            edges.append(time.perf_counter())
        if iteration == start + iterations:
            edges.append(time.perf_counter())
            profiler.stop()

    our_loop(workload, precision=precision)(stops, start + iterations + 1, callback)
    wall = edges[1] - edges[0]
    seconds = dict.fromkeys((*KINDS, "pixels", "other_tensor_ops"), 0.0)
    ops: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        own = event.self_cpu_time_total / 1e6
        seconds[kind(event.key, event.input_shapes, list(workload.init.shape))] += own
        ops[event.key] = ops.get(event.key, 0.0) + own
    seconds["python_and_rest"] = wall - sum(seconds.values())
    longest = sorted(ops.items(), key=lambda item: -item[1])[:15]
    return {
        "batch": len(workload.targets),
        "patches": stops.counts(workload.patches)[-1],
        "seconds_per_step": rounded(wall / iterations),
        "shares": {name: rounded(part / wall) for name, part in seconds.items()},
        "longest_ops": {name: rounded(part / wall) for name, part in longest},
    }


def main(quick: bool = False) -> None:
    batches = {"deit_tiny": QUICK_BATCH} if quick else BATCHES
    iterations = QUICK_ITERATIONS if quick else ITERATIONS
    workloads = {name: deit(name, batch) for name, batch in batches.items()}
    models, in_bfloat16 = (
        {name: measure(each, STOPS, iterations, precision) for name, each in workloads.items()}
        for precision in (FLOAT32, BFLOAT16)
    )
    results = {"steps": iterations, "models": models, BFLOAT16: in_bfloat16}
    record("step_profile", results, quick=quick)
