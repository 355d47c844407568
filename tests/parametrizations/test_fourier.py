"""The Fourier parametrization: its formula, its scale, and whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smi_fast import CrossEntropy, Dense, Fourier, SparseInverter, StopSchedule, load_teacher
from smi_fast.parametrizations.sigmoid import MARGIN
from smi_fast.teacher.space import ImageSpace
from tests.helpers.parametrizations import SIZES, logits_of_pixels, space


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"colour": False, "flat_below": 0.0}, {"flat_below": 1 / 20}]
)
@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_contrast_is_that_of_the_parameters_at_every_size_and_decay(
    height: int, width: int, decay: float, options: dict[str, Any]
) -> None:
    fourier = Fourier(decay, start=0.3, **options).bind(space(height, width))
    parameters = fourier.initial(64, torch.Generator().manual_seed(0))
    assert parameters.shape == (64, 3, height, width // 2 + 1, 2)
    assert logits_of_pixels(fourier, parameters).square().mean().sqrt() == pytest.approx(
        0.3, rel=0.1
    )


def contrast(side: int, decay: float, iterations: int, **options: float) -> list[float]:
    """Standard deviation of the pixels' change from grey at the start, then after iterations."""
    fourier = Fourier(decay, **options).bind(space(side, side))
    parameters = fourier.initial(2, torch.Generator().manual_seed(0)).requires_grad_()
    small = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.nn.functional.interpolate(small, (side, side), mode="bicubic")
    adam = torch.optim.Adam([parameters], lr=0.2, betas=(0.5, 0.99))
    found = []
    for _ in range(iterations + 1):
        pixels = fourier.space.denormalize(fourier.images(parameters))
        found.append((pixels - 0.5).square().mean().sqrt().item())
        # A large loss, since Adam's epsilon would slow down tiny gradients.
        adam.zero_grad()
        (1e6 * (pixels - wanted).square().mean()).backward()
        adam.step()
    return found


@pytest.mark.parametrize("decay", [0.7, 1.0, 1.25, 1.5])
def test_the_start_and_the_first_iteration_have_the_same_contrast_at_every_size(
    decay: float,
) -> None:
    # sigmoid's slope at 0 is 1/4: u starts with 0.02 and the learning rate is 0.2.
    for side in (64, 112, 224, 384):
        start, first = contrast(side, decay, 1)
        # Few random low frequencies make up most of the start, so two images vary.
        assert start == pytest.approx(0.02 / 4, rel=0.2)
        assert first == pytest.approx(0.2 / 4, rel=0.1)


@pytest.mark.parametrize(("flat_below", "tolerance"), [(0.0, 0.03), (1 / 64, 0.3)])
def test_ten_iterations_move_contrast_alike_at_every_size(
    flat_below: float, tolerance: float
) -> None:
    """With a flat part a large image shows the same shapes sooner: more frequencies move alike."""
    small, large = (contrast(side, 1.5, 10, flat_below=flat_below)[-1] for side in (64, 224))
    assert large == pytest.approx(small, rel=tolerance)


