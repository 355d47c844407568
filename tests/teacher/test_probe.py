"""A teacher is computed exactly, or refused with a sentence that names the module."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import SparseViT, UnsupportedTeacher
from smi_fast.teacher.probe import TOLERANCE
from tests.helpers.layers import Adapter, Times, conv, linear, norm
from tests.helpers.teachers import random_images, relative_error, tiny_vit, with_gradient


def replaced(path: str, make: Callable[[nn.Module], nn.Module]) -> VisionTransformer:
    teacher = tiny_vit()
    teacher.set_submodule(path, make(teacher.get_submodule(path)))
    return teacher.eval()


# Layers whose own forward is called, or that keep their block out of the engine.
EXACT = [
    *((f"blocks.{i}.{name}", linear) for i in (0, 1) for name in ("attn.proj", "mlp.fc1")),
    ("blocks.0.mlp.fc2", linear),
    ("blocks.1.mlp.fc2", Adapter),
    ("blocks.1.attn.proj", Adapter),
    ("head", linear),
    ("blocks.0.norm1", norm),
    ("blocks.1.norm2", norm),
    ("norm", norm),
    ("norm_pre", lambda _: Times()),
]


@pytest.mark.parametrize(("path", "make"), EXACT)
def test_changed_layers_that_are_called_are_exact(
    path: str, make: Callable[[nn.Module], nn.Module]
) -> None:
    teacher = replaced(path, make)
    images = random_images(teacher)
    pairs = zip(
        with_gradient(SparseViT(teacher), images), with_gradient(teacher, images), strict=True
    )
    assert all(relative_error(ours, own) < 1e-5 for ours, own in pairs)


REFUSED = [
    ("blocks.0.attn.qkv", linear, r"blocks\.0\.attn\.qkv to be a plain Linear.*merge"),
    ("blocks.1.attn.qkv", Adapter, r"blocks\.1\.attn\.qkv to be a plain Linear.*Adapter"),
    ("patch_embed.proj", conv, r"patch_embed\.proj to be a plain Conv2d"),
    ("pos_drop", lambda _: Times(), "pos_drop to do nothing in eval mode"),
    ("blocks.1.drop_path1", lambda _: Times(), r"blocks\.1\.drop_path1 to do nothing"),
    ("blocks.0.attn.proj_drop", lambda _: Times(), r"blocks\.0\.attn\.proj_drop to do nothing"),
]


@pytest.mark.parametrize(("path", "make", "message"), REFUSED)
def test_changed_layers_that_would_be_ignored_are_refused(
    path: str, make: Callable[[nn.Module], nn.Module], message: str
) -> None:
    with pytest.raises(UnsupportedTeacher, match=message):
        SparseViT(replaced(path, make))


@pytest.mark.parametrize(
    "path", ["", "blocks.0.mlp", "blocks.1.norm1", "head", "patch_embed", "pos_drop", "norm"]
)
def test_a_replaced_forward_is_refused(path: str) -> None:
    teacher = tiny_vit()
    module = teacher.get_submodule(path)
    original = module.forward
    module.forward = lambda *given, **options: 1.1 * original(*given, **options)
    with pytest.raises(UnsupportedTeacher, match=f"{path or 'the teacher'} has its forward"):
        SparseViT(teacher)


@pytest.mark.parametrize("path", ["", "blocks.0", "blocks.1.mlp", "norm", "head"])
def test_a_hook_is_refused(path: str) -> None:
    teacher = tiny_vit()
    handle = teacher.get_submodule(path).register_forward_hook(lambda module, x, y: 2 * y)
    with pytest.raises(UnsupportedTeacher, match=r"has a hook \(function\)"):
        SparseViT(teacher)
    handle.remove()
    SparseViT(teacher)


def published_forward(self: VisionTransformer, x: Tensor, absolute: Tensor, relative: Tensor):
    """Stands for a fork that reuses the published names, and computes something else."""
    return self.head(self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))[:, 0]), [], None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 1.1 * x, "computes something else than timm's: the logits of one image differ"),
        # The value stays, the gradient is cut: logits alone would not tell.
        (lambda x: x.detach() + 0 * x, "the pixel gradients of one image differ by"),
        (lambda x: x * torch.nan, "the logits of one image differ by nan"),
    ],
)
def test_a_patch_with_a_published_name_is_judged_by_what_it_computes(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    def vit_forward(self: VisionTransformer, x: Tensor, absolute: Tensor, relative: Tensor):
        return published_forward(self, change(x), absolute, relative)

    teacher = tiny_vit()
    teacher.forward = MethodType(vit_forward, teacher)
    with pytest.raises(UnsupportedTeacher, match=message):
        SparseViT(teacher)


def test_a_patch_that_computes_the_same_is_accepted() -> None:
    def vit_forward(self: VisionTransformer, x: Tensor, absolute: Tensor, relative: Tensor):
        return published_forward(self, x, absolute, relative)

    teacher, images = tiny_vit(), random_images(tiny_vit())
    expected = teacher(images)
    teacher.forward = MethodType(vit_forward, teacher)
    torch.testing.assert_close(SparseViT(teacher)(images).logits, expected)


def test_a_patch_that_fails_is_refused() -> None:
    def vit_forward(self: VisionTransformer, x: Tensor) -> Tensor:
        return x

    teacher = tiny_vit()
    teacher.forward = MethodType(vit_forward, teacher)
    with pytest.raises(UnsupportedTeacher, match=r"own forward fails on one image \(TypeError"):
        SparseViT(teacher)


def test_a_teacher_that_only_its_own_forward_can_compute_is_refused() -> None:
    teacher = tiny_vit()
    teacher.num_prefix_tokens = 2
    teacher(random_images(teacher))
    with pytest.raises(UnsupportedTeacher, match=r"SparseViT can't compute this teacher \("):
        SparseViT(teacher)


def test_the_first_block_that_differs_is_named() -> None:
    def vit_block_forward(self: nn.Module, x: Tensor) -> Tensor:
        return type(self).forward(self, 1.1 * x)

    teacher = tiny_vit()
    teacher.blocks[1].forward = MethodType(vit_block_forward, teacher.blocks[1])
    with pytest.raises(UnsupportedTeacher, match=r"^blocks\.1 computes something else"):
        SparseViT(teacher)


def test_probe_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def vit_block_forward(self: nn.Module, x: Tensor) -> Tensor:
        return 0 * x

    teacher = tiny_vit()
    teacher.blocks[1].forward = MethodType(vit_block_forward, teacher.blocks[1])
    SparseViT(teacher, probe=False)


def test_rounding_of_large_weights_is_told_from_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 decides when float32 exceeds the tolerance."""
    monkeypatch.setattr("smi_fast.teacher.probe.TOLERANCE", 1e-12)
    assert TOLERANCE == 1e-3
    SparseViT(tiny_vit())


