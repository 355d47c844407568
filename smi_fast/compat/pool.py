"""The folder of inverted images, with the published names of its files and methods."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

# Published endings of image names, in the order in which each folder is read.
ENDINGS = ("png", "jpg", "jpeg", "JPEG")

Transform = Callable[[Image.Image], Any]


class ImagePool:
    """A folder of images in batches, each saved as ``<batch>-<index>.png``.

    Args:
        root: the folder, made when missing.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.abspath(root)
        os.makedirs(self.root, exist_ok=True)
        self._batches = 0

    def add(self, imgs: Tensor) -> None:
        """Save a batch of images [B, 3, H, W] in [0, 1]."""
        pixels = imgs.detach().clamp(0, 1).permute(0, 2, 3, 1).mul(255).byte().cpu().numpy()
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(os.path.join(self.root, f"{self._batches}-{index}.png"))
        self._batches += 1

    def get_dataset(self, transform: Transform | None = None) -> Images:
        """All images that the folder has now, as RGB images from PIL or as ``transform`` returns
        them."""
        return Images(self.root, transform)


class Images(Dataset[Any]):
    """The images in a folder and its subfolders.

    They are in the order in which ``os.walk`` lists them, as published. So the same shuffle chooses
    the same files; another file system may list them in another order.

    Args:
        root: the folder.
        transform: called with each image, an RGB image from PIL; None to return the image itself.
    """

    def __init__(self, root: str | Path, transform: Transform | None = None) -> None:
        self.root, self.transform = os.path.abspath(root), transform
        self.images = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(self.root)
            for ending in ENDINGS
            for name in names
            if name.endswith(ending)
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.images[index]) as image:
            rgb = image.convert("RGB")
        return rgb if self.transform is None else self.transform(rgb)


def to_tensor(image: Image.Image) -> Tensor:
    """An image as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
