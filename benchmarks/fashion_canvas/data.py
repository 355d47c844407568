"""Fashion-MNIST items at random places and scales on textured backgrounds.

A photograph has an object and a background, plain Fashion-MNIST has only an object. Here an item
covers a known part of a 64 px canvas, so one can measure whether inversion keeps it.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SIDE = 64
ITEM_SIDES = (32.0, 56.0)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# The canvases of the test split, which a figure is about.
TEST_SEED = 3
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load_items(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """The items of a split ("train" or "t10k"): uint8 [N, 28, 28] and int64 labels [N].

    Reads the gzipped IDX files of Debian's ``dataset-fashion-mnist``, or of ``folder`` or
    ``$FASHION_MNIST`` when given.

    Raises:
        FileNotFoundError: when the files are in none of these folders.
    """
    folder = folder or Path(os.environ.get("FASHION_MNIST", DEBIAN_FOLDER))
    images = folder / f"{split}-images-idx3-ubyte.gz"
    if not images.exists():
        raise FileNotFoundError(
            f"expected Fashion-MNIST at {images}: install Debian's {DEBIAN_PACKAGE}, or set "
            "FASHION_MNIST to a folder with the four gzipped IDX files"
        )
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(
        -1, 28, 28
    )
    labels = np.frombuffer(
        gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))


def render(
    items: Tensor,
    generator: torch.Generator,
    *,
    item_sides: tuple[float, float] = ITEM_SIDES,
    wander: float = 1.0,
    side: int = SIDE,
) -> tuple[Tensor, Tensor]:
    """Places each item on a canvas of its own.

    Args:
        items: uint8 [B, 28, 28].
        generator: draws sizes, places, tints and textures.
        item_sides: least and greatest side of an item, in canvas pixels.
        wander: how far an item may be from the centre; 1 reaches the border of the canvas, 0 stays
            put.
        side: the canvas, in pixels.

    Returns:
        images [B, 3, side, side] in [0, 1] and foreground [B, side, side], true where the item is
        opaque.
    """
    count = len(items)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    scale = side / uniform(count, low=item_sides[0], high=item_sides[1])
    centre = uniform(count, 2, low=-1, high=1) * wander * (1 - 1 / scale)[:, None]
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = -centre * scale[:, None]
    grid = F.affine_grid(affine, [count, 1, side, side], align_corners=False)
    grey = F.grid_sample(items[:, None].float() / 255, grid, align_corners=False)
    opacity = (grey * 6).clamp(max=1)

    tint = uniform(count, 3, 1, 1, low=0.5)
    item = (0.15 + 0.85 * grey) * tint
    images = torch.lerp(_texture(count, side, generator), item, opacity)
    return images, opacity[:, 0] > 0.5


def _texture(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Coloured noise of four octaves around a random colour: [count, 3, side, side] in [0, 1]."""
    texture = torch.rand(count, 3, 1, 1, generator=generator) * 0.6 + 0.2
    for cells in (2, 4, 8, 16):
        amplitude = torch.rand(count, 1, 1, 1, generator=generator) * 0.12
        noise = torch.randn(count, 3, cells, cells, generator=generator) * amplitude
        texture = texture + F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
    return texture.clamp(0, 1)


def canvases(split: str, seed: int, *, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A canvas of full difficulty for each (of the last) items: images, labels, foreground."""
    items, labels = load_items(split)
    if last is not None:
        items, labels = items[-last:], labels[-last:]
    generator = torch.Generator().manual_seed(seed)
    parts = [render(part, generator) for part in items.split(500)]
    images, foreground = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels, foreground


def normalise(images: Tensor) -> Tensor:
    """Images in [0, 1] as the teacher takes them."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
