"""The loops that the benchmarks compare, on DeiT's geometry with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.baselines import published_loop as published
from smi_fast import Dense, SparseInverter, SparseViT, StopSchedule
from smi_fast.jitter import random_jitter
from smi_fast.ops.backends import AUTO
from smi_fast.schedules import Schedule

BATCHES = {"deit_tiny": 8, "deit_small": 8, "deit_base": 4}
Callback = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Case:
    """A model and one batch of targets and first pixels."""

    vit: VisionTransformer
    targets: Tensor
    init: Tensor
    mean: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_STD

    def jitter(self, iterations: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return random_jitter(iterations, self.vit.patch_embed.img_size, generator)


def deit(name: str) -> Case:
    """One of :data:`BATCHES`, 224 px. The weights are random: what they are costs no time."""
    torch.manual_seed(0)
    vit, batch = timm.create_model(f"{name}_patch16_224").eval(), BATCHES[name]
    return Case(vit, torch.arange(batch), torch.randn(batch, 3, 224, 224))


# Runs iterations of a schedule, with a callback after each.
Loop = Callable[[Schedule, int, Callback], None]


def published_loop(case: Case) -> Loop:
    def run(schedule: Schedule, iterations: int, callback: Callback) -> None:
        published.invert(
            case.vit,
            case.targets,
            init=case.init,
            jitter=case.jitter(iterations),
            schedule=schedule,
            iterations=iterations,
            mean=case.mean,
            std=case.std,
            callback=callback,
        )

    return run


def our_loop(case: Case, backend: str = AUTO, background: str = "frozen") -> Loop:
    teacher = SparseViT(case.vit, backend=backend)
    with torch.no_grad():
        teacher(case.init[:1])  # folds its weights, once

    def run(schedule: Schedule, iterations: int, callback: Callback) -> None:
        inverter = SparseInverter(
            teacher,
            schedule=schedule,
            iterations=iterations,
            mean=case.mean,
            std=case.std,
            background=background,
            backend=backend,
        )
        inverter.invert(
            case.targets,
            init=case.init,
            jitter=case.jitter(iterations),
            progress=False,
            callback=callback,
        )

    return run


def reference_loop(case: Case) -> Loop:
    """Ours with every op as plain PyTorch."""
    return our_loop(case, backend="reference")


@dataclass(frozen=True)
class Variant:
    """A loop, whether patches stop in it, and the steps after which a phase runs at its pace."""

    loop: Callable[[Case], Loop]
    sparse: bool
    early: int = 1

    def schedule(self, stops: StopSchedule) -> Schedule:
        return stops if self.sparse else Dense()


# From the published dense loop to ours, each sparse one with something more than the one before.
VARIANTS = {
    "published_dense": Variant(published_loop, sparse=False),
    "published_sparse": Variant(published_loop, sparse=True),
    "reference_sparse": Variant(reference_loop, sparse=True),
    "our_dense": Variant(our_loop, sparse=False),
    "our_sparse": Variant(our_loop, sparse=True, early=13),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of a phase's early steps, in which it drops patches and prepares, and of the others.

    Attributes:
        early: of each early step.
        typical: the median of the others; of the last step where all are early.
    """

    early: tuple[float, ...]
    typical: float

    def whole(self, iterations: int) -> float:
        """Seconds of a phase of so many iterations."""
        early = self.early[:iterations]
        return sum(early) + (iterations - len(early)) * self.typical


def costs(
    run: Loop, schedule: Schedule, iterations: int, early: int = 1, last: Callback | None = None
) -> dict[int, Cost]:
    """What the steps of each phase cost, by the number of kept patches."""
    steps: dict[int, list[float]] = {}
    before = time.perf_counter()

    def clock(iteration: int, images: Tensor, kept: Tensor) -> None:
        nonlocal before
        now = time.perf_counter()
        steps.setdefault(kept.shape[1], []).append(now - before)
        if last is not None and iteration == iterations - 1:
            last(iteration, images, kept)
        before = time.perf_counter()

    run(schedule, iterations, clock)
    return {
        patches: Cost(tuple(phase[:early]), median(phase[early:] or phase[-1:]))
        for patches, phase in steps.items()
    }
