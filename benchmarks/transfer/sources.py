"""Where a student's images come from: real canvases, noise, and inversions of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.fashion_canvas.data import CLASSES, SIDE, load_items, render
from benchmarks.fashion_canvas.train_teacher import GRID, VALIDATION
from benchmarks.quality.images import Run, images_of
from benchmarks.quality.recognition import CONTENDERS as RECIPES
from benchmarks.schedules.timed import Job, timed
from smi_fast import Fourier, SparseViT
from smi_fast.teacher.space import ImageSpace

# Images that are inverted at once; a larger number is made of several batches.
BATCH = 400
# The seed of each further batch differs by this much.
NEXT_SEED = 1000
PER_CLASS = BATCH // len(CLASSES)
LONG = 4000


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images to learn from.

    Attributes:
        pixels: [N, 3, H, W] in [0, 1].
        masks: bool [N, rows, columns], the kept patches.
        commits: at which they were inverted.
    """

    pixels: Tensor
    masks: Tensor
    commits: tuple[str, ...] = ()

    def first(self, count: int) -> Pictures:
        """The first images."""
        return Pictures(self.pixels[:count], self.masks[:count], self.commits)


# Makes a number of images of a seed.
Source = Callable[[VisionTransformer, int, int], Pictures]


def _whole(pixels: Tensor) -> Pictures:
    return Pictures(pixels, torch.ones(len(pixels), GRID, GRID, dtype=torch.bool))


def real(vit: VisionTransformer, count: int, seed: int) -> Pictures:
    """Canvases that the teacher may have learned from."""
    generator = torch.Generator().manual_seed(seed)
    items, _ = load_items("train")
    chosen = torch.randperm(len(items) - VALIDATION, generator=generator)[:count]
    return _whole(render(items[chosen], generator)[0])


def gaussian(vit: VisionTransformer, count: int, seed: int) -> Pictures:
    """White noise around grey, with the contrast that the published recipe starts from."""
    noise = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return _whole((0.5 + 0.225 * noise).clamp(0, 1))


def one_over_f(vit: VisionTransformer, count: int, seed: int) -> Pictures:
    """Noise with the spectrum of photographs, around a colour of its own for each image."""
    space = ImageSpace(3, SIDE, SIDE, torch.zeros(3), torch.ones(3))
    noise = Fourier(decay=1.0, start=1.0).bind(space)
    parameters = noise.initial(count, torch.Generator().manual_seed(seed))
    return _whole(noise.images(parameters))


def inverted(name: str, iterations: int, vit: VisionTransformer, count: int, seed: int) -> Pictures:
    """Images of a contender of ``python -m benchmarks schedules``."""
    parts = [
        timed(vit, Job(name, iterations, seed + NEXT_SEED * number, min(count, BATCH)))
        for number in range(math.ceil(count / BATCH))
    ]
    return Pictures(
        torch.cat([part.images.pixels for part in parts]),
        torch.cat([part.images.masks for part in parts]),
        tuple(sorted({part.images.commit for part in parts})),
    ).first(count)


def published_in_full(name: str, vit: VisionTransformer, count: int, seed: int) -> Pictures:
    """Images of the published recipe after its 4000 iterations, by our loop."""
    run = Run(name, RECIPES[name], LONG, seed, PER_CLASS)
    made = images_of(SparseViT(vit), run)
    # All classes come in turn, as in the other sources.
    turned = torch.arange(len(made.pixels)).view(-1, PER_CLASS).mT.flatten()[:count]
    return Pictures(made.pixels[turned], made.masks[turned], (made.commit,))


# Iterations of the sources that are contenders of ``schedules``, by their names there.
ITERATIONS = {
    "published, dense": 100,
    "published, sparse": 100,
    "dense": 100,
    "default": 100,
    "rebirth, v = 2": 100,
    "rebirth, v = 4": 200,
    "rebirth, v = 7": 400,
}
SOURCES: dict[str, Source] = {
    "real": real,
    "Gaussian noise": gaussian,
    "1/f noise": one_over_f,
    "published, dense, 4000 iterations": partial(published_in_full, "published, dense"),
    "published, sparse, 4000 iterations": partial(published_in_full, "published, 14 of 64 patches"),
    **{name: partial(inverted, name, count) for name, count in ITERATIONS.items()},
}
