"""A whole inversion by the published-style loop and by ours, dense and sparse, in alternation."""

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
from benchmarks.harness.memory import in_a_process_of_its_own, peak
from benchmarks.harness.sgemm import SQUARE, block_shapes, sgemm
from benchmarks.harness.timing import alternate, rounded, spread
from benchmarks.speed.loops import BATCHES, VARIANTS, Case, Cost, Loop, Variant, costs, deit
from smi_fast import Dense, StopSchedule

ROUNDS = 5
# Of a timed block: in each phase before the last, in the last once its early ones are done, and
# without stops.
PHASE_STEPS, LAST_STEPS, DENSE_STEPS = 2, 3, 3
# The model that is affordable to run a whole schedule with.
WHOLE_RUN_OF = "deit_tiny"
METHOD = (
    "Whole-schedule seconds are composed from medians per step of each phase: every variant runs "
    "blocks of a few steps in each phase, in alternation; a phase of n iterations is its early "
    "steps, the first with the stop and in ours one that packs weights, and typical ones for the "
    "rest. Spreads are medians and quartiles over rounds."
)
MEMORY = (
    "Peak resident bytes of a process of its own that runs two dense iterations and one in each "
    "later phase, less what it has after a forward pass of one image: libraries and weights, as "
    "the loop holds them. Gradients of weights, which the published-style loop makes, count; the "
    "packed weights, twice their size, that ours makes after a dozen steps of a phase don't."
)


def schedule_phases(stops: StopSchedule, iterations: int, patches: int) -> list[tuple[int, int]]:
    """(kept patches, iterations) of each phase."""
    edges = (0, *stops.at, iterations)
    lengths = [end - start for start, end in pairwise(edges)]
    return list(zip((patches, *stops.counts(patches)), lengths, strict=True))


def whole_seconds(phases: Sequence[tuple[int, int]], cost: dict[int, Cost]) -> float:
    return sum(cost[kept].whole(count) for kept, count in phases)


def time_blocks(case: Case, stops: StopSchedule, rounds: int) -> tuple[dict[str, list[Any]], float]:
    """For each round the costs of every variant, and GFLOP/s of sgemm right after ours.

    Also the share of pixels in which both dense loops agree.

    Raises:
        AssertionError: both dense loops don't make the same images.
    """
    at = tuple(PHASE_STEPS * (index + 1) for index in range(len(stops.at)))
    short = StopSchedule(at, stops.drop)
    pixels: dict[str, Tensor] = {}

    def contender(name: str, variant: Variant) -> Callable[[], dict[int, Cost]]:
        def keep(iteration: int, images: Tensor, kept: Tensor) -> None:
            pixels[name] = images.clone()

        count = at[-1] + variant.early + LAST_STEPS if variant.sparse else DENSE_STEPS
        loop, schedule = variant.loop(case), variant.schedule(short)
        return partial(costs, loop, schedule, count, variant.early, keep)

    fewest = stops.counts(case.vit.patch_embed.num_patches)[-1]
    rows = len(case.targets) * (fewest + case.vit.num_prefix_tokens)
    contenders: dict[str, Callable[[], Any]] = {
        **{name: contender(name, variant) for name, variant in VARIANTS.items()},
        "sgemm_square": sgemm(SQUARE),
        "sgemm_block_shapes": sgemm(block_shapes(case.vit, rows)),
    }
    # The first steps of a process are slow: not counted, they show that the images are the same.
    for name in ("published_dense", "our_dense"):
        contenders[name]()
    agreeing = agreement(pixels["published_dense"], pixels["our_dense"])
    return alternate(contenders, rounds), agreeing


def measure(case: Case, iterations: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times and work of every variant for one model, and the ratios between them."""
    stops, patches = StopSchedule.scaled(iterations), case.vit.patch_embed.num_patches
    timed, agreeing = time_blocks(case, stops, rounds)
    phases = schedule_phases(stops, iterations, patches)
    fewest, batch = phases[-1][0], len(case.targets)
    wholes: dict[str, list[float]] = {}
    variants = {}
    for name, variant in VARIANTS.items():
        own_phases = phases if variant.sparse else [(patches, iterations)]
        wholes[name] = [whole_seconds(own_phases, cost) for cost in timed[name]]
        variants[name] = {
            "whole_seconds": spread(wholes[name]),
            "images_per_hour": rounded(batch * 3600 / median(wholes[name])),
            "steps": [
                {"patches": kept, "iterations": count, **_step(case, kept, timed, name)}
                for kept, count in own_phases
            ],
        }

    def typical(name: str, kept: int) -> list[float]:
        return [cost[kept].typical for cost in timed[name]]

    return {
        "batch": batch,
        "sgemm_gflops": {
            "square": spread(timed["sgemm_square"]),
            f"block_at_{fewest}_patches": spread(timed["sgemm_block_shapes"]),
        },
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
        "dense_images_agree": agreeing,
    }


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _step(case: Case, kept: int, timed: dict[str, list[Any]], name: str) -> dict[str, Any]:
    """What a variant's step costs in one phase; shares are of the sgemm of the same round."""
    cost = [phases[kept] for phases in timed[name]]
    gflop = needed_flops(case.vit, len(case.targets), kept) / 1e9
    speeds = [gflop / c.typical for c in cost]
    return {
        "seconds": spread([c.typical for c in cost]),
        "early_steps": len(cost[0].early),
        "early_seconds": spread([sum(c.early) for c in cost]),
        "needed_gflop": rounded(gflop),
        "gflops": spread(speeds),
        "share_of_sgemm": spread(_ratios(speeds, timed["sgemm_square"])),
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
    run = variant.loop(case)
    schedule, count = (StopSchedule((2, 3, 4, 5)), 6) if variant.sparse else (Dense(), 2)
    return peak(lambda: run(schedule, count, lambda *_: None))


def memory(model: str) -> dict[str, Any]:
    """Peak memory of every variant, and its share of the published dense one's."""
    peaks = {name: in_a_process_of_its_own(peak_memory, model, name) for name in VARIANTS}
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
