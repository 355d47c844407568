"""The ways to make a number of images, from the published dense loop to patch rebirth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.baselines import published_loop
from benchmarks.quality.recognition import published_stops
from smi_fast import (
    Dense,
    EarlyFinish,
    InversionResult,
    MassSchedule,
    PatchRebirth,
    ResolutionSchedule,
    Schedule,
    SparseInverter,
    SparseViT,
    StopSchedule,
    recipes,
)
from smi_fast.jitter import Jitter
from smi_fast.ops.grid import patch_mask
from smi_fast.teacher.space import ImageSpace

PUBLISHED_LENGTHS = (100, 400)
LENGTHS = (25, 50, 100, 200, 400)
# A long trajectory of rebirth gives several images, and so costs no more than a short one of dense.
REBIRTH_LENGTHS = (*LENGTHS, 1000)
SNAPSHOTS = 4
# Half of the tokens in the second half of the embedded teacher's six blocks.
NARROW = {3: 0.5}
# The teacher is sure of an image that is finished early. Others wait for its place among these.
FINISH, PLACES = EarlyFinish(0.9), 64


@dataclass(frozen=True, eq=False)
class Made:
    """What a run made; S = v · B images, those of one trajectory one after the other.

    Attributes:
        pixels: [S, 3, H, W] in [0, 1], whole.
        masks: bool [S, rows, columns], the patches that make up each image.
        logits: [S, classes], the teacher's, of these patches alone.
        wanted: int64 [S].
        updates: int64 [S], iterations that these patches received.
        patch_iterations: patches that the teacher computed for a trajectory, over all iterations.
    """

    pixels: Tensor
    masks: Tensor
    logits: Tensor
    wanted: Tensor
    updates: Tensor
    patch_iterations: int


# Makes images of targets [B], with the random numbers of a generator.
Run = Callable[[Tensor, torch.Generator], Made]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to make images.

    Attributes:
        prepare: makes a run of a teacher and a number of iterations; it isn't timed.
        images: v, images of a trajectory.
        lengths: iterations of the runs that are measured.
    """

    prepare: Callable[[VisionTransformer, int], Run]
    images: int = 1
    lengths: tuple[int, ...] = LENGTHS


def published(
    stops: Callable[[int], StopSchedule | Dense],
    reranked: bool,
    vit: VisionTransformer,
    iterations: int,
) -> Run:
    """The published-style loop, which shows the kept patches or its re-ranked mask."""
    schedule, teacher = stops(iterations), SparseViT(vit)
    mean, std = (vit.pretrained_cfg[name] for name in ("mean", "std"))
    space = ImageSpace(3, *teacher.image_size, torch.tensor(mean), torch.tensor(std))

    def run(targets: Tensor, generator: torch.Generator) -> Made:
        last: dict[str, Tensor] = {}
        computed = 0

        def callback(_: int, images: Tensor, kept: Tensor) -> None:
            nonlocal computed
            computed += kept.shape[1]
            last.update(images=images, kept=kept)

        published_loop.invert(
            vit,
            targets,
            init=torch.randn(len(targets), 3, *teacher.image_size, generator=generator),
            jitter=Jitter().draw(iterations, teacher.image_size, generator=generator),
            stops=schedule.at,
            drop=getattr(schedule, "drop", ()),
            iterations=iterations,
            mean=mean,
            std=std,
            callback=callback,
        )
        images, kept = last["images"], last["kept"]
        with torch.no_grad():
            pixels = space.denormalize(images)
            if reranked:
                kept = most_important(teacher, pixels, schedule.remaining)
            logits = teacher(images, kept).logits
        masks, updates = patch_mask(kept, *teacher.grid), torch.full((len(kept),), iterations)
        return Made(pixels, masks, logits, targets, updates, computed)

    return run


def most_important(teacher: SparseViT, pixels: Tensor, remaining: float) -> Tensor:
    """The published final mask, int64 [B, K]: of a dense forward pass of de-normalised images."""
    count = int((teacher.num_patches + teacher.num_prefix_tokens) * remaining)
    importance = teacher(pixels, importance=True).importance
    assert importance is not None
    return importance.topk(count, dim=1).indices.sort(dim=1).values


def ours(
    schedule: Callable[[int], Schedule],
    vit: VisionTransformer,
    iterations: int,
    narrow: Mapping[int, float] | None = None,
    finish: EarlyFinish | None = None,
) -> Run:
    """The default recipe with a schedule, with fewer tokens in deeper blocks where asked for, and
    with images that are finished early, whose places others take.

    The logits are always those of the whole network.
    """
    options = recipes.clear().options(iterations=iterations, schedule=schedule(iterations))
    if finish is not None:
        options |= {"finish": finish, "max_batch": PLACES}
    inverter, whole = SparseInverter(SparseViT(vit, narrow=narrow), **options), SparseViT(vit)
    space = inverter.settings.space

    def run(targets: Tensor, generator: torch.Generator) -> Made:
        result = inverter.invert(targets, generator=generator, progress=False)
        if result.lengths is not None:
            return ragged(result)
        found = result.sparse_images()
        assert found.targets is not None
        pixels, logits = found.canvases[found.trajectory], found.logits
        if narrow:
            with torch.no_grad():
                logits = whole(space.normalize(pixels), found.kept).logits
        return Made(
            pixels,
            found.masks,
            logits,
            found.targets,
            found.age,
            patch_iterations(result, inverter.schedule.at),
        )

    return run


