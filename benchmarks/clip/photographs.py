"""Photographs of ImageNet classes, out of a package."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from benchmarks.clip.packages import FOOLBOX

SIDE = 224
# Number in the package, class of ImageNet, and what it is: photographs of distinct classes, each of
# which EfficientNet-Lite0 puts into its class. They were chosen before any image was made.
TAKEN = (
    (15, 99, "goose"),
    (17, 22, "bald eagle"),
    (16, 251, "dalmatian"),
    (18, 317, "leafhopper"),
    (19, 305, "dung beetle"),
    (4, 949, "strawberry"),
    (10, 541, "drum"),
    (13, 471, "cannon"),
    (6, 609, "jeep"),
    (11, 630, "loafer"),
)


@dataclass(frozen=True, eq=False)
class Photographs:
    """Photographs with their classes.

    Attributes:
        images: [N, 3, 224, 224] in [0, 1].
        classes: int64 [N], of ImageNet.
        names: what each of them shows.
    """

    images: Tensor
    classes: Tensor
    names: tuple[str, ...]


def load_photographs() -> Photographs:
    """The photographs of :data:`TAKEN`.

    Raises:
        FileNotFoundError: the package isn't there; the message says how to get it.
        ValueError: the package has another content.
    """
    numbers, classes, names = zip(*TAKEN, strict=True)
    files = [f"foolbox/data/imagenet_{n:02}_{c}.jpg" for n, c in zip(numbers, classes, strict=True)]
    images = torch.stack([_square(FOOLBOX.archive.read(file)) for file in files])
    return Photographs(images, torch.tensor(classes), names)


def _square(data: bytes) -> Tensor:
    """The middle of a photograph [3, 224, 224] in [0, 1], as large as its shorter side allows."""
    pixels = transforms.to_tensor(Image.open(BytesIO(data)).convert("RGB"))
    resized = transforms.resize(pixels, SIDE, InterpolationMode.BICUBIC, antialias=True)
    square: Tensor = transforms.center_crop(resized, [SIDE, SIDE]).clamp(0, 1)
    return square
