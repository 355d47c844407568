"""The space of images: from pixels to normalised values and back."""

from __future__ import annotations

import torch

from smi_fast.teacher.space import ImageSpace

SPACE = ImageSpace(3, 2, 2, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3]))


def test_black_and_white_are_the_bounds() -> None:
    black, white = SPACE.normalize(torch.tensor([0.0, 1.0])[:, None, None, None]).expand(2, 3, 1, 1)
    torch.testing.assert_close(SPACE.low, black.flatten())
    torch.testing.assert_close(SPACE.high, white.flatten())
    assert SPACE.low.tolist() == torch.tensor([-2.5, -1.6, -1.0]).tolist()


def test_pixels_come_back_and_are_cut() -> None:
    pixels = torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(SPACE.denormalize(SPACE.normalize(pixels)), pixels)
    outside = SPACE.normalize(torch.tensor([-0.1, 1.1])[:, None, None, None].expand(2, 3, 2, 2))
    assert SPACE.denormalize(outside).unique().tolist() == [0, 1]
