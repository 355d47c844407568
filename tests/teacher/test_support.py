"""Which teachers are taken, and what is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import SparseViT, UnsupportedTeacher
from tests.helpers.teachers import make_teacher, patch_as_published, relative_error


def test_model_patched_by_the_published_code_is_the_model_it_was() -> None:
    teacher = make_teacher("deit_tiny_patch16_224", depth=2)
    images = torch.randn(1, 3, 224, 224)
    expected = teacher(images)
    patch_as_published(teacher)
    assert relative_error(SparseViT(teacher)(images).logits, expected) < 1e-5
    assert teacher.forward.__name__ == "vit_forward"


def replaced_forward(teacher: VisionTransformer) -> VisionTransformer:
    teacher.forward = lambda images: images
    return teacher


class OwnHead(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x[:, 0]


def changed(path: str, module: nn.Module) -> VisionTransformer:
    teacher = make_teacher("deit_tiny_patch16_224", depth=2)
    teacher.set_submodule(path, module)
    return teacher


def other_scale() -> VisionTransformer:
    teacher = make_teacher("deit_tiny_patch16_224", depth=2)
    teacher.blocks[1].attn.scale = 0.25
    return teacher


def pooled_by_place() -> VisionTransformer:
    teacher = make_teacher("vit_base_patch16_siglip_224", depth=1)
    teacher.attn_pool.pos_embed = nn.Parameter(torch.zeros(196, 768))
    return teacher


def eva(**options: object) -> Eva:
    return make_teacher("eva02_tiny_patch14_224", **options)


def prefix_of_another() -> Eva:
    teacher = eva()
    teacher.blocks[1].attn.num_prefix_tokens = 0
    return teacher


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "expected a timm VisionTransformer or Eva, got torch.nn.*Linear"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), "Beit"),
        (lambda: timm.create_model("vit_relpos_small_patch16_224"), "VisionTransformerRelPos"),
        (lambda: eva(use_post_norm=True), "blocks.0 to be Block or EvaBlock, got EvaBlockPostNorm"),
        (lambda: prefix_of_another(), "attn to leave the 1 prefix tokens unrotated, got 0"),
        (lambda: replaced_forward(make_teacher("deit_tiny_patch16_224")), "forward replaced"),
        (lambda: OwnHead(depth=1, embed_dim=48, num_heads=3), "OwnHead with a forward_head"),
        (lambda: changed("blocks.1.attn", nn.Identity()), "blocks.1.attn to be Attention"),
        (lambda: changed("blocks.0.mlp", nn.Identity()), "blocks.0.mlp to be Mlp or .*"),
        (lambda: timm.create_model("vit_tiny_patch16_224", global_pool=""), "global_pool=''"),
        (lambda: VisionTransformer(patch_size=(8, 16), depth=1), "square patches, .* 8 x 16"),
        (lambda: changed("patch_embed.proj", nn.Conv2d(3, 192, 16, 8)), "once, got overlaps"),
        (lambda: other_scale(), r"blocks.1.attn to scale by 1/sqrt\(64\), got 0.25"),
        (lambda: pooled_by_place(), "attn_pool has positions of its own, kept patches don't"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(UnsupportedTeacher, match=message):
        SparseViT(make())


def test_register_tokens_that_a_distilled_teacher_never_reads_are_left_out() -> None:
    teacher = VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, reg_tokens=3
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(SparseViT(teacher)(images).logits, teacher(images))
