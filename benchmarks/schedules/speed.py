"""What schedules cost: seconds per image on DeiT's shapes, and the memory of an image."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.harness.environment import record
from benchmarks.harness.memory import in_new_process
from benchmarks.harness.timing import rounded
from benchmarks.schedules import deit
from benchmarks.schedules.contenders import CONTENDERS, DENSE
from benchmarks.schedules.timed import peak_memory
from benchmarks.speed.loops import QUICK_BATCH
from benchmarks.speed.loops import deit as workload

BATCHES, ITERATIONS, ROUNDS = {"deit_tiny": 8, "deit_small": 8}, 400, 5
# Images of the embedded teacher whose memory is measured.
IMAGES = 128
# A quick run measures these only. Each trajectory has a class, of which there are ten.
QUICK = (DENSE, "rebirth, v = 2")
QUICK_BATCHES, QUICK_ITERATIONS, QUICK_ROUNDS = {"deit_tiny": QUICK_BATCH}, 80, 1
QUICK_IMAGES = 20
MEMORY = (
    "Peak of resident bytes of a process of its own, in which the embedded teacher makes as many "
    "images with each schedule."
)


def memory(names: Iterable[str], images: int) -> dict[str, dict[str, float]]:
    """Peak memory of contenders for as many images, and its share of our dense loop's."""
    peaks = {name: in_new_process(peak_memory, name, images) for name in names}
    return {
        name: {"peak_mb": rounded(peak / 1e6), "share_of_dense": rounded(peak / peaks[DENSE])}
        for name, peak in peaks.items()
    }


def main(quick: bool = False) -> None:
    batches, iterations, rounds = (
        (QUICK_BATCHES, QUICK_ITERATIONS, QUICK_ROUNDS) if quick else (BATCHES, ITERATIONS, ROUNDS)
    )
    names = (deit.PUBLISHED_DENSE, *QUICK) if quick else tuple(deit.TIMINGS)
    models = {
        name: deit.measure(workload(name, batch), iterations, rounds, names)
        for name, batch in batches.items()
    }
    images = QUICK_IMAGES if quick else IMAGES
    found = {
        "method": deit.METHOD,
        "iterations": iterations,
        "rounds": rounds,
        "models": models,
        "memory_method": MEMORY,
        "images": images,
        "memory": memory(QUICK if quick else CONTENDERS, images),
    }
    record("schedule_speed", found, quick=quick)
