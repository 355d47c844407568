"""A whole inversion by the published-style loop and by ours, dense and sparse, in alternation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import record
from benchmarks.flops import needed_flops
from benchmarks.loops import BATCHES, VARIANTS, Case, Cost, Loop, Variant, costs, deit
from benchmarks.peak import SQUARE, block_shapes, sgemm
from benchmarks.timing import alternate, rounded, spread
from smi_fast import Dense, StopSchedule

ROUNDS = 5
# A phase of a timed block: the stop, a typical step, and the one whose importance is read.
PHASE_STEPS = 3
# The model that is affordable to run a whole schedule with.
WHOLE_RUN_OF = "deit_tiny"
METHOD = (
    "Whole-schedule seconds are composed from medians per step of each phase: every variant runs "
    "blocks of a few steps in each phase, in alternation; a phase of n iterations is its first "
    "step, with the stop, and n - 1 typical ones. Spreads are medians and quartiles over rounds."
)
MEMORY = (
    "Peak resident bytes of a process of its own that runs two iterations in each phase, less what "
    "it has after a forward pass of one image: the weights and the libraries."
)


def schedule_phases(stops: StopSchedule, iterations: int, patches: int) -> list[tuple[int, int]]:
    """(kept patches, iterations) of each phase."""
    edges = (0, *stops.at, iterations)
    lengths = [end - start for start, end in pairwise(edges)]
    return list(zip((patches, *stops.counts(patches)), lengths, strict=True))


def block(stops: StopSchedule, steps: int) -> tuple[StopSchedule, int]:
    """The same stops with only so many steps between them, and iterations that end in typical ones.

    The steps around a stop have no jitter, so of three steps only the middle one is typical.
    """
    at = tuple(steps * (index + 1) for index in range(len(stops.at)))
    return StopSchedule(at, stops.drop), at[-1] + steps + 2


def whole_seconds(phases: Sequence[tuple[int, int]], cost: dict[int, Cost]) -> float:
    return sum(cost[kept].first + (count - 1) * cost[kept].typical for kept, count in phases)


def measure(case: Case, iterations: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times, work and memory of every variant for one model, and the ratios between them."""
    stops, patches = StopSchedule.scaled(iterations), case.vit.patch_embed.num_patches
    sparse_phases = schedule_phases(stops, iterations, patches)
    fewest, batch = sparse_phases[-1][0], len(case.targets)
    short, length = block(stops, PHASE_STEPS)
    pixels: dict[str, Tensor] = {}

    def contender(name: str, variant: Variant) -> partial[dict[int, Cost]]:
        def keep(iteration: int, images: Tensor, kept: Tensor) -> None:
            pixels[name] = images.clone()

        count = length if variant.sparse else PHASE_STEPS
        return partial(costs, variant.loop(case), variant.schedule(short), count, keep)

    # As many rows as tokens go through a block at the end.
    rows = batch * (fewest + case.vit.num_prefix_tokens)
    speeds = {"square": sgemm(SQUARE), "block_shapes": sgemm(block_shapes(case.vit, rows))}
    timed: dict[str, list[Any]] = alternate(
        {**speeds, **{name: contender(name, variant) for name, variant in VARIANTS.items()}}, rounds
    )
    peak = median(timed["square"])

    def typical(name: str, kept: int) -> list[float]:
        return [cost[kept].typical for cost in timed[name]]

    wholes: dict[str, list[float]] = {}
    variants = {}
    for name, variant in VARIANTS.items():
        phases = sparse_phases if variant.sparse else [(patches, iterations)]
        wholes[name] = [whole_seconds(phases, cost) for cost in timed[name]]
        variants[name] = {
            "whole_seconds": spread(wholes[name]),
            "images_per_hour": rounded(batch * 3600 / median(wholes[name])),
            "steps": [
                _step(case, kept, count, [cost[kept] for cost in timed[name]], peak)
                for kept, count in phases
            ],
        }
    return {
        "batch": batch,
        "phases": [{"patches": kept, "iterations": count} for kept, count in sparse_phases],
        "sgemm_gflops": {name: spread(timed[name]) for name in speeds},
        "variants": variants,
        "ratios_to_our_sparse": {
            "whole_schedule": {
                name: spread(_ratios(wholes[name], wholes["our_sparse"])) for name in VARIANTS
            },
            f"step_at_{fewest}_patches": {
                name: spread(_ratios(typical(name, fewest), typical("our_sparse", fewest)))
                for name, variant in VARIANTS.items()
                if variant.sparse
            },
        },
        "published_dense_step_to_sparse_step": spread(
            _ratios(typical("published_dense", patches), typical("published_sparse", fewest))
        ),
        "dense_images_agree": agreement(pixels["published_dense"], pixels["our_dense"]),
    }


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _step(case: Case, kept: int, iterations: int, timed: list[Cost], peak: float) -> dict[str, Any]:
    """What a step of one phase costs."""
    seconds = [cost.typical for cost in timed]
    gflop = needed_flops(case.vit, len(case.targets), kept) / 1e9
    return {
        "patches": kept,
        "iterations": iterations,
        "seconds": spread(seconds),
        "first_seconds": spread([cost.first for cost in timed]),
        "needed_gflop": rounded(gflop),
        "gflops": rounded(gflop / median(seconds)),
        "share_of_sgemm": rounded(gflop / median(seconds) / peak),
    }


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The share of pixels that are the same to 1e-3.

    Raises:
        AssertionError: fewer than 99.9 %. The first steps of Adam have the size of the learning
            rate whatever the gradient's is, so that rounding decides a few pixels.
    """
    share = ((ours - theirs).abs() < 1e-3).double().mean().item()
    assert share > 0.999, f"expected the same images of both dense loops, {share:.2%} of pixels are"
    return rounded(share, 7)


def whole_run(case: Case, iterations: int) -> dict[str, float]:
    """Seconds of one whole inversion, not composed."""
    stops = StopSchedule.scaled(iterations)

    def seconds(run: Loop) -> float:
        start = time.perf_counter()
        run(stops, iterations, lambda *_: None)
        return rounded(time.perf_counter() - start)

    return {name: seconds(VARIANTS[name].loop(case)) for name in ("published_sparse", "our_sparse")}


def peak_memory(model: str, name: str) -> int:
    """Peak resident bytes of a variant, in a process of its own: peaks don't go down. Linux."""
    case, variant = deit(model), VARIANTS[name]
    with torch.no_grad():
        case.vit(case.init[:1])
    # 5 sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    stops = StopSchedule((2, 4, 6, 8), StopSchedule().drop)
    schedule = stops if variant.sparse else Dense()
    variant.loop(case)(schedule, 10 if variant.sparse else 2, lambda *_: None)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in /proc/self/status")


def memory(model: str) -> dict[str, Any]:
    """Peak memory of every variant, and its share of the published dense one's."""
    peaks = {}
    for name in VARIANTS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            peaks[name] = child.submit(peak_memory, model, name).result()
    return {
        "peak_mb": {name: rounded(peak / 1e6) for name, peak in peaks.items()},
        "share_of_published_dense": {
            name: rounded(peak / peaks["published_dense"]) for name, peak in peaks.items()
        },
    }


def main(models: Sequence[str] = tuple(BATCHES), iterations: int = 400) -> None:
    measured = {}
    for model in models:
        case = deit(model)
        measured[model] = measure(case, iterations)
        if model == WHOLE_RUN_OF:
            measured[model]["whole_run_seconds"] = whole_run(case, iterations)
        measured[model]["memory"] = memory(model)
    record(
        "end_to_end",
        {
            "iterations": iterations,
            "stops": StopSchedule.scaled(iterations).at,
            "rounds": ROUNDS,
            "method": METHOD,
            "memory_method": MEMORY,
            "models": measured,
        },
    )