def test_probe_leaves_the_teacher_and_the_generator_alone() -> None:
    teacher = tiny_vit().train()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    state = torch.get_rng_state()
    SparseViT(teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training and all(
        p.requires_grad and p.grad is None for p in teacher.parameters()
    )
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_data_types_are_probed(dtype: torch.dtype) -> None:
    SparseViT(tiny_vit().to(dtype), backend="reference")


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (nn.DataParallel, r"pass teacher\.module"),
        (torch.compile, r"pass teacher\._orig_mod"),
        (lambda t: type("Peft", (nn.Module,), {"merge_and_unload": 0})(), "merge_and_unload"),
        (lambda t: type("HF", (nn.Module,), {"timm_model": t})(), r"pass teacher\.timm_model"),
        (lambda t: type("Clip", (nn.Module,), {"visual": t})(), r"teacher\.visual\.trunk"),
    ],
)
def test_a_wrapped_teacher_is_told_where_it_is(wrap: Callable, hint: str) -> None:
    with pytest.raises(UnsupportedTeacher, match=hint):
        SparseViT(wrap(tiny_vit()))


def test_weight_norm_parametrized_is_exact_and_old_weight_norm_is_refused() -> None:
    teacher = tiny_vit()
    torch.nn.utils.parametrizations.weight_norm(teacher.blocks[0].attn.qkv)
    images = random_images(teacher)
    assert relative_error(SparseViT(teacher)(images).logits, teacher(images)) < 1e-5
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(teacher.blocks[1].mlp.fc1)
    with pytest.raises(UnsupportedTeacher, match=r"blocks\.1\.mlp\.fc1 has a hook \(WeightNorm\)"):
        SparseViT(teacher)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_weights_are_refused() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(tiny_vit(), {nn.Linear})
    with pytest.raises(UnsupportedTeacher, match=r"blocks\.0\.attn\.qkv to be a plain Linear"):
        SparseViT(quantised)


def test_a_size_that_patches_do_not_divide_is_refused_at_wrapping() -> None:
    with pytest.raises(UnsupportedTeacher, match=r"the patch size 8 divides, got \(33, 33\)"):
        SparseViT(tiny_vit(33))


def test_classes_are_those_of_a_replaced_head() -> None:
    teacher = tiny_vit()
    teacher.head = nn.Linear(32, 17)
    assert SparseViT(teacher).num_classes == 17


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        teacher = tiny_vit()
    with pytest.raises(UnsupportedTeacher, match=r"made in torch\.inference_mode"):
        SparseViT(teacher)
