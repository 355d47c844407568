"""Seams, the target of variation and the norm, against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import smi_fast
from tests.helpers.loss_inputs import F64, compare, loss_inputs
from tests.helpers.teachers import make_teacher


def plain_seams(images: Tensor, mask: Tensor) -> Tensor:
    """Seam by seam; mask [B, rows, columns] of patches whose jumps count."""
    total, size = 0.0, 4
    for axis in (2, 3):
        for k in range(1, images.shape[axis] // size):
            jump = images.select(axis, size * k) - images.select(axis, size * k - 1)
            counts = mask.select(axis - 1, k) | mask.select(axis - 1, k - 1)
            total = total + torch.norm(jump * counts.repeat_interleave(size, 1)[:, None])
    return total


@pytest.mark.parametrize("sparse", [False, True])
def test_patch_seams(sparse: bool) -> None:
    images = torch.randn(2, 3, 12, 16, dtype=F64)
    active = torch.tensor([[0, 5], [6, 7]]) if sparse else None
    mask = torch.ones(2, 12, dtype=torch.bool)
    if sparse:
        mask = torch.zeros_like(mask).scatter(1, active, True)
    mask, objective = mask.reshape(2, 3, 4), smi_fast.PatchSeamTV()

    def ours(x: Tensor) -> Tensor:
        return objective(loss_inputs(x, active=active))

    compare(ours, lambda x: plain_seams(x, mask), images)
    images.requires_grad_()
    assert torch.autograd.gradcheck(ours, images)
    flat = torch.ones(1, 3, 8, 8, requires_grad=True)
    objective(loss_inputs(flat)).backward()
    assert not flat.grad.any()


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_variation_of_active_patches(norm: str) -> None:
    """A frozen pixel counts only in differences with an active one."""
    images, active = torch.randn(2, 3, 12, 16, dtype=F64), torch.tensor([[0, 5], [6, 7]])
    objective, image = smi_fast.TotalVariation(norm=norm), slice(1, 2)

    def plain(x: Tensor) -> Tensor:
        pairs = (
            smi_fast.ops.total_variation(x[i : i + 1], active[i : i + 1], patch_size=4)
            for i in range(2)
        )
        return sum(pair[norm == "l2"] for pair in pairs) / 2

    compare(lambda x: objective(loss_inputs(x, active=active)), plain, images)
    others = images.clone()
    others[image, :, :3] += 1.0
    values = [objective(loss_inputs(x[image], active=active[image])) for x in (images, others)]
    assert torch.equal(*values)


def test_variation_target() -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=32, depth=1))
    objective = smi_fast.VariationTarget()
    drawn = []
    for seed in range(20):
        objective.begin(teacher, 8, torch.Generator().manual_seed(seed))
        drawn.append(objective._target.item() * (32 * 224 * 224 / (8 * 32 * 32)) ** 0.5)
    assert 2500 <= min(drawn) < 2650 and 2850 < max(drawn) <= 3000
    target = objective._target.double()

    def plain(x: Tensor) -> Tensor:
        straight = (x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :])
        slanted = (x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:])
        return (sum(map(torch.norm, straight + slanted)) - target).abs()

    for scale in (0.1, 10):
        images = scale * torch.randn(8, 3, 8, 8, dtype=F64)
        compare(lambda x: objective(loss_inputs(x)), plain, images)


def test_norm_of_each_image() -> None:
    images = torch.randn(3, 3, 4, 4, dtype=F64)
    value = smi_fast.L2Norm()(loss_inputs(images))
    torch.testing.assert_close(value, sum(torch.norm(image) for image in images) / 3)
    torch.testing.assert_close(
        smi_fast.L2Norm(per_image=False)(loss_inputs(images)), torch.norm(images)
    )
