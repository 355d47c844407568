"""What uneven batches cost: images with numbers of patches of their own, and places that are
filled again when images are finished early.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.environment import record
from benchmarks.harness.timing import alternate, ratios, rounded, spread
from benchmarks.schedules.contenders import FINISH
from benchmarks.speed.loops import QUICK_BATCH, Workload, deit
from smi_fast import (
    EarlyFinish,
    InversionResult,
    Selection,
    SparseInverter,
    SparseViT,
    load_teacher,
    recipes,
)
from smi_fast.inversion import InversionState

BATCHES, ROUNDS = {"deit_tiny": 8, "deit_small": 8}, 9
QUICK_BATCHES, QUICK_ROUNDS = {"deit_tiny": QUICK_BATCH}, 1
# The mean number of patches of an image, that of the last phase of the published stops.
KEPT = 46
# The engine packs its weights in the thirteenth iteration.
WARM, TIMED = 14, 6
RECIPES = {"published": recipes.smi, "default": recipes.clear}
ITERATIONS, REFILLED_ROUNDS = 100, 5
# DeiT's bound, as a share of the median probability after 40 iterations, which has no jitter.
SHARE_REACHED, IN_A_ROW = 0.6, 5
# (images, places) of each teacher.
REFILLED = {"fashion-canvas": (400, 40), "deit_tiny": (40, 8)}
QUICK_REFILLED = {"fashion-canvas": (8, 4)}
METHOD = (
    "ragged: an iteration in which the images of a batch keep from half to one and a half times "
    "46 patches over one in which each keeps 46; medians of six iterations in turn. "
    "refilled: a run whose images leave when the teacher is sure of them, over the same "
    "iterations of each image at the price that they have in a run of one full batch, in turn. "
    "DeiT has random weights: it is sure at 0.6 times the median probability of its images after "
    "40 iterations."
)


def lengths(batch: int, mean: int) -> Tensor:
    """int64 [batch], evenly from half of a number to one and a half times it."""
    return torch.linspace(0.5 * mean, 1.5 * mean, batch, dtype=torch.float64).round().long()


def state(workload: Workload, recipe: str, counts: Tensor) -> InversionState:
    """A state behind its stop, after warm-up iterations.

    Args:
        workload: the teacher and first images.
        recipe: a key of RECIPES.
        counts: int64 [B], patches that each image keeps.
    """
    options = RECIPES[recipe]().options(iterations=10_000)
    inverter = SparseInverter(
        SparseViT(workload.vit), mean=workload.mean, std=workload.std, **options
    )
    generator = torch.Generator().manual_seed(0)
    found = inverter.start(workload.targets, generator=generator)
    width = int(counts.max())
    order = torch.rand(len(counts), workload.patches, generator=generator).argsort(dim=1)
    # What an image keeps comes first, ascending, and then its padding.
    behind = (torch.arange(width) >= counts[:, None]) * workload.patches
    places = (order[:, :width] + behind).sort(dim=1).values % workload.patches
    alike = bool((counts == width).all())
    found.keep(Selection(places, lengths=None if alike else counts))
    for _ in range(WARM):
        found.step()
    return found


def iterations(of: InversionState) -> float:
    """The median seconds of some iterations."""
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        of.step()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def ragged_over_fixed(workload: Workload, recipe: str, rounds: int) -> dict[str, Any]:
    """The seconds of a ragged iteration over those of one with as many patches in each image."""
    uneven = lengths(len(workload.targets), KEPT)
    even = torch.full_like(uneven, round(uneven.double().mean().item()))
    contenders = {
        name: partial(iterations, state(workload, recipe, counts))
        for name, counts in {"ragged": uneven, "fixed": even}.items()
    }
    found = alternate(contenders, rounds)
    return {
        "lengths": uneven.tolist(),
        "milliseconds": spread([1e3 * seconds for seconds in found["ragged"]]),
        "over_fixed": spread(ratios(found["ragged"], found["fixed"])),
    }


def inversion(inverter: SparseInverter, images: int) -> Callable[[], InversionResult]:
    """A contender that inverts the first classes in turn."""
    wanted = torch.arange(images) % inverter.teacher.num_classes

    def run() -> InversionResult:
        generator = torch.Generator().manual_seed(0)
        return inverter.invert(wanted, generator=generator, progress=False)

    return run


def price(result: InversionResult, ages: Sequence[int], stop: int) -> float:
    """Seconds of images that receive ``ages`` iterations, as they were in a run with one stop."""
    early, late = (
        phase.seconds / (phase.iterations * len(result.images)) for phase in result.timing
    )
    return sum(stop * early + (age - stop) * late for age in ages)


def refilled_over_full(name: str, images: int, places: int, rounds: int) -> dict[str, Any]:
    """What refilling adds to a run."""
    teacher, options = _teacher(name), recipes.clear().options(iterations=ITERATIONS)
    full = SparseInverter(teacher, **options)
    finish = FINISH if name == "fashion-canvas" else _reached(teacher, options, places)
    turnover = SparseInverter(teacher, finish=finish, max_batch=places, **options)
    (stop,) = turnover.schedule.at
    contenders = {"refilled": inversion(turnover, images), "full": inversion(full, places)}
    alternate(contenders, 1)
    found = alternate(contenders, rounds)
    ages = found["refilled"][0].ages.tolist()
    seconds = [result.seconds for result in found["refilled"]]
    prices = [price(result, ages, stop) for result in found["full"]]
    return {
        "finish": repr(finish),
        "images": images,
        "places": places,
        "iterations_of_an_image": rounded(sum(ages) / len(ages)),
        "seconds": spread(seconds),
        "over_full": spread(ratios(seconds, prices)),
    }


def _teacher(name: str) -> SparseViT:
    return SparseViT(load_teacher(name) if name == "fashion-canvas" else deit(name, 1).vit)


def _reached(teacher: SparseViT, options: dict[str, Any], images: int) -> EarlyFinish:
    """A bound that some images reach early, and some don't at all."""
    shorter = SparseInverter(teacher, **{**options, "iterations": 40})
    reached = inversion(shorter, images)().confidence.median().item()
    return EarlyFinish(SHARE_REACHED * reached, IN_A_ROW)


def main(quick: bool = False) -> None:
    batches, rounds = (QUICK_BATCHES, QUICK_ROUNDS) if quick else (BATCHES, ROUNDS)
    refilled = QUICK_REFILLED if quick else REFILLED
    refilled_rounds = QUICK_ROUNDS if quick else REFILLED_ROUNDS
    found = {
        "method": METHOD,
        "rounds": rounds,
        "ragged": {
            name: {
                recipe: ragged_over_fixed(deit(name, batch), recipe, rounds) for recipe in RECIPES
            }
            for name, batch in batches.items()
        },
        "refilled": {
            name: refilled_over_full(name, images, places, refilled_rounds)
            for name, (images, places) in refilled.items()
        },
    }
    record("uneven_batches", found, quick=quick)
