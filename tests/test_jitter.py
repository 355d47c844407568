"""Jitter of whole images, as objectives beside the teacher see them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from smi_fast.jitter import Jitter, jitter_images

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


def test_each_image_may_be_jittered_differently() -> None:
    images = torch.randn(3, 2, 7, 10, dtype=F64, requires_grad=True)
    shift, flip = torch.tensor([[5, -9], [0, 0], [-1, 30]]), torch.tensor([True, False, True])
    expected = torch.cat([jitter_images(images[i : i + 1], shift[i], flip[i]) for i in range(3)])
    jittered = jitter_images(images, shift, flip)
    assert torch.equal(jittered, expected)
    weights = torch.randn_like(images)
    gradients = [torch.autograd.grad((x * weights).sum(), images)[0] for x in (jittered, expected)]
    assert torch.equal(*gradients)


def test_jitter_moves_by_an_eighth_of_each_side_and_mirrors_half() -> None:
    shift, flip = Jitter().draw(4000, (32, 50))
    assert shift.amin(0).tolist() == [-4, -6] and shift.amax(0).tolist() == [4, 6]
    assert 0.45 < flip.double().mean() < 0.55


@pytest.mark.parametrize("pixels", [0, 1, 15, 28, 30, 41, 224])
def test_a_share_of_whole_pixels_is_exact(pixels: int) -> None:
    shift, _ = Jitter(share=pixels / 224).draw(8000, (224, 224))
    assert shift.amin() == -pixels and shift.amax() == pixels


def test_jitter_of_each_image_and_none_at_all() -> None:
    shift, flip = Jitter(per_image=True).draw(200, (32, 48), batch=3)
    assert shift.shape == (200, 3, 2) and flip.shape == (200, 3)
    assert (shift[:, 0] != shift[:, 1]).any() and (flip[:, 0] != flip[:, 1]).any()
    for per_image in (False, True):
        shift, flip = Jitter(share=0, flip=False, per_image=per_image).draw(20, (32, 48), batch=2)
        assert not shift.any() and not flip.any()


def test_a_share_for_each_phase() -> None:
    for jitter in (Jitter((0, 0.5, 0.25)), Jitter((0, 0.5, 0.25), starts=(0.25, 0.75))):
        shift, _ = jitter.draw(1000, (32, 32), stops=(250, 750))
        phases = shift.abs().split([250, 500, 250])
        assert [int(phase.max()) for phase in phases] == [0, 16, 8]


def test_numbers_may_be_numpys() -> None:
    assert Jitter(np.float32(0.25)).phases(3, ()) == [(0.25, 3)]
    assert Jitter((np.float32(0.25), 0.5), starts=(np.float64(0.5),)).phases(4, ()) == [
        (0.25, 2),
        (0.5, 2),
    ]


def test_one_share_draws_the_same_with_and_without_stops() -> None:
    def drawn(*stops: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return Jitter().draw(20, (32, 48), stops=stops, generator=generator)[0]

    assert torch.equal(drawn(), drawn(3, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"over the side of the image, in \[0, 1\], got 1.5"),
        ({"share": -0.1}, r"in \[0, 1\], got -0.1"),
        ({"share": float("nan")}, r"in \[0, 1\], got nan"),
        ({"share": ()}, r"in \[0, 1\], got \(\)"),
        ({"share": "28"}, r"in \[0, 1\], got '28'"),
        ({"share": (0.1, 0.2), "starts": (1.0,)}, r"starts in \(0, 1\), .* got \(1.0,\)"),
        ({"share": (0.1, 0.2), "starts": (0.2, 0.4)}, r"got \(0.2, 0.4\) for 2 shares"),
        ({"share": (0.1, 0.2, 0.3), "starts": (0.4, 0.2)}, r"ascending, .* got \(0.4, 0.2\)"),
        ({"flip": "no"}, "flip True or False, got 'no'"),
        ({"per_image": None}, "per_image True or False, got None"),
        ({"share": 0.1, "starts": (0.2,)}, r"got \(0.2,\) for 1 shares"),
    ],
)
def test_jitter_out_of_range_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Jitter(**options)
