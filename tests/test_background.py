"""Kept patches over a background."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast.background import NAMES, over
from tests.helpers.inversions import run


def pixels_and_masks(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [3, 3, 32, 48], masks [3, 4, 6] with one patch or more, and the pixels inside."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, 32, 48, generator=generator, dtype=torch.float64).to(dtype)
    masks = torch.rand(3, 4, 6, generator=generator) < 0.3
    masks[0] = False
    masks[0, 2, 5] = True
    inside = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(pixels)
    return pixels, masks, inside


def test_a_result_shows_its_kept_patches(teacher: VisionTransformer) -> None:
    result = run(teacher)
    shown = result.over()
    inside = result.masks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(shown)
    assert torch.equal(shown[inside], result.images[inside])
    for image, mask, original in zip(shown, inside, result.images, strict=True):
        for c in range(3):
            mean = original[c][mask[c]].mean()
            torch.testing.assert_close(image[c][~mask[c]], mean.expand(int((~mask[c]).sum())))


@pytest.mark.parametrize("background", [*NAMES, (0.25, 0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kept_patches_are_unchanged(background: object, dtype: torch.dtype) -> None:
    pixels, masks, inside = pixels_and_masks(dtype)
    shown = over(pixels, masks, background)
    assert shown.dtype == dtype and torch.equal(shown[inside], pixels[inside])
    assert 0 <= shown.min() <= shown.max() <= 1
    if background == "black":
        assert not shown[~inside].any()
    if isinstance(background, tuple):
        assert [shown[:, c][~inside[:, c]].unique().tolist() for c in range(3)] == [
            [value] for value in background
        ]


@pytest.mark.parametrize("background", ["mean", "blurred"])
def test_a_background_comes_from_kept_patches_alone(background: str) -> None:
    pixels, masks, inside = pixels_and_masks()
    other = torch.where(inside, pixels, 1 - pixels)
    assert torch.equal(over(pixels, masks, background), over(other, masks, background))


def test_a_blurred_background_is_the_mean_in_a_gaussian_window() -> None:
    pixels, masks, inside = pixels_and_masks()
    shown = over(pixels, masks, "blurred")
    for image, c, y, x in ((0, 1, 3, 2), (1, 0, 17, 40), (2, 2, 31, 0)):
        if inside[image, c, y, x]:
            continue
        down, right = torch.arange(32)[:, None] - y, torch.arange(48) - x
        weight = (-(down.square() + right.square()) / (2 * 8**2)).double().exp() * inside[image, c]
        mean = pixels[image, c][inside[image, c]].mean()
        expected = ((weight * pixels[image, c]).sum() + 1e-6 * mean) / (weight.sum() + 1e-6)
        torch.testing.assert_close(shown[image, c, y, x], expected)


def test_far_from_kept_patches_the_blur_is_their_mean() -> None:
    pixels, masks = torch.rand(1, 3, 8, 512), torch.zeros(1, 1, 64, dtype=torch.bool)
    masks[0, 0, 63] = True
    shown = over(pixels, masks, "blurred")
    mean = pixels[..., 504:].mean((0, 2, 3))
    torch.testing.assert_close(shown[0, :, 4, 0], mean)


@pytest.mark.parametrize("background", ["grey", (0.5, 2.0, 0.5), ("a", 0, 0), 3, None])
def test_what_is_no_background_is_refused(background: object) -> None:
    pixels, masks, _ = pixels_and_masks()
    with pytest.raises(ValueError, match=r"expected a background mean, blurred, black or a colour"):
        over(pixels, masks, background)


def test_a_colour_has_as_many_numbers_as_the_image_has_channels() -> None:
    pixels, masks, _ = pixels_and_masks()
    with pytest.raises(ValueError, match=r"a background colour of 3 channels, got \(0.5, 0.5\)"):
        over(pixels, masks, (0.5, 0.5))
