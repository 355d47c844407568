"""A student on kept patches computes what timm computes of whole images that attend to these."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smi_fast import SparseStudent, SparseViT, UnsupportedTeacher, ops
from tests.helpers.masked import Masked
from tests.helpers.teachers import TEACHERS, make_teacher, patch_as_published, random_images


def sparse(model: nn.Module, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two images, and their patches [2, count, C·P·P] at distinct places int64 [2, count]."""
    images = random_images(model).double()
    patches = model.patch_embed.num_patches
    kept = torch.stack([torch.randperm(patches)[:count].sort().values for _ in images])
    size = model.patch_embed.patch_size[0]
    return images, ops.gather_patches(images, kept, patch_size=size)[0], kept


def weight_gradients(model: nn.Module, output: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    parts = [output] if isinstance(output, Tensor) else output
    loss = sum(((number + 1) * part).square().sum() for number, part in enumerate(parts))
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {key: each for key, each in zip(named, found, strict=True) if each is not None}


@pytest.mark.parametrize("name", TEACHERS)
def test_output_and_weight_gradients_are_those_of_masked_whole_images(name: str) -> None:
    model = make_teacher(name, depth=2).double().train()
    if "distilled" in name:
        model.set_distilled_training(True)
    images, patches, kept = sparse(model, 9)
    expected = Masked(model, kept)(images)
    found = SparseStudent(model)(patches, kept)
    torch.testing.assert_close(found, expected)
    wanted, got = weight_gradients(model, expected), weight_gradients(model, found)
    assert got.keys() == wanted.keys() and len(got) > 10
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[key], msg=key)


def test_all_patches_are_the_whole_image() -> None:
    model = make_teacher("deit_tiny_patch16_224", depth=2).double()
    images, patches, kept = sparse(model, 196)
    torch.testing.assert_close(SparseStudent(model)(patches, kept), model(images))


def test_training_is_that_of_the_model() -> None:
    model = make_teacher("deit_tiny_patch16_224", depth=2, drop_path_rate=0.5, pos_drop_rate=0.5)
    student = SparseStudent(model.double())
    _, patches, kept = sparse(model, 9)
    assert dict(student.named_parameters()).keys() == {
        f"model.{name}" for name, _ in model.named_parameters()
    }
    student.eval()
    still = student(patches, kept)
    assert torch.equal(student(patches, kept), still)
    torch.testing.assert_close(SparseViT(model).forward_patches(patches, kept).logits, still)
    student.train()
    dropping = [module for module in model.modules() if isinstance(module, DropPath)]
    assert not torch.allclose(student(patches, kept), still)
    for module in dropping:
        module.drop_prob = 0.0
    assert not torch.allclose(student(patches, kept), still)
    model.pos_drop.p = 0.0
    torch.testing.assert_close(student(patches, kept), still)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    student(patches, kept).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])


def test_checkpointing_gives_the_same_gradients() -> None:
    model = make_teacher("deit_tiny_patch16_224", depth=2).double().train()
    student = SparseStudent(model)
    _, patches, kept = sparse(model, 9)
    expected = weight_gradients(model, student(patches, kept))
    model.set_grad_checkpointing()
    calls = []
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = weight_gradients(model, student(patches, kept))
    hook.remove()
    assert len(calls) == 2  # forward, and again for backward
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key])


def test_only_kept_tokens_are_computed() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=10)
    student, flops = SparseStudent(model), []
    for count in (48, 195):
        patches = torch.zeros(1, count, 768)
        kept = torch.arange(count)[None]
        with FlopCounterMode(display=False) as counter:
            student(patches, kept).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] < 49 / 196 * flops[1]  # linear layers by tokens, attention by their square


def test_what_cannot_be_trained() -> None:
    with pytest.raises(UnsupportedTeacher, match=r"a timm VisionTransformer to train, got Linear"):
        SparseStudent(nn.Linear(2, 2))
    with pytest.raises(UnsupportedTeacher, match="to train, got Eva"):
        SparseStudent(make_teacher("vit_small_patch16_rope_224"))
    model = make_teacher("deit_tiny_patch16_224", depth=1)
    with pytest.raises(UnsupportedTeacher, match="timm's own methods, got a model with patched"):
        SparseStudent(patch_as_published(copy.deepcopy(model)))
    model.patch_drop = PatchDropout(0.5)
    with pytest.raises(UnsupportedTeacher, match="got one with patch_drop_rate"):
        SparseStudent(model)
    student = SparseStudent(make_teacher("deit_tiny_patch16_224", depth=1))
    kept = torch.tensor([[0, 196]])
    with pytest.raises(ValueError, match=r"expected kept in 0..195, got 0..196"):
        student(torch.zeros(1, 2, 768), kept)
    with pytest.raises(ValueError, match=r"expected patches torch.float32 \[B, K, 768\]"):
        student(torch.zeros(1, 3, 224, 224), kept)