@pytest.mark.parametrize(("flat_below", "lowest"), [(0.0, 1 / 32), (0.1, 0.1)])
def test_equals_the_formula_of_its_docstring(flat_below: float, lowest: float) -> None:
    fourier = Fourier(1.5, colour=False, flat_below=flat_below).bind(space(24, 32))
    parameters = torch.randn(2, 3, 24, 17, 2, dtype=torch.float64) / 8
    frequency = torch.hypot(
        torch.fft.fftfreq(24, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(32, dtype=torch.float64),
    )
    scale = (frequency.clamp(min=lowest) ** -1.5)[:, :17]
    z = torch.complex(parameters[..., 0], parameters[..., 1])
    u = torch.fft.irfft2(z * scale, s=(24, 32), norm="ortho")
    found = logits_of_pixels(fourier, parameters)
    constant = (found * u).sum() / u.square().sum()
    torch.testing.assert_close(found, constant * u)


def test_flat_frequencies_of_a_large_image_move_like_those_of_a_small_one() -> None:
    """The shapes of 64 px and more have the same share of the contrast at 64 and at 256 px."""

    def share(side: int, **options: float) -> float:
        bound = Fourier(1.5, start=1.0, **options).bind(space(side, side))
        u = logits_of_pixels(bound, bound.initial(8, torch.Generator().manual_seed(0)))
        small = torch.nn.functional.avg_pool2d(u, 32)
        return (small.square().mean() / u.square().mean()).item()

    assert share(256, flat_below=1 / 64) == pytest.approx(share(64), rel=0.25)
    assert share(256, flat_below=0.0) > 1.5 * share(64)


@pytest.mark.parametrize(("height", "width"), SIZES[4:])
@pytest.mark.parametrize("colour", [False, True])
def test_given_images_come_back(height: int, width: int, colour: bool) -> None:
    fourier = Fourier(1.2, colour=colour).bind(space(height, width))
    pixels = torch.rand(2, 3, height, width, dtype=torch.float64) * 0.9 + 0.05
    images = fourier.space.normalize(pixels)
    torch.testing.assert_close(fourier.images(fourier.parameters_of(images)), images)


def test_black_and_white_have_finite_parameters() -> None:
    fourier = Fourier(1.0).bind(space(6, 8))
    pixels = (torch.arange(3 * 6 * 8) % 2).double().view(1, 3, 6, 8)
    parameters = fourier.parameters_of(fourier.space.normalize(pixels))
    assert parameters.isfinite().all()
    found = fourier.space.denormalize(fourier.images(parameters))
    torch.testing.assert_close(found, pixels.clamp(MARGIN, 1 - MARGIN))


def test_gradient() -> None:
    fourier = Fourier(1.0, colour=True).bind(space(5, 6))
    parameters = torch.randn(1, 3, 5, 4, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(fourier.images, parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -0.1}, "decay 0 or above, got -0.1"),
        ({"decay": float("nan")}, "decay 0 or above, got nan"),
        ({"start": 0.0}, "start above 0, got 0.0"),
        ({"colour": "natural"}, "colour True, False or None, got 'natural'"),
        ({"flat_below": -0.1}, r"flat_below in \[0, 1\], got -0.1"),
        ({"flat_below": float("nan")}, r"flat_below in \[0, 1\], got nan"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fourier(**options)


def test_colour_needs_three_channels() -> None:
    one = torch.ones(1)
    grey = Fourier(colour=None).bind(ImageSpace(1, 8, 8, 0.5 * one, one))
    assert grey.images(grey.initial(2, None)).shape == (2, 1, 8, 8)
    given = torch.randn(1, 3, 8, 5, 2, dtype=torch.float64)
    either, mixed = (Fourier(colour=colour).bind(space(8, 8)) for colour in (None, True))
    torch.testing.assert_close(either.images(given), mixed.images(given))
    with pytest.raises(ValueError, match="3 channels with colour, got 1"):
        Fourier(colour=True).bind(ImageSpace(1, 8, 8, 0.5 * one, one))


@pytest.mark.parametrize("schedule", [Dense(), StopSchedule((4, 8), (0.5, 0.5), compact=True)])
def test_frozen_background_and_progress(schedule: Dense | StopSchedule) -> None:
    teacher = load_teacher("fashion-canvas")
    inverter = SparseInverter(
        teacher,
        objectives=[CrossEntropy()],
        parametrization=Fourier(),
        schedule=schedule,
        lr=0.2,
        iterations=25,
    )
    frames: list[torch.Tensor] = []
    result = inverter.invert(
        [1, 7],
        progress=False,
        generator=torch.Generator().manual_seed(0),
        callback=lambda number, images, kept: frames.append(images.clone()),
    )
    assert result.history["cross_entropy"][-1] < 0.5 * result.history["cross_entropy"][0]
    assert (result.logits.argmax(1) == torch.tensor([1, 7])).all()
    if schedule.at:
        stopped = ~inverter.teacher.pixel_mask(result.kept).expand(-1, 3, -1, -1)
        assert torch.equal(frames[-1][stopped], frames[schedule.at[-1]][stopped])
    assert not torch.equal(frames[-1], frames[-2])
