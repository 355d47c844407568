"""Fashion-MNIST items at random places and scales on textured backgrounds.

A photograph has an object and a background; plain Fashion-MNIST has only an object. Here an item
covers a known part of a 64 px canvas, so it can be measured whether inversion keeps the item.
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
# The seed of the test canvases that every figure is about.
TEST_SEED = 3
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load_items(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Read the items of a split ("train" or "t10k"): uint8 [N, 28, 28] and int64 labels [N].

    The four gzipped IDX files are looked for in ``folder``, else in ``$FASHION_MNIST``, else where
    Debian's ``dataset-fashion-mnist`` puts them.

    Raises:
        FileNotFoundError: the files are not there.
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
    displacement: float = 1.0,
    side: int = SIDE,
) -> tuple[Tensor, Tensor]:
    """Place each item on its own canvas.

    Args:
        items: uint8 [B, 28, 28].
        generator: draws sizes, places, tints and textures.
        item_sides: smallest and largest side of an item, in pixels of the canvas.
        displacement: how far an item may lie from the centre: 0 keeps it there, 1 lets it reach the
            border of the canvas.
        side: side of the canvas, in pixels.

    Returns:
        images [B, 3, side, side] in [0, 1], and foreground bool [B, side, side], true where an item
        is opaque.
    """
    count = len(items)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    scale = side / uniform(count, low=item_sides[0], high=item_sides[1])
    centre = uniform(count, 2, low=-1, high=1) * displacement * (1 - 1 / scale)[:, None]
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
    """A random colour with coloured noise of four octaves: [count, 3, side, side] in [0, 1]."""
    texture = torch.rand(count, 3, 1, 1, generator=generator) * 0.6 + 0.2
    for cells in (2, 4, 8, 16):
        amplitude = torch.rand(count, 1, 1, 1, generator=generator) * 0.12
        noise = torch.randn(count, 3, cells, cells, generator=generator) * amplitude
        texture = texture + F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
    return texture.clamp(0, 1)


def canvases(split: str, seed: int, *, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Render one canvas of full difficulty per item: images, labels, foreground.

    Args:
        split: "train" or "t10k".
        seed: of the canvases.
        last: how many items to take from the end of the split; None for all.
    """
    items, labels = load_items(split)
    if last is not None:
        items, labels = items[-last:], labels[-last:]
    generator = torch.Generator().manual_seed(seed)
    parts = [render(part, generator) for part in items.split(500)]
    images, foreground = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels, foreground


def normalise(images: Tensor) -> Tensor:
    """Normalise images in [0, 1] for the teacher."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
