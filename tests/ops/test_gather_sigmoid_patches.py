"""gather_sigmoid_patches against sigmoid, normalisation, where and gather_patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.verify.cases import random_kept

pytestmark = pytest.mark.usefixtures("each_backend")

SPACE = {
    "mean": torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64),
    "std": torch.tensor([0.2, 0.3, 1.0], dtype=torch.float64),
}
JITTERS = (
    *(((0, 0), False), ((3, -5), True), ((-40, 33), False)),
    (torch.tensor([[5, -3], [-13, 38]]), torch.tensor([True, False])),
)
Jitter = tuple[tuple[int, int] | Tensor, bool | Tensor]


def spelt_out(
    field: Tensor, kept: Tensor, jitter: Jitter, background: Tensor, frozen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The docstring's expression, for patches of 8 x 8 pixels."""
    images = (torch.sigmoid(field) - SPACE["mean"][:, None, None]) / SPACE["std"][:, None, None]
    if frozen is not None:
        mask = frozen.repeat_interleave(8, 1).repeat_interleave(8, 2)
        images = torch.where(mask[:, None], background, images)
    return ops.gather_patches(images, kept, *jitter, patch_size=8, backend="reference")


@pytest.mark.parametrize("jitter", JITTERS, ids=str)
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("count", [1, 7, 15])
def test_values_and_gradient_are_those_of_the_expression(
    jitter: Jitter, still: bool, count: int
) -> None:
    field = (4 * torch.randn(2, 3, 24, 40, dtype=torch.float64)).requires_grad_()
    kept, background = random_kept(2, count, 15), torch.randn_like(field)
    frozen = torch.rand(2, 3, 5) < 0.5 if still else None
    options = {"background": background, "frozen": frozen} if still else {}
    ours = ops.gather_sigmoid_patches(field, kept, *jitter, patch_size=8, **SPACE, **options)
    theirs = spelt_out(field, kept, jitter, background, frozen)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    grad = torch.randn_like(ours[0])
    gradients = [torch.autograd.grad(patches, field, grad)[0] for patches, _ in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_pixels_of_a_frozen_patch_are_those_of_the_background_bit_for_bit() -> None:
    field, background = torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)
    kept, frozen = torch.tensor([[0, 3]]), torch.tensor([[[True, False], [False, True]]])
    field[0, :, :8, :8] = torch.nan
    patches, _ = ops.gather_sigmoid_patches(
        *(field, kept), background=background, frozen=frozen, patch_size=8, **SPACE
    )
    expected, _ = ops.gather_patches(background, kept, patch_size=8)
    assert torch.equal(patches, expected)


def test_pixels_of_any_field_lie_between_black_and_white() -> None:
    ends = torch.tensor([-torch.inf, -1e30, -800, -40, 40, 800, 1e30, torch.inf])
    field = ends.double().expand(1, 3, 8, 8).clone().requires_grad_()
    kept = torch.zeros(1, 1, dtype=torch.int64)
    patches, _ = ops.gather_sigmoid_patches(field, kept, patch_size=8, **SPACE)
    pixels = patches.view(3, 8, 8) * SPACE["std"][:, None, None] + SPACE["mean"][:, None, None]
    black_and_white = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).double().expand(3, 8, 8)
    torch.testing.assert_close(pixels, black_and_white, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(patches.sum(), field)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_a_nan_stays_in_its_pixel() -> None:
    field = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    field[0, 1, 2, 3] = torch.nan
    patches, _ = ops.gather_sigmoid_patches(
        field, torch.zeros(1, 1, dtype=torch.int64), patch_size=8, **SPACE
    )
    assert patches.view(3, 8, 8).isnan().nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"field": torch.zeros(3, 16, 16)}, r"expected field \[B, C, H, W\], got .*\[3, 16, 16\]"),
        ({"patch_size": 5}, "multiples of the patch size 5, got 16 x 16"),
        ({"kept": torch.zeros(2, 3)}, r"expected kept int64 \[2, K\], got torch.float32"),
        ({"mean": torch.zeros(2)}, r"expected mean torch.float32 \[3\], got torch.float32 \[2\]"),
        ({"std": torch.ones(3).double()}, r"std torch.float32 \[3\], got torch.float64 \[3\]"),
        ({"std": torch.ones(3, device="meta")}, "on cpu, got one on meta"),
        ({"frozen": None}, "expected background and frozen together, got no frozen"),
        ({"background": None}, "expected background and frozen together, got no background"),
        ({"background": torch.zeros(1, 3, 16, 16)}, r"background torch.float32 \[2, 3, 16, 16\]"),
        ({"frozen": torch.zeros(2, 4)}, r"frozen bool \[2, 2, 2\], got torch.float32 \[2, 4\]"),
        ({"shift": torch.zeros(2)}, r"shift int64 \[2\] or \[2, 2\], got torch.float32"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    good = {
        "field": torch.zeros(2, 3, 16, 16),
        "kept": torch.zeros(2, 1, dtype=torch.int64),
        "mean": torch.zeros(3),
        "std": torch.ones(3),
        "background": torch.zeros(2, 3, 16, 16),
        "frozen": torch.zeros(2, 2, 2, dtype=torch.bool),
        "patch_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        ops.gather_sigmoid_patches(**(good | change))
