"""Jitter of whole images, as objectives beside the teacher see them."""

from __future__ import annotations

import pytest
import torch

from smi_fast.jitter import jitter_images, random_jitter

F64 = torch.float64


@pytest.mark.parametrize(("shift", "flip"), [((0, 0), False), ((5, -9), True), ((-1, 30), False)])
def test_jittered_images_are_rolled_then_mirrored(shift: tuple[int, int], flip: bool) -> None:
    images = torch.randn(2, 3, 7, 10, dtype=F64, requires_grad=True)
    expected = images.roll(shift, (2, 3))
    expected = expected.flip(3) if flip else expected
    jittered = jitter_images(images, torch.tensor(shift), torch.tensor(flip))
    assert torch.equal(jittered, expected)
    weights = torch.randn_like(images)
    gradients = [torch.autograd.grad((x * weights).sum(), images)[0] for x in (jittered, expected)]
    assert torch.equal(*gradients)


def test_random_jitter_moves_by_an_eighth_of_each_side_and_mirrors_half() -> None:
    shift, flip = random_jitter(4000, (32, 50))
    assert shift.amin(0).tolist() == [-4, -6] and shift.amax(0).tolist() == [4, 6]
    assert 0.45 < flip.double().mean() < 0.55
