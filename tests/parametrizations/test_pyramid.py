"""The pyramid of images: its formula, its contrast, and whole runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from smi_fast import Dense, Pyramid, SparseInverter, StopSchedule, load_teacher
from tests.helpers.host_guard import HostGuard
from tests.helpers.parametrizations import SIZES, logits_of_pixels, space


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_contrast_is_that_of_the_parameters_at_every_size(height: int, width: int) -> None:
    pyramid = Pyramid(start=0.3).bind(space(height, width))
    parameters = pyramid.initial(64, torch.Generator().manual_seed(0))
    contrast = logits_of_pixels(pyramid, parameters).square().mean().sqrt()
    assert contrast == pytest.approx(0.3, rel=0.1)


def test_equals_the_formula_of_its_docstring() -> None:
    pyramid = Pyramid(smallest=5).bind(space(24, 32))
    sides = [(4, 5), (8, 10), (15, 20), (24, 32)]
    counts = [height * width for height, width in sides]
    parameters = torch.randn(2, 3, sum(counts), dtype=torch.float64) / 8
    levels = [
        F.interpolate(part.unflatten(2, size), (24, 32), mode="bicubic")
        for part, size in zip(parameters.split(counts, dim=2), sides, strict=True)
    ]
    found = logits_of_pixels(pyramid, parameters)
    flat = torch.stack([level.flatten() for level in levels], dim=1)
    constants = torch.linalg.lstsq(flat, found.flatten()[:, None]).solution
    assert (constants > 0).all()
    torch.testing.assert_close(flat @ constants, found.flatten()[:, None])


def test_each_level_adds_as_much_contrast() -> None:
    pyramid = Pyramid().bind(space(64, 64))
    parts = torch.randn(64, 3, 4**2 + 8**2 + 16**2 + 32**2 + 64**2, dtype=torch.float64) / 10
    start = 0
    for side in (4, 8, 16, 32, 64):
        alone = torch.zeros_like(parts)
        alone[:, :, start : start + side**2] = parts[:, :, start : start + side**2]
        contrast = logits_of_pixels(pyramid, alone).square().mean().sqrt()
        assert contrast == pytest.approx(0.1 / 5**0.5, rel=0.05)
        start += side**2


@pytest.mark.parametrize(("height", "width"), SIZES[4:])
def test_given_images_come_back(height: int, width: int) -> None:
    pyramid = Pyramid(smallest=2).bind(space(height, width))
    images = pyramid.space.normalize(
        torch.rand(2, 3, height, width, dtype=torch.float64) * 0.9 + 0.05
    )
    torch.testing.assert_close(pyramid.images(pyramid.parameters_of(images)), images)


def test_gradient() -> None:
    pyramid = Pyramid(smallest=2).bind(space(5, 6))
    parameters = pyramid.initial(1, torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(pyramid.images, parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 0}, "smallest as a whole number from 1, got 0"),
        ({"smallest": 2.5}, "smallest as a whole number from 1, got 2.5"),
        ({"start": float("inf")}, "start above 0, got inf"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(**options)


def test_smallest_is_at_most_the_image() -> None:
    with pytest.raises(ValueError, match="smallest up to 48 pixels, got 49"):
        Pyramid(smallest=49).bind(space(33, 48))


@pytest.mark.parametrize("schedule", [Dense(), StopSchedule((4, 8), (0.5, 0.5), compact=True)])
def test_frozen_background_and_progress(schedule: Dense | StopSchedule) -> None:
    inverter = SparseInverter(
        load_teacher("fashion-canvas"),
        parametrization=Pyramid(),
        schedule=schedule,
        lr=0.1,
        iterations=25,
    )
    frames: list[torch.Tensor] = []
    result = inverter.invert(
        [1, 7],
        progress=False,
        generator=torch.Generator().manual_seed(0),
        callback=lambda number, images, kept: frames.append(images.clone()),
    )
    assert (result.logits.argmax(1) == torch.tensor([1, 7])).all()
    if schedule.at:
        stopped = ~inverter.teacher.pixel_mask(result.kept).expand(-1, 3, -1, -1)
        assert torch.equal(frames[-1][stopped], frames[schedule.at[-1]][stopped])
    assert not torch.equal(frames[-1], frames[-2])


def test_reads_nothing_on_the_host() -> None:
    pyramid = Pyramid().bind(space(32, 48))
    parameters = pyramid.initial(2, None)
    with HostGuard():
        pyramid.images(parameters)
