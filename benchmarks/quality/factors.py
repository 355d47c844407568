"""One factor at a time between the published recipe and the default: who recognises the images.

Each row differs from the published recipe, or from the default, in what its name says. The seeds
took no part in the choice of the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.environment import record
from benchmarks.quality.images import Contender, Run, images_of, make
from benchmarks.quality.independent_judge import WEIGHT
from benchmarks.quality.recognition import published_stops, real_canvases
from benchmarks.quality.verdicts import load_judges, over_seeds, verdict
from smi_fast import (
    BatchNormMatching,
    CrossEntropy,
    Dense,
    Fourier,
    Pixels,
    Pyramid,
    SparseInverter,
    SparseViT,
    StopSchedule,
    TotalVariation,
    load_cnn,
    load_teacher,
    recipes,
)
from smi_fast.jitter import Jitter
from smi_fast.objectives.targets import soft_targets

ITERATIONS = 100
SEEDS = (21, 22, 23)
PER_CLASS = 4
# Standard deviation of u, of which pixels are the sigmoid, where images start nearly grey.
QUIET = 0.02

Options = dict[str, Any]
Arguments = Callable[[SparseInverter, Tensor, torch.Generator], Options]


def grey(inverter: SparseInverter, targets: Tensor, generator: torch.Generator) -> Options:
    """Start pixels from the nearly uniform grey that Fourier starts from."""
    space = inverter.settings.space
    shape = (len(targets), space.channels, space.height, space.width)
    u = QUIET * torch.randn(shape, generator=generator)
    return {"init": space.normalize(torch.sigmoid(u))}


def soft(inverter: SparseInverter, targets: Tensor, generator: torch.Generator) -> Options:
    classes = inverter.teacher.num_classes
    return {"targets": soft_targets(targets, classes, generator=generator)}


def mixed(inverter: SparseInverter, targets: Tensor, generator: torch.Generator) -> Options:
    """Give 30 % of each target to another class, which is drawn for each image."""
    classes = inverter.teacher.num_classes
    step = torch.randint(1, classes, targets.shape, generator=generator)
    wanted, other = (
        torch.nn.functional.one_hot(labels, classes).float()
        for labels in (targets, (targets + step) % classes)
    )
    return {"targets": 0.7 * wanted + 0.3 * other}


def textured(inverter: SparseInverter, targets: Tensor, generator: torch.Generator) -> Options:
    """Start from 1/f noise around a colour of its own for each image."""
    space = inverter.settings.space
    noise = Fourier(decay=1.5, start=1.0).bind(space)
    return {"init": noise.images(noise.initial(len(targets), generator))}


PUBLISHED: Options = recipes.smi().options(iterations=ITERATIONS, schedule=Dense())
DEFAULT: Options = recipes.clear().options(iterations=ITERATIONS, schedule=Dense())
ENTROPY = [CrossEntropy()]
TV = [CrossEntropy(), TotalVariation(per_image=False)]
PRIOR = BatchNormMatching(load_cnn("fashion-canvas"), weight=WEIGHT)

# What each row changes: options, and arguments of ``invert``.
FROM_PUBLISHED: dict[str, tuple[Options, Arguments | None]] = {
    "published": ({}, None),
    "published, grey start": ({}, grey),
    "published, TV off": ({"objectives": ENTROPY}, None),
    "published, lr 0.05": ({"lr": 0.05}, None),
    "published, grey start, TV off": ({"objectives": ENTROPY}, grey),
    "published, grey start, TV off, lr 0.05": ({"objectives": ENTROPY, "lr": 0.05}, grey),
    "published, BatchNorm matching": ({"objectives": [*TV, PRIOR]}, None),
    "published, Fourier": ({"parametrization": Fourier(start=1.0, colour=False)}, None),
    "published, Fourier, grey start": ({"parametrization": Fourier(colour=False)}, None),
    "published, jitter of each image": ({"jitter": Jitter(per_image=True)}, None),
}
FROM_DEFAULT: dict[str, tuple[Options, Arguments | None]] = {
    "default": ({}, None),
    "default, pixels": ({"parametrization": Pixels()}, None),
    "default, pixels, grey start": ({"parametrization": Pixels()}, grey),
    "default, start with contrast 1": ({"parametrization": Fourier(start=1.0)}, None),
    "default, TV on": ({"objectives": TV}, None),
    "default, lr 0.05": ({"lr": 0.05}, None),
    "default, lr 0.2": ({"lr": 0.2}, None),
    "default, lr 0.4": ({"lr": 0.4}, None),
    "default, decay 0": ({"parametrization": Fourier(decay=0.0)}, None),
    "default, decay 1": ({"parametrization": Fourier(decay=1.0)}, None),
    "default, decay 2": ({"parametrization": Fourier(decay=2.0)}, None),
    "default, red, green and blue": ({"parametrization": Fourier(colour=False)}, None),
    "default, flat below 1/16": ({"parametrization": Fourier(flat_below=1 / 16)}, None),
    "default, pyramid": ({"parametrization": Pyramid()}, None),
    "default, BatchNorm matching": ({"objectives": [*ENTROPY, PRIOR]}, None),
    "default, no jitter": ({"jitter": Jitter(share=0, flip=False)}, None),
    "default, one jitter for the batch": ({"jitter": Jitter()}, None),
    "default, soft targets": ({}, soft),
    "default, mixed targets": ({}, mixed),
    "default, textured start": ({}, textured),
}
ONE_STOP = StopSchedule.once(ITERATIONS)
SCHEDULES = {
    "default, not compact": StopSchedule(ONE_STOP.at, ONE_STOP.drop),
    "default, published stops": published_stops(ITERATIONS),
    "default, published stops, compact": StopSchedule.scaled(ITERATIONS, compact=True),
    **{
        f"default, keep {patches} from {at:.0%}": StopSchedule.once(ITERATIONS, keep=keep, at=at)
        for patches, keep in ((14, 0.22), (21, 0.33), (30, 0.47))
        for at in (0.05, 0.1, 0.25)
        if (patches, at) != (30, 0.1)
    },
}


def _fixed(options: Options, iterations: int) -> Options:
    return {**options, "iterations": iterations}


def contenders() -> dict[str, dict[str, Contender]]:
    """The contenders, dense and sparse."""

    def rows(changes: Options) -> dict[str, Contender]:
        return {
            name: Contender(
                options=partial(_fixed, {**base, **changes, **options}), arguments=arguments
            )
            for base, table in ((PUBLISHED, FROM_PUBLISHED), (DEFAULT, FROM_DEFAULT))
            for name, (options, arguments) in table.items()
        }

    schedules = {
        name: Contender(options=partial(_fixed, {**DEFAULT, "schedule": schedule}))
        for name, schedule in SCHEDULES.items()
    }
    return {"sparse": {**rows({"schedule": ONE_STOP}), **schedules}, "dense": rows({})}


def runs(seeds: tuple[int, ...] = SEEDS, per_class: int = PER_CLASS) -> Iterator[Run]:
    for seed in seeds:
        for which, table in contenders().items():
            for name, contender in table.items():
                yield Run(f"{which}: {name}", contender, ITERATIONS, seed, per_class)


def main(quick: bool = False) -> None:
    teacher, judges = SparseViT(load_teacher("fashion-canvas")), load_judges()
    chosen = [*runs((SEEDS[0],), 1)][:2] if quick else [*runs()]
    make(teacher, chosen)
    right, distances = real_canvases(judges, 500 if quick else None)
    verdicts: dict[str, dict[str, list[dict[str, float]]]] = {}
    commits, kept = set(), {}
    for run in chosen:
        images = images_of(teacher, run)
        commits.add(images.commit)
        which, _, name = run.name.partition(": ")
        found = verdict(judges, distances, images)
        verdicts.setdefault(which, {}).setdefault(name, []).append(found)
        kept[run.name] = int(images.masks[0].sum())
    record(
        "factors",
        {
            "iterations": ITERATIONS,
            "seeds": sorted({run.seed for run in chosen}),
            "images_per_seed": len(chosen[0].wanted),
            "images_made_at": sorted(commits),
            "real_canvases": right,
            **{
                which: {
                    name: {"kept_patches": kept[f"{which}: {name}"], **over_seeds(found)}
                    for name, found in rows.items()
                }
                for which, rows in verdicts.items()
            },
        },
        quick=quick,
    )
