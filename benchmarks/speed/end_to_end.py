"""Whole inversions by the published-style loop and by ours, dense and sparse, in alternation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.environment import record
from benchmarks.harness.flops import needed_flops
from benchmarks.harness.memory import in_new_process, peak_bytes
from benchmarks.harness.sgemm import SQUARE, block_shapes, sgemm
from benchmarks.harness.timing import alternate, ratios, rounded, spread
from benchmarks.speed.loops import (
    BATCHES,
    NO_STOPS,
    QUICK_BATCH,
    VARIANTS,
    Loop,
    PhaseSeconds,
    Variant,
    Workload,
    deit,
    time_phases,
)
from smi_fast import StopSchedule

ITERATIONS, QUICK_ITERATIONS = 400, 100
ROUNDS, QUICK_ROUNDS = 5, 2
# Iterations of a timed block: in each phase before the last one, in the last phase after its early
# iterations, and of a dense loop.
PHASE_ITERATIONS, LAST_ITERATIONS, DENSE_ITERATIONS = 2, 3, 3
# Only this model is also run for a whole schedule: the others take too long.
WHOLE_RUN_OF = "deit_tiny"
METHOD = (
    "Each round runs every variant once, for a block of a few iterations in each phase. The "
    "seconds of a whole run are composed: a phase of n iterations takes the seconds of its early "
    "iterations (the first one, which drops patches; in our sparse loop 13, one of which packs the "
    "weights), and the median of the later ones for the rest. Spreads are medians and quartiles "
    "over rounds."
)
MEMORY = (
    "Peak resident bytes of a new process that runs two dense iterations and one in each later "
    "phase, minus the bytes resident after a forward pass of one image: libraries, and the weights "
    "as the loop holds them. Gradients of weights, which only the published-style loop computes, "
    "count. Packed weights do not: our loop keeps them after 12 iterations of a phase, and they "
    "are twice the size of the weights."
)


def schedule_phases(stops: StopSchedule, iterations: int, patches: int) -> list[tuple[int, int]]:
    """(kept patches, iterations) of each phase."""
    edges = (0, *stops.at, iterations)
    lengths = [end - start for start, end in pairwise(edges)]
    return list(zip((patches, *stops.counts(patches)), lengths, strict=True))


def whole_seconds(phases: Sequence[tuple[int, int]], seconds: dict[int, PhaseSeconds]) -> float:
    """Seconds of a whole run, composed from its phases."""
    return sum(seconds[kept].total(iterations) for kept, iterations in phases)


def time_blocks(
    workload: Workload, stops: StopSchedule, rounds: int
) -> tuple[dict[str, list[Any]], float]:
    """Times a block of every variant, and sgemm, in each round.

    Returns:
        for each variant the seconds of its phases, and for each sgemm its GFLOP/s, round by round;
        and the share of pixels in which the two dense loops agree.

    Raises:
        AssertionError: the two dense loops make different images.
    """
    at = tuple(PHASE_ITERATIONS * (index + 1) for index in range(len(stops.at)))
    short = StopSchedule(at, stops.drop)
    pixels: dict[str, Tensor] = {}

    def contender(name: str, variant: Variant) -> Callable[[], dict[int, PhaseSeconds]]:
        def keep(iteration: int, images: Tensor, kept: Tensor) -> None:
            pixels[name] = images.clone()

        sparse_iterations = at[-1] + variant.early + LAST_ITERATIONS
        count = sparse_iterations if variant.sparse else DENSE_ITERATIONS
        run = variant.loop(workload)
        return partial(time_phases, run, variant.stops(short), count, variant.early, keep)

    fewest = stops.counts(workload.patches)[-1]
    rows = len(workload.targets) * (fewest + workload.vit.num_prefix_tokens)
    contenders: dict[str, Callable[[], Any]] = {
        **{name: contender(name, variant) for name, variant in VARIANTS.items()},
        "sgemm_square": sgemm(SQUARE),
        "sgemm_block_shapes": sgemm(block_shapes(workload.vit, rows)),
    }
    # The first iterations of a process are slow. They are not timed, but show that images agree.
    for name in ("published_dense", "our_dense"):
        contenders[name]()
    agreeing = agreement(pixels["published_dense"], pixels["our_dense"])
    return alternate(contenders, rounds), agreeing


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The share of pixels that are equal to 1e-3.

    Raises:
        AssertionError: it is below 99.9 %. A few pixels may differ: in its first iterations Adam
            moves a pixel by the learning rate, however small the gradient is, so rounding can
            decide the direction.
    """
    share = ((ours - theirs).abs() < 1e-3).double().mean().item()
    assert share > 0.999, f"expected the same images from the two dense loops, got {share:.2%} same"
    return rounded(share, 7)