def patch_iterations(result: InversionResult, at: Sequence[int]) -> int:
    """The patches that the teacher computed for a trajectory with stops, in the mean."""
    ends = (*at, result.ages.double().mean().item())
    lengths = [end - start for start, end in pairwise((0, *ends))]
    phases = zip(result.timing, lengths, strict=True)
    return round(sum(phase.patches * length for phase, length in phases))


def ragged(result: InversionResult) -> Made:
    """What a run with one ragged stop made; the last phase has the mean number of patches."""
    assert result.targets is not None and result.lengths is not None
    first, last = result.timing
    return Made(
        result.images,
        result.masks,
        result.logits,
        result.targets,
        torch.full_like(result.lengths, result.iterations),
        first.patches * first.iterations
        + round(result.lengths.double().mean().item() * last.iterations),
    )


def snapshots(count: int, vit: VisionTransformer, iterations: int) -> Run:
    """A dense run of the default recipe, of which images are taken when rebirth would take them."""
    options = recipes.clear().options(iterations=iterations, schedule=Dense())
    inverter = SparseInverter(vit, **options)
    teacher, space = inverter.teacher, inverter.settings.space
    at = (*PatchRebirth(count).bind(iterations).at, iterations)

    def run(targets: Tensor, generator: torch.Generator) -> Made:
        taken: list[Tensor] = []

        def callback(number: int, images: Tensor, kept: Tensor) -> None:
            if number + 1 in at:
                taken.append(images.clone())

        inverter.invert(targets, generator=generator, progress=False, callback=callback)
        images = torch.stack(taken, dim=1).flatten(0, 1)
        every = teacher.every_patch(len(images))
        with torch.no_grad():
            logits = teacher(images, every).logits
        return Made(
            space.denormalize(images),
            patch_mask(every, *teacher.grid),
            logits,
            targets.repeat_interleave(count),
            torch.tensor(at).repeat(len(targets)),
            teacher.num_patches * iterations,
        )

    return run


def dense(iterations: int) -> Dense:
    return Dense()


def rebirth(v: int, order: str, iterations: int) -> Schedule:
    return PatchRebirth(v, order=order)


def growing(keep: float, at: float, iterations: int) -> Schedule:
    """Half the side at first."""
    return ResolutionSchedule((32, 64), (max(1, round(at * iterations)),), keep)


def mass(iterations: int) -> Schedule:
    """A stop when the default has its own; the share is that of the default's patches, about."""
    return MassSchedule(0.6, at=StopSchedule.once(iterations).at)


def _published(schedule: Any, reranked: bool = False) -> Contender:
    prepare = partial(published, schedule, reranked)
    return Contender(prepare=prepare, lengths=PUBLISHED_LENGTHS)


def _rebirth(v: int, order: str = "importance") -> Contender:
    prepare = partial(ours, partial(rebirth, v, order))
    return Contender(prepare=prepare, images=v, lengths=REBIRTH_LENGTHS)


PUBLISHED_DENSE, DENSE, DEFAULT = "published, dense", "dense", "default"
CONTENDERS = {
    PUBLISHED_DENSE: _published(dense),
    "published, sparse": _published(published_stops),
    "published, sparse, re-ranked": _published(published_stops, reranked=True),
    DENSE: Contender(prepare=partial(ours, dense)),
    f"dense, {SNAPSHOTS} snapshots": Contender(
        prepare=partial(snapshots, SNAPSHOTS), images=SNAPSHOTS, lengths=REBIRTH_LENGTHS
    ),
    "published stops": Contender(prepare=partial(ours, published_stops)),
    DEFAULT: Contender(prepare=partial(ours, StopSchedule.once)),
    "default, narrow": Contender(prepare=partial(ours, StopSchedule.once, narrow=NARROW)),
    "default, finished early": Contender(
        prepare=partial(ours, StopSchedule.once, finish=FINISH), lengths=(100, 400)
    ),
    "mass": Contender(prepare=partial(ours, mass)),
    "resolution": Contender(prepare=partial(ours, partial(growing, 1.0, 0.5))),
    "resolution, 30 of 64 patches": Contender(prepare=partial(ours, partial(growing, 0.47, 0.1))),
    "rebirth, v = 2": _rebirth(2),
    "rebirth, v = 4": _rebirth(4),
    "rebirth, v = 7": _rebirth(7),
    "rebirth, v = 4, random order": _rebirth(4, "random"),
}
