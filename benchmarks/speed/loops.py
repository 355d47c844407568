"""The loops that the benchmarks compare, on DeiT's shapes with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.baselines import published_loop as published
from smi_fast import SparseInverter, SparseViT, StopSchedule, recipes
from smi_fast.engine.precision import BFLOAT16, FLOAT32
from smi_fast.jitter import Jitter
from smi_fast.ops.backends import AUTO
from smi_fast.recipes import Recipe
from smi_fast.schedules import sizes_of

BATCHES = {"deit_tiny": 8, "deit_small": 8, "deit_base": 4}
QUICK_BATCH = 2
NO_STOPS = StopSchedule((), ())

# Called with (iteration, images, kept) after each iteration.
Callback = Callable[[int, Tensor, Tensor], None]
# Runs a number of iterations with the given stops.
Loop = Callable[[StopSchedule, int, Callback], None]


@dataclass(frozen=True)
class Workload:
    """A model, and one batch of targets and first images."""

    vit: VisionTransformer
    targets: Tensor
    init: Tensor
    mean: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_STD

    @property
    def patches(self) -> int:
        return int(self.vit.patch_embed.num_patches)

    def jitter(self, iterations: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return Jitter().draw(iterations, self.vit.patch_embed.img_size, generator=generator)


def deit(name: str, batch: int) -> Workload:
    """A DeiT at 224 px. Its weights are random, since the time doesn't depend on them."""
    torch.manual_seed(0)
    vit = timm.create_model(f"{name}_patch16_224").eval()
    return Workload(vit, torch.arange(batch), torch.randn(batch, 3, 224, 224))


def published_loop(workload: Workload) -> Loop:
    """The yardstick."""

    def run(stops: StopSchedule, iterations: int, callback: Callback) -> None:
        published.invert(
            workload.vit,
            workload.targets,
            init=workload.init,
            jitter=workload.jitter(iterations),
            stops=stops.at,
            drop=stops.drop,
            iterations=iterations,
            mean=workload.mean,
            std=workload.std,
            callback=callback,
        )

    return run


def our_loop(
    workload: Workload,
    backend: str = AUTO,
    background: str = "frozen",
    recipe: Recipe = recipes.smi(),  # noqa: B008
    narrow: Mapping[int, float] | None = None,
    precision: str = FLOAT32,
) -> Loop:
    """smi_fast's loop."""
    teacher = SparseViT(workload.vit, backend=backend, narrow=narrow, precision=precision)
    with torch.no_grad():
        teacher(workload.init[:1])  # The first forward pass folds the weights.

    def run(stops: StopSchedule, iterations: int, callback: Callback) -> None:
        options = recipe.options(schedule=stops, iterations=iterations)
        inverter = SparseInverter(
            teacher,
            mean=workload.mean,
            std=workload.std,
            background=background,
            backend=backend,
            **options,
        )
        size = sizes_of(inverter.schedule, teacher.image_size, teacher.patch_size)[0]
        inverter.invert(
            workload.targets,
            init=F.interpolate(workload.init, size),
            jitter=workload.jitter(iterations),
            progress=False,
            callback=callback,
        )

    return run


def reference_loop(workload: Workload) -> Loop:
    """smi_fast's loop with every op in plain PyTorch."""
    return our_loop(workload, backend="reference")


@dataclass(frozen=True)
class Variant:
    """A loop to compare.

    Attributes:
        loop: makes the loop for a workload.
        sparse: whether patches stop.
        early: first iterations of each phase that are timed apart, because they cost more.
    """

    loop: Callable[[Workload], Loop]
    sparse: bool
    early: int = 1

    def stops(self, stops: StopSchedule) -> StopSchedule:
        """The stops that this loop runs with, when the sparse loops have ``stops``."""
        return stops if self.sparse else NO_STOPS


# From the published dense loop to ours. Each sparse loop adds techniques to the one before it. Our
# sparse loop packs its weights in the 13th iteration of a phase.
VARIANTS = {
    "published_dense": Variant(published_loop, sparse=False),
    "published_sparse": Variant(published_loop, sparse=True),
    "reference_sparse": Variant(reference_loop, sparse=True),
    "our_dense": Variant(our_loop, sparse=False),
    "our_sparse": Variant(our_loop, sparse=True, early=13),
    "our_sparse_bfloat16": Variant(partial(our_loop, precision=BFLOAT16), sparse=True, early=13),
}


@dataclass(frozen=True)
class PhaseSeconds:
    """Seconds that the iterations of one phase take.

    Attributes:
        early: the seconds of each early iteration, in which the loop drops patches, allocates
            memory and packs weights.
        typical: the median of the later iterations; the last iteration if all are early.
    """

    early: tuple[float, ...]
    typical: float

    def total(self, iterations: int) -> float:
        """Seconds of a phase that has ``iterations``."""
        early = self.early[:iterations]
        return sum(early) + (iterations - len(early)) * self.typical


def time_phases(
    run: Loop, stops: StopSchedule, iterations: int, early: int = 1, last: Callback | None = None
) -> dict[int, PhaseSeconds]:
    """Run a loop and time each phase; the keys are the numbers of kept patches.

    Args:
        run: the loop.
        stops: they divide the run into phases.
        iterations: of the run.
        early: first iterations of each phase that are timed apart.
        last: called after the last iteration.
    """
    seconds: dict[int, list[float]] = {}
    before = time.perf_counter()

    def clock(iteration: int, images: Tensor, kept: Tensor) -> None:
        nonlocal before
        now = time.perf_counter()
        seconds.setdefault(kept.shape[1], []).append(now - before)
        if last is not None and iteration == iterations - 1:
            last(iteration, images, kept)
        before = time.perf_counter()

    run(stops, iterations, clock)
    return {
        patches: PhaseSeconds(tuple(phase[:early]), median(phase[early:] or phase[-1:]))
        for patches, phase in seconds.items()
    }
