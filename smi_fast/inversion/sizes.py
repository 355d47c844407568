"""Images that grow during a run: settings, jitter and first parameters of another size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.inversion.settings import Settings

Size = tuple[int, int]


def at_size(settings: Settings, size: Size, *, probe: bool = False) -> Settings:
    """The settings of images of (height, width), which are themselves for the teacher's own size.

    Args:
        settings: of the teacher's own size.
        size: (height, width).
        probe: whether to compare the teacher of this size with timm's.

    Raises:
        ValueError: the parametrization can't make images of this size.
        UnsupportedTeacher: the teacher can't be computed exactly at this size.
    """
    if size == settings.teacher.image_size:
        return settings
    height, width = size
    space = replace(settings.space, height=height, width=width)
    return replace(
        settings,
        teacher=settings.teacher.at_size(size, probe=probe),
        space=space,
        parametrization=settings.parametrization.bind(space),
    )


def begin(settings: Settings, batch: int, generator: torch.Generator | None) -> None:
    """Let objectives and importance draw what they need for images of this size."""
    for objective in settings.objectives:
        objective.begin(settings.teacher, batch, generator)
    settings.importance.begin(settings.teacher, batch, generator)


def check_sizes(settings: Settings, sizes: Mapping[int, Size]) -> None:
    """Try what a run does at its stops, on one image.

    Raises:
        ValueError: a parametrization that can't make images of a size, or start from given images.
        UnsupportedTeacher: the teacher can't be computed exactly at a size.
    """
    distinct = list(dict.fromkeys(sizes.values()))
    made = [at_size(settings, size, probe=True) for size in distinct]
    for before, after in pairwise(made):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            images = before.parametrization.images(before.parametrization.initial(1, generator))
            enlarged_parameters(after, images)


def enlarged_parameters(settings: Settings, images: Tensor) -> Tensor:
    """The parameters of images [B, C, h, w] that are enlarged to the size of the settings.

    Bilinear interpolation stays between the values that it is given, black and white among them.
    """
    size = settings.teacher.image_size
    enlarged = F.interpolate(images, size, mode="bilinear", align_corners=False)
    parameters = settings.parametrization.parameters_of(enlarged)
    # The update is in place, on a flat view that other strides don't have.
    return parameters.detach().clone(memory_format=torch.contiguous_format)


def scale_shift(shift: Tensor, sizes: Mapping[int, Size], image_size: Size) -> Tensor:
    """Shifts [T, ..., 2] in pixels of whole images, as the nearest ones of smaller images."""
    scaled = shift.clone()
    for (first, size), end in zip(sizes.items(), (*list(sizes)[1:], len(shift)), strict=True):
        if size != image_size:
            own, full = (torch.tensor(pair, device=shift.device) for pair in (size, image_size))
            # Halves are rounded up.
            scaled[first:end] = (2 * shift[first:end] * own + full).div(
                2 * full, rounding_mode="floor"
            )
    return scaled
