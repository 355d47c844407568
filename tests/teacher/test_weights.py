"""SparseViT follows the weights that it shares, whatever changes them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast import Dense, SparseInverter, SparseViT
from tests.helpers.inversions import SPACE
from tests.helpers.teachers import random_images, relative_error, tiny_vit

Change = Callable[[VisionTransformer, SparseViT], object]


def other_weights() -> dict[str, torch.Tensor]:
    return {name: 1.5 * weight for name, weight in tiny_vit().state_dict().items()}


def optimiser(make: type, **options: object) -> Change:
    def change(teacher: VisionTransformer, sparse: SparseViT) -> None:
        steps = make(teacher.parameters(), lr=0.05, **options)
        teacher(random_images(teacher)).square().sum().backward()
        steps.step()

    return change


def replace_data(teacher: VisionTransformer, sparse: SparseViT) -> None:
    for weight in teacher.parameters():
        weight.data = 1.1 * weight.data


def replace_data_of_the_copy(teacher: VisionTransformer, sparse: SparseViT) -> None:
    for ours, weight in zip(sparse.vit.parameters(), teacher.parameters(), strict=True):
        ours.data = 1.1 * ours.data
        weight.data = ours.data


def replace_twice(teacher: VisionTransformer, sparse: SparseViT) -> None:
    """Without a pass in between, so that freed memory may be used again."""
    for factor in (0.9, 1.2):
        for weight in teacher.parameters():
            weight.data = factor * weight.data


def new_parameter(teacher: VisionTransformer, sparse: SparseViT) -> None:
    mlp = teacher.blocks[1].mlp
    mlp.fc1.weight = nn.Parameter(torch.randn_like(mlp.fc1.weight))


@torch.no_grad()
def in_place(name: str, teacher: VisionTransformer) -> None:
    teacher.get_parameter(name).mul_(1.5)


NOTICED: dict[str, Change] = {
    "load_state_dict": lambda t, s: t.load_state_dict(other_weights()),
    "load_state_dict(assign=True)": lambda t, s: t.load_state_dict(other_weights(), assign=True),
    "load_state_dict of the copy": lambda t, s: s.vit.load_state_dict(other_weights()),
    "class token": lambda t, s: in_place("cls_token", t),
    "class token through .data": lambda t, s: t.cls_token.data.mul_(1.5),
    "positions": lambda t, s: in_place("pos_embed", t),
    "a weight of a block": lambda t, s: in_place("blocks.0.attn.qkv.weight", t),
    "SGD": optimiser(torch.optim.SGD),
    "AdamW": optimiser(torch.optim.AdamW),
    "data replaced": replace_data,
    "data of the copy replaced": replace_data_of_the_copy,
    "replaced twice": replace_twice,
    "a new parameter": new_parameter,
    "half and back": lambda t, s: t.half().float(),
    "double": lambda t, s: t.double(),
}


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


# torch doesn't count these, so nothing cheap can notice them.
UNCOUNTED: dict[str, Change] = {
    "fused AdamW": optimiser(torch.optim.AdamW, fused=True),
    "fused SGD": optimiser(torch.optim.SGD, fused=True),
    "weights through .data": lambda t, s: [p.data.mul_(1.1) for p in t.parameters()],
    "EMA through .data": lambda t, s: [p.data.lerp_(0 * p, 0.1) for p in t.parameters()],
}


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


def test_training_is_refused() -> None:
    with pytest.raises(ValueError, match="computes no gradients of weights"):
        SparseViT(tiny_vit()).requires_grad_(True)
    frozen = SparseViT(tiny_vit()).requires_grad_(False)
    assert not any(weight.requires_grad for weight in frozen.parameters())
