"""The engine and the in-place op keep the promises of autograd."""

from __future__ import annotations

import pytest
import torch

from smi_fast import Dense, NonFiniteLoss, Pixels, SparseInverter, SparseViT, ops
from tests.helpers.inversions import SPACE
from tests.helpers.teachers import random_images, relative_error, tiny_vit

OPTIONS = {"schedule": Dense(), "iterations": 3, **SPACE}


def test_a_second_backward_needs_retain_graph(each_backend: str) -> None:
    teacher = tiny_vit()
    images = random_images(teacher).requires_grad_()
    total = SparseViT(teacher)(images).logits.sum()
    (kept,) = torch.autograd.grad(total, images, retain_graph=True)
    (again,) = torch.autograd.grad(total, images)
    assert torch.equal(kept, again)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(total, images)


def test_backward_refuses_images_that_adam_has_changed(each_backend: str) -> None:
    images = torch.randn(1, 3, 8, 8).requires_grad_()
    total = images.square().sum()
    bounds = {"low": -torch.ones(3), "high": torch.ones(3)}
    moments = [torch.zeros_like(images) for _ in range(2)]
    with torch.no_grad():
        ops.adam_clamp_(
            images, torch.ones_like(images), *moments, step=1, lr=0.5, betas=(0.5, 0.9), **bounds
        )
    assert all(tensor._version > 0 for tensor in (images, *moments))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, images)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_without_gradients_do_not_reach_into_an_inversion(context: type) -> None:
    teacher = tiny_vit()

    def images() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        inverter = SparseInverter(teacher, **OPTIONS)
        return inverter.invert([1, 2], generator=generator, progress=False).images

    expected = images()
    with context():
        found = images()
    assert torch.equal(found, expected)


def test_autocast_is_obeyed() -> None:
    """Each layer takes the type that autocast gives it, which the engine could not."""
    teacher = tiny_vit()
    sparse, images = SparseViT(teacher), random_images(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = sparse(images).logits, teacher(images)
        SparseInverter(teacher, **OPTIONS).invert([1, 2], progress=False)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert 0 < relative_error(found.float(), sparse(images).logits) < 0.05


def test_overflow_shows(each_backend: str) -> None:
    teacher = tiny_vit()
    assert SparseViT(teacher)(1e20 * random_images(teacher)).logits.isnan().all()
    init = torch.zeros(1, 3, 32, 48)
    init[0, 0, 0, 0] = 1e30
    inverter = SparseInverter(teacher, parametrization=Pixels(), **OPTIONS)
    with pytest.raises(NonFiniteLoss, match="at iteration 0"):
        inverter.invert([1], init=init, progress=False)
