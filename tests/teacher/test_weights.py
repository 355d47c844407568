"""SparseViT follows the weights that it shares, whatever changes them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from smi_fast import Dense, SparseInverter, SparseViT
from tests.helpers.inversions import SPACE
from tests.helpers.teachers import random_images, relative_error, tiny_vit
from tests.helpers.weight_changes import NOTICED, UNCOUNTED


@pytest.mark.parametrize("name", NOTICED)
def test_changes_are_noticed(each_backend: str, name: str) -> None:
    for _ in range(3):  # freed memory is used again by chance
        teacher = tiny_vit()
        sparse = SparseViT(teacher)
        before = sparse(random_images(teacher)).logits
        NOTICED[name](teacher, sparse)
        images = random_images(teacher).to(sparse.dtype if name != "double" else torch.float64)
        # A cast of the teacher is followed by the next pass; images of the old type tell it.
        if name == "double":
            sparse.refresh()
        found, expected = sparse(images).logits, teacher(images)
        assert relative_error(found, expected) < 1e-5
        assert before.shape == found.shape


@pytest.mark.parametrize("replace", ["data replaced", "load_state_dict(assign=True)"])
def test_in_place_changes_of_replaced_weights_are_noticed(each_backend: str, replace: str) -> None:
    teacher = tiny_vit()
    sparse, images = SparseViT(teacher), random_images(teacher)
    NOTICED[replace](teacher, sparse)
    sparse(images)
    NOTICED["a weight of a block"](teacher, sparse)
    assert relative_error(sparse(images).logits, teacher(images)) < 1e-5


@pytest.mark.parametrize("replace", ["data replaced", "load_state_dict(assign=True)"])
def test_every_replacement_is_noticed(each_backend: str, replace: str) -> None:
    teacher = tiny_vit()
    sparse, images = SparseViT(teacher), random_images(teacher)
    for _ in range(3):
        NOTICED[replace](teacher, sparse)
        assert relative_error(sparse(images).logits, teacher(images)) < 1e-5


def test_images_of_the_old_data_type_are_refused_after_a_cast() -> None:
    teacher = tiny_vit()
    sparse, images = SparseViT(teacher), random_images(teacher)
    teacher.double()
    with pytest.raises(ValueError, match=r"torch.float64 on cpu, got torch.float32"):
        sparse(images)


@pytest.mark.parametrize("name", UNCOUNTED)
def test_refresh_follows_what_torch_does_not_count(each_backend: str, name: str) -> None:
    teacher = tiny_vit()
    sparse, images = SparseViT(teacher), random_images(teacher)
    sparse(images)
    UNCOUNTED[name](teacher, sparse)
    sparse.refresh()
    assert relative_error(sparse(images).logits, teacher(images)) < 1e-5


@pytest.mark.parametrize("name", UNCOUNTED)
def test_every_inversion_starts_with_a_refresh(name: str) -> None:
    teacher = tiny_vit()
    options = {"schedule": Dense(), "iterations": 3, **SPACE}
    inverter = SparseInverter(teacher, **options)

    def images(from_inverter: SparseInverter) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return from_inverter.invert([1, 2], generator=generator, progress=False).images

    images(inverter)
    UNCOUNTED[name](teacher, inverter.teacher)
    assert torch.equal(images(inverter), images(SparseInverter(teacher, **options)))


def test_a_moved_copy_has_weights_of_its_own() -> None:
    teacher = tiny_vit()
    sparse, images = SparseViT(teacher), random_images(teacher)
    expected = teacher.double()(images.double())
    teacher.float()
    sparse.double()
    with torch.no_grad():
        teacher.cls_token.mul_(3)
    assert relative_error(sparse(images.double()).logits, expected) < 1e-5


@pytest.mark.parametrize("passes", [0, 3, 14])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_work_at_any_time(passes: int, way: str) -> None:
    sparse = SparseViT(tiny_vit())
    images = random_images(sparse.vit)
    for _ in range(passes):
        sparse(images.clone().requires_grad_()).logits.sum().backward()
    if way == "deepcopy":
        copied = copy.deepcopy(sparse)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(sparse))
    else:
        file = io.BytesIO()
        torch.save(sparse, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert torch.equal(copied(images).logits, sparse(images).logits)
    with torch.no_grad():
        copied.vit.cls_token.mul_(2)
    assert not torch.equal(copied(images).logits, sparse(images).logits)


def test_a_saved_teacher_has_its_weights_once() -> None:
    sparse = SparseViT(tiny_vit())
    held = sum(weight.nbytes for weight in sparse.vit.parameters())
    assert held < len(pickle.dumps(sparse)) < 1.5 * held


def test_training_is_refused() -> None:
    with pytest.raises(ValueError, match="computes no gradients of weights"):
        SparseViT(tiny_vit()).requires_grad_(True)
    frozen = SparseViT(tiny_vit()).requires_grad_(False)
    assert not any(weight.requires_grad for weight in frozen.parameters())
