"""How an iteration of our sparse loop scales with threads, and which part of it doesn't."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.harness.environment import record
from benchmarks.harness.timing import alternate, ratios, rounded, spread
from benchmarks.speed.loops import BATCHES, QUICK_BATCH, Workload, deit
from benchmarks.speed.step_profile import ITERATIONS, QUICK_ITERATIONS, STOPS, measure
from smi_fast.engine.precision import BFLOAT16, FLOAT32

THREADS = (1, 2, 4, 8, 16)
ROUNDS, QUICK_ROUNDS = 3, 1
METHOD = (
    "Each round profiles the iterations behind the last stop once for each number of threads, "
    "which take turns. speedup is the time of one thread over that of more in the same round, of "
    "the whole iteration and of each kind of op; on_paper is Amdahl's law for each kind, with the "
    "serial share that its speedup by the most threads shows."
)


def with_threads(count: int, workload: Workload, iterations: int, precision: str) -> dict[str, Any]:
    """What :func:`benchmarks.speed.step_profile.measure` finds with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return measure(workload, STOPS, iterations, precision)
    finally:
        torch.set_num_threads(before)


def parts(profiled: dict[str, Any]) -> dict[str, float]:
    """Seconds of an iteration, whole and by kind of op."""
    whole = profiled["seconds_per_step"]
    return {"whole": whole, **{kind: share * whole for kind, share in profiled["shares"].items()}}


def on_paper(one: dict[str, float], most: dict[str, float], measured: int, threads: int) -> float:
    """The speedup of an iteration by more threads than were measured.

    Args:
        one: seconds of each part with one thread.
        most: likewise with the most measured threads.
        measured: how many these are, from 2.
        threads: for how many to compute it.
    """
    seconds = 0.0
    for kind, alone in one.items():
        if kind != "whole":
            # Amdahl: a share of the part doesn't scale.
            serial = min(max((most[kind] / alone - 1 / measured) / (1 - 1 / measured), 0.0), 1.0)
            seconds += alone * (serial + (1 - serial) / threads)
    return one["whole"] / seconds


def scaling(
    workload: Workload, counts: tuple[int, ...], iterations: int, rounds: int, precision: str
) -> dict[str, Any]:
    """Seconds and speedups of an iteration by the number of threads."""

    def contender(count: int) -> Any:
        return lambda: parts(with_threads(count, workload, iterations, precision))

    found = alternate({str(count): contender(count) for count in counts}, rounds)
    one = found["1"]
    medians = {
        count: {kind: spread([row[kind] for row in rows])["median"] for kind in rows[0]}
        for count, rows in found.items()
    }
    speedups = {
        count: {
            kind: spread(ratios([row[kind] for row in one], [row[kind] for row in rows]))
            for kind in rows[0]
        }
        for count, rows in found.items()
    }
    most = counts[-1]
    beyond = [count for count in THREADS if count > most] if most > 1 else []
    return {
        "batch": len(workload.targets),
        "seconds": {count: rounded(row["whole"]) for count, row in medians.items()},
        "speedup": speedups,
        "on_paper": {
            str(count): rounded(on_paper(medians["1"], medians[str(most)], most, count))
            for count in beyond
        },
    }


def main(quick: bool = False) -> None:
    cores = len(os.sched_getaffinity(0))
    counts = tuple(count for count in THREADS if count <= cores)
    batches = {"deit_tiny": QUICK_BATCH} if quick else BATCHES
    iterations, rounds = (QUICK_ITERATIONS, QUICK_ROUNDS) if quick else (ITERATIONS, ROUNDS)
    models: dict[str, Any] = {}
    for name, batch in batches.items():
        workload = deit(name, batch)
        models[name] = {
            precision: scaling(workload, counts, iterations, rounds, precision)
            for precision in (FLOAT32, BFLOAT16)
        }
    record("scaling", {"method": METHOD, "rounds": rounds, "models": models}, quick=quick)
