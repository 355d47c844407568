"""Augmentations against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from smi_fast.augmentations import Augment, ColourShift, GaussianNoise, LowPass

F64 = torch.float64


def called(augment: Augment, images: Tensor, progress: float, seed: int = 0) -> Tensor:
    return augment(images, torch.tensor(progress), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.5), (0.5, 0.3), (1.0, 0.1)])
def test_noise_decays_linearly(progress: float, expected: float) -> None:
    noise = called(GaussianNoise(0.5, 0.1), torch.zeros(4, 3, 64, 64, dtype=F64), progress)
    assert noise.std() == pytest.approx(expected, rel=0.02)
    assert noise.mean().abs() < 0.02


def test_a_colour_shift_is_one_number_for_each_channel() -> None:
    images = torch.randn(200, 3, 4, 6, dtype=F64)
    shift = called(ColourShift(0.4), images, 0.3) - images
    one = shift[..., :1, :1]
    torch.testing.assert_close(shift, one.expand_as(shift))
    assert 0.39 < one.abs().max() <= 0.4 and one.unique().numel() > 590
    assert (one < 0).double().mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("size", [(32, 48), (33, 21)])
def test_a_low_pass_is_a_gaussian_that_wraps_around(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, dtype=F64)
    blurred, deviation = called(LowPass(2.0, 1.0), images, 0.5), 1.5
    expected = images
    for axis, side in zip((2, 3), size, strict=True):
        steps = range(-side, side + 1)
        weights = torch.tensor([math.exp(-(s**2) / (2 * deviation**2)) for s in steps], dtype=F64)
        weights = weights / weights.sum()
        expected = sum(w * expected.roll(s, axis) for w, s in zip(weights, steps, strict=True))
    torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(called(LowPass(2.0, 0.0), images, 1.0), images)
    assert called(LowPass(), images.bfloat16(), 0.0).dtype == torch.bfloat16


@pytest.mark.parametrize("augment", [GaussianNoise(), ColourShift(), LowPass()])
def test_augmentations_are_differentiable_and_follow_the_generator(augment: Augment) -> None:
    images = torch.randn(2, 3, 8, 12, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: called(augment, x, 0.2), images)
    assert torch.equal(called(augment, images, 0.2, 1), called(augment, images, 0.2, 1))
    drawn = not isinstance(augment, LowPass)
    assert drawn != torch.equal(called(augment, images, 0.2, 1), called(augment, images, 0.2, 2))


def test_amounts_may_be_numpys() -> None:
    assert ColourShift(np.float32(0.5)).amount == 0.5


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "much"])
def test_what_is_out_of_range_is_refused(value: object) -> None:
    for name, kind in (("start", GaussianNoise), ("end", LowPass), ("amount", ColourShift)):
        with pytest.raises(ValueError, match=f"expected {name} from 0, got {value!r}"):
            kind(**{name: value})
