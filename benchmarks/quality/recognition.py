"""How many inverted images independent networks recognise, by what the optimiser moves.

The embedded teacher is inverted with the published recipe (pixels) and with ``recipes.clear``
(Fourier), dense and sparse. Two judges (see ``fashion_canvas/train_cnns.py``) took no part. They
see the whole images, and the kept patches over their own mean colour.

A contender whose settings are those of the recorded result is not measured again. To measure all of
them, remove ``results/quality.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.fashion_canvas.data import CLASSES, TEST_SEED, canvases, normalise
from benchmarks.fashion_canvas.train_teacher import accuracy
from benchmarks.harness.environment import record, result_file
from benchmarks.quality.class_accuracy import share_reached
from benchmarks.quality.images import Contender, Run, images_of, make
from benchmarks.quality.verdicts import (
    features,
    load_judges,
    over_seeds,
    verdict,
    within_class,
)
from smi_fast import Dense, Schedule, SparseViT, StopSchedule, load_teacher, recipes
from smi_fast.background import over
from smi_fast.ops.grid import patch_mask

SEEDS = (0, 1, 2)
PER_CLASS = 4
# Ours also have the shortest runs, since they are recognised early; the published recipe has the
# longest, its own. Long runs take most of the time, so they come last.
SHORTEST, SHORT, LONG = (5, 10, 15), (25, 50, 100, 200, 400), (1000, 4000)
# Patches that ours keeps, of 64.
KEPT = (14, 30)


def published_stops(iterations: int) -> Schedule:
    """The published stops at the same shares of the run, at least an iteration apart."""
    shares = enumerate((1, 2, 4, 6), start=1)
    at = tuple(max(iterations * eightieths // 80, i) for i, eightieths in shares)
    return StopSchedule(at, (0.3,) * 4)


def published(iterations: int) -> dict[str, Any]:
    return recipes.smi().options(iterations=iterations, schedule=published_stops(iterations))


def published_dense(iterations: int) -> dict[str, Any]:
    return recipes.smi().options(iterations=iterations, schedule=Dense())


def clear(iterations: int, keep: float, at: float) -> dict[str, Any]:
    schedule = StopSchedule.once(iterations, keep=keep, at=at)
    return recipes.clear().options(iterations=iterations, schedule=schedule)


def clear_dense(iterations: int) -> dict[str, Any]:
    return recipes.clear().options(iterations=iterations, schedule=Dense())


CONTENDERS = {
    "published, dense": Contender(options=published_dense, longest=LONG[-1]),
    "published, 14 of 64 patches": Contender(options=published),
    "clear, dense": Contender(options=clear_dense, longest=LONG[0]),
    "clear, 30 of 64 patches": Contender(options=partial(clear, keep=0.47, at=0.1)),
    "clear, 14 of 64 patches": Contender(options=partial(clear, keep=0.22, at=0.05)),
}


def lengths_of(name: str) -> tuple[int, ...]:
    return (*SHORTEST, *SHORT, LONG[0]) if name.startswith("clear") else (*SHORT, *LONG)


def settings_of(contender: Contender) -> dict[str, str]:
    """What decides the images of a contender, as text."""
    return {name: str(value) for name, value in contender.options(SHORT[-1]).items()}


def runs() -> Iterator[Run]:
    """All runs, those of few iterations first."""
    for long in (False, True):
        for name, contender in CONTENDERS.items():
            for seed in SEEDS:
                for length in lengths_of(name):
                    if (length in LONG) == long:
                        yield Run(name, contender, length, seed, PER_CLASS)


@torch.no_grad()
def real_canvases(
    judges: dict[str, nn.Sequential], last: int | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy of each judge on real canvases, and their distance within a class."""
    images, labels, _ = canvases("t10k", seed=TEST_SEED, last=last)
    right = {name: round(accuracy(judge, images, labels), 4) for name, judge in judges.items()}
    distances = {}
    for name, judge in judges.items():
        found = torch.cat([features(judge, part) for part in images.split(500)])
        distances[name] = round(within_class(found, labels), 4)
    return right, distances