def measure(workload: Workload, iterations: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times and work of every variant for one model, and the ratios between them."""
    stops, patches = StopSchedule.scaled(iterations), workload.patches
    timed, agreeing = time_blocks(workload, stops, rounds)
    phases = schedule_phases(stops, iterations, patches)
    fewest, batch = phases[-1][0], len(workload.targets)
    wholes: dict[str, list[float]] = {}
    variants = {}
    for name, variant in VARIANTS.items():
        own_phases = phases if variant.sparse else [(patches, iterations)]
        wholes[name] = [whole_seconds(own_phases, seconds) for seconds in timed[name]]
        variants[name] = {
            "whole_seconds": spread(wholes[name]),
            "images_per_hour": rounded(batch * 3600 / median(wholes[name])),
            "steps": [
                {"patches": kept, "iterations": count, **_phase(workload, kept, timed, name)}
                for kept, count in own_phases
            ],
        }

    def typical(name: str, kept: int) -> list[float]:
        return [seconds[kept].typical for seconds in timed[name]]

    return {
        "batch": batch,
        "sgemm_gflops": {
            "square": spread(timed["sgemm_square"]),
            f"block_at_{fewest}_patches": spread(timed["sgemm_block_shapes"]),
        },
        "variants": variants,
        "ratios_to_our_sparse": {
            "whole_schedule": {
                name: spread(ratios(wholes[name], wholes["our_sparse"])) for name in VARIANTS
            },
            f"step_at_{fewest}_patches": {
                name: spread(ratios(typical(name, fewest), typical("our_sparse", fewest)))
                for name, variant in VARIANTS.items()
                if variant.sparse
            },
        },
        "published_dense_step_to_sparse_step": spread(
            ratios(typical("published_dense", patches), typical("published_sparse", fewest))
        ),
        "dense_images_agree": agreeing,
    }


def _phase(workload: Workload, kept: int, timed: dict[str, list[Any]], name: str) -> dict[str, Any]:
    """The seconds and the speed of a variant in one phase. sgemm is that of the same round."""
    seconds = [phases[kept] for phases in timed[name]]
    gflop = needed_flops(workload.vit, len(workload.targets), kept) / 1e9
    speeds = [gflop / phase.typical for phase in seconds]
    return {
        "seconds": spread([phase.typical for phase in seconds]),
        "early_steps": len(seconds[0].early),
        "early_seconds": spread([sum(phase.early) for phase in seconds]),
        "needed_gflop": rounded(gflop),
        "gflops": spread(speeds),
        "share_of_sgemm": spread(ratios(speeds, timed["sgemm_square"])),
    }


def whole_run(workload: Workload, iterations: int) -> dict[str, float]:
    """Seconds of one whole inversion by each sparse loop, timed instead of composed."""
    stops = StopSchedule.scaled(iterations)

    def seconds(run: Loop) -> float:
        start = time.perf_counter()
        run(stops, iterations, lambda *_: None)
        return rounded(time.perf_counter() - start)

    names = ("published_sparse", "our_sparse")
    return {name: seconds(VARIANTS[name].loop(workload)) for name in names}


def peak_memory(model: str, batch: int, name: str) -> int:
    """Peak resident bytes of a variant. A peak never falls, so call this in a new process."""
    workload, variant = deit(model, batch), VARIANTS[name]
    with torch.no_grad():
        workload.vit(workload.init[:1])
    run = variant.loop(workload)
    stops, count = (StopSchedule((2, 3, 4, 5)), 6) if variant.sparse else (NO_STOPS, 2)
    return peak_bytes(lambda: run(stops, count, lambda *_: None))


def memory(model: str, batch: int) -> dict[str, Any]:
    """Peak memory of every variant, and its share of the published dense loop's."""
    peaks = {name: in_new_process(peak_memory, model, batch, name) for name in VARIANTS}
    return {
        "peak_mb": {name: rounded(peak / 1e6) for name, peak in peaks.items()},
        "share_of_published_dense": {
            name: rounded(peak / peaks["published_dense"]) for name, peak in peaks.items()
        },
    }


def main(quick: bool = False) -> None:
    batches = {WHOLE_RUN_OF: QUICK_BATCH} if quick else BATCHES
    iterations = QUICK_ITERATIONS if quick else ITERATIONS
    rounds = QUICK_ROUNDS if quick else ROUNDS
    measured = {}
    for model, batch in batches.items():
        workload = deit(model, batch)
        measured[model] = measure(workload, iterations, rounds)
        if model == WHOLE_RUN_OF:
            measured[model]["whole_run_seconds"] = whole_run(workload, iterations)
        measured[model]["memory"] = memory(model, batch)
    record(
        "end_to_end",
        {
            "iterations": iterations,
            "stops": StopSchedule.scaled(iterations).at,
            "rounds": rounds,
            "method": METHOD,
            "memory_method": MEMORY,
            "models": measured,
        },
        quick=quick,
    )
