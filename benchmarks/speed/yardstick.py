"""How far the yardstick is from the published code, iteration by iteration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.baselines import published_code
from benchmarks.harness.environment import record
from benchmarks.harness.timing import alternate, ratios, spread
from benchmarks.speed.loops import (
    BATCHES,
    NO_STOPS,
    QUICK_BATCH,
    Callback,
    Loop,
    Workload,
    deit,
    published_loop,
    time_phases,
)
from smi_fast import StopSchedule

# Each phase has this many iterations, of which the first is left out.
PHASE = 5
STOPS = StopSchedule(tuple(PHASE * number for number in (1, 2, 3, 4)))
ROUNDS, QUICK_ROUNDS = 5, 1
OURS, THEIRS = "yardstick", "published code"
METHOD = (
    "Each round runs the published code and the yardstick once, dense and sparse, with random "
    "weights and no prior network. The time of a phase is the median of its iterations without the "
    "first. A ratio is the published code's time over the yardstick's in the same round."
)


def published_code_loop(checkout: Path, name: str, workload: Workload) -> Loop:
    teacher = published_code.teacher_of(checkout, f"{name}_patch16_224")

    def run(stops: StopSchedule, iterations: int, callback: Callback) -> None:
        published_code.invert(
            checkout,
            teacher,
            workload.targets,
            stops=stops.at,
            drop=stops.drop,
            iterations=iterations,
            mean=workload.mean,
            std=workload.std,
            callback=callback,
        )

    return run


def measure(checkout: Path, name: str, batch: int, rounds: int) -> dict[str, Any]:
    """The seconds of an iteration of both, by kept patches, and their ratios."""
    workload = deit(name, batch)
    loops = {
        THEIRS: published_code_loop(checkout, name, workload),
        OURS: published_loop(workload),
    }
    found = {}
    for stops in (NO_STOPS, STOPS):
        iterations = PHASE * (len(stops.at) + 1)
        contenders = {
            each: partial(time_phases, loop, stops, iterations) for each, loop in loops.items()
        }
        blocks = alternate(contenders, rounds)
        for patches in blocks[OURS][0]:
            seconds = {
                each: [block[patches].typical for block in own] for each, own in blocks.items()
            }
            found["dense" if stops is NO_STOPS else f"{patches} patches"] = {
                **{each: spread(values) for each, values in seconds.items()},
                "ratio": spread(ratios(seconds[THEIRS], seconds[OURS])),
            }
    return {"batch": batch, "phases": found}


def main(quick: bool = False, *, checkout: Path) -> None:
    published_code.check(checkout)
    names = {"deit_tiny": QUICK_BATCH} if quick else BATCHES
    rounds = QUICK_ROUNDS if quick else ROUNDS
    models = {name: measure(checkout, name, batch, rounds) for name, batch in names.items()}
    record("yardstick", {"method": METHOD, "rounds": rounds, "models": models}, quick=quick)
