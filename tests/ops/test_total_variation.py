"""total_variation against the published formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.verify.cases import random_kept

pytestmark = pytest.mark.usefixtures("each_backend")


F64 = torch.float64


def differences(x: Tensor) -> list[Tensor]:
    return [
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., :-1, :-1] - x[..., 1:, 1:],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    ]


def test_total_variation_is_the_published_formula() -> None:
    images = torch.randn(2, 3, 9, 7, dtype=F64)
    l1, l2 = ops.total_variation(images)
    torch.testing.assert_close(l1, sum(d.abs().mean() for d in differences(images)))
    torch.testing.assert_close(l2, sum(torch.norm(d) for d in differences(images)))


def test_total_variation_of_kept_patches_counts_pairs_one_by_one() -> None:
    images, kept, size = torch.randn(2, 2, 6, 8, dtype=F64), random_kept(2, 4, 12), 2
    l1, l2 = ops.total_variation(images, kept, patch_size=size)
    expected_l1 = expected_l2 = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        found = []
        for b, c, y, x in itertools.product(range(2), range(2), range(6), range(8)):
            v, u = y + down, x + right
            if v >= 6 or not 0 <= u < 8:
                continue
            ends = {y // size * 4 + x // size, v // size * 4 + u // size}
            if ends & set(kept[b].tolist()):
                found.append((images[b, c, y, x] - images[b, c, v, u]).item())
        expected_l1 += sum(map(abs, found)) / len(found)
        expected_l2 += sum(d * d for d in found) ** 0.5
    assert l1.item() == pytest.approx(expected_l1, rel=1e-12)
    assert l2.item() == pytest.approx(expected_l2, rel=1e-12)


def test_total_variation_with_every_patch_kept_is_that_of_the_image() -> None:
    images, every = torch.randn(2, 3, 8, 12, dtype=F64), torch.arange(6).expand(2, -1)
    kept = ops.total_variation(images, every, patch_size=4)
    torch.testing.assert_close(kept, ops.total_variation(images))


@pytest.mark.parametrize("masked", [False, True])
def test_total_variation_gradient(masked: bool) -> None:
    images = torch.randn(2, 2, 6, 8, dtype=F64, requires_grad=True)
    kept = random_kept(2, 4, 12) if masked else None
    for sign in (1, -1):

        def variation(x: Tensor, sign: int = sign) -> list[Tensor]:
            return [sign * part for part in ops.total_variation(x, kept, patch_size=2)]

        assert torch.autograd.gradcheck(variation, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_total_variation_of_half_precision_images_is_summed_in_float32(dtype: torch.dtype) -> None:
    """The number of differences of one image, and their sum, exceed the largest float16."""
    images = torch.randn(1, 3, 224, 224).to(dtype)
    found = ops.total_variation(images.requires_grad_(), backend="reference")
    expected = ops.total_variation(images.detach().double())
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(sum(found), images)
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_total_variation_of_a_constant_has_gradient_zero() -> None:
    images = torch.ones(1, 3, 4, 4, requires_grad=True)
    l1, l2 = ops.total_variation(images)
    (l1 + l2).backward()
    assert l1 == l2 == 0 and not images.grad.any()


def test_total_variation_of_strided_images() -> None:
    images = torch.randn(2, 5, 6, 3, dtype=F64).permute(0, 3, 2, 1).detach().requires_grad_()
    sum(ops.total_variation(images)).backward()
    dense = images.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    sum(ops.total_variation(dense)).backward()
    torch.testing.assert_close(images.grad, dense.grad)


@pytest.mark.parametrize("sides", [(4, 0), (0, 4), (1, 1)])
def test_total_variation_without_neighbours_is_zero(sides: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *sides, dtype=F64, requires_grad=True)
    l1, l2 = ops.total_variation(images)
    (l1 + l2).backward()
    assert l1 == l2 == 0 and images.grad.shape == images.shape and not images.grad.any()