@torch.no_grad()
def real_canvases_of_kept_patches(
    teacher: SparseViT, judges: dict[str, nn.Sequential], last: int | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy on real canvases of which the teacher's most important patches are shown.

    The rest has their mean colour, as for the judges of kept patches. The teacher sees the patches
    alone.
    """
    images, labels, _ = canvases("t10k", seed=TEST_SEED, last=last)
    importance = torch.cat(
        [teacher(normalise(part), importance=True).importance for part in images.split(500)]
    )
    found: dict[str, dict[str, float]] = {}
    for count in KEPT:
        kept = importance.topk(count, dim=1).indices.sort(dim=1).values
        shown = over(images, patch_mask(kept, *teacher.grid), "mean")
        logits = torch.cat(
            [
                teacher(normalise(part), patches).logits
                for part, patches in zip(images.split(500), kept.split(500), strict=True)
            ]
        )
        found[str(count)] = {
            **{name: round(accuracy(judge, shown, labels), 4) for name, judge in judges.items()},
            "teacher": share_reached(logits, labels),
        }
    return found


def measure(quick_run: Run | None = None) -> dict[str, Any]:
    """Make the images of all runs, or of one, and judge them."""
    teacher, judges = SparseViT(load_teacher("fashion-canvas")), load_judges()
    recorded = {} if quick_run else _recorded()
    chosen = [quick_run] if quick_run else [run for run in runs() if run.name not in recorded]
    make(teacher, chosen)
    last = 500 if quick_run else None
    right, distances = real_canvases(judges, last)
    contenders: dict[str, Any] = {}
    for name, contender in CONTENDERS.items():
        own = [run for run in chosen if run.name == name]
        if own:
            contenders[name] = _judged(teacher, judges, distances, own)
            contenders[name]["settings"] = settings_of(contender)
        elif name in recorded:
            contenders[name] = recorded[name]
    return {
        "seeds": [quick_run.seed] if quick_run else SEEDS,
        "images_per_seed": len(CLASSES) * (quick_run.per_class if quick_run else PER_CLASS),
        "real_canvases": right,
        "real_canvases_of_kept_patches": real_canvases_of_kept_patches(teacher, judges, last),
        "distance_within_a_class_of_real_canvases": distances,
        "contenders": contenders,
    }


def _recorded() -> dict[str, Any]:
    """The contenders of the recorded result whose settings and lengths are today's."""
    path = result_file("quality.json")
    found = json.loads(path.read_text())["contenders"] if path.exists() else {}
    return {
        name: found[name]
        for name, contender in CONTENDERS.items()
        if name in found
        and found[name]["settings"] == settings_of(contender)
        and set(found[name]["by_length"]) == {str(length) for length in lengths_of(name)}
    }


def _judged(
    teacher: SparseViT,
    judges: dict[str, nn.Sequential],
    distances: dict[str, float],
    runs: list[Run],
) -> dict[str, Any]:
    """Verdicts on the runs of one contender, by length, and the commits that made the images."""
    commits, by_length = set(), {}
    for length in sorted({run.iterations for run in runs}):
        made = [images_of(teacher, run) for run in runs if run.iterations == length]
        commits |= {images.commit for images in made}
        verdicts = [verdict(judges, distances, images) for images in made]
        kept = int(made[0].masks[0].sum())
        by_length[str(length)] = {"kept_patches": kept, **over_seeds(verdicts)}
    return {"images_made_at": sorted(commits), "by_length": by_length}


def main(quick: bool = False) -> None:
    name = "clear, 30 of 64 patches"
    run = Run(name, CONTENDERS[name], 25, 0, 1) if quick else None
    record("quality", measure(run), quick=quick)
