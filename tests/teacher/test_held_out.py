"""ViTs that nothing was written for: timm's own names, dense, and on random kept patches in motion.

Their geometry is the model's own, but for few blocks and small images, and the widest are narrower.
"""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import SparseViT, ops
from smi_fast.jitter import jitter_images
from smi_fast.verify.cases import random_kept
from tests.helpers.masked import Masked
from tests.helpers.teachers import (
    EVA,
    TEACHERS,
    make_teacher,
    random_images,
    relative_error,
    with_gradient,
)

NAMES = {
    "eva02_small_patch14_224": {"img_size": 70},
    "eva02_large_patch14_224": {"img_size": 70, "embed_dim": 256, "num_heads": 4},
    "eva02_large_patch14_clip_224": {"img_size": (56, 84), "embed_dim": 256, "num_heads": 4},
    "vit_base_patch16_dinov3": {"img_size": (64, 112)},
    "vit_huge_plus_patch16_dinov3": {"img_size": 80, "embed_dim": 320, "num_heads": 5},
    "vit_base_patch14_reg4_dinov2": {"img_size": (56, 98)},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 70, "embed_dim": 384, "num_heads": 6},
    "vit_betwixt_patch16_reg4_gap_256": {"img_size": 80},
    "vit_base_patch16_siglip_256.v2_webli": {"img_size": 80},
    "vit_so400m_patch14_siglip_gap_224": {"img_size": 70, "embed_dim": 288, "num_heads": 4},
    "vit_base_patch32_clip_224.openai": {"img_size": (128, 192)},
    "vit_large_patch14_clip_224": {"img_size": 70, "embed_dim": 256, "num_heads": 4},
    "deit3_small_patch16_224": {"img_size": (64, 112)},
    "deit3_medium_patch16_224": {"img_size": 80},
    "aimv2_large_patch14_224": {"img_size": (56, 98), "embed_dim": 256, "num_heads": 2},
    "vit_pe_core_base_patch16_224": {"img_size": 80},
    "vit_base_patch16_rope_mixed_ape_224": {"img_size": (64, 112)},
}


def teacher_of(name: str) -> VisionTransformer:
    return make_teacher(name, depth=2, **NAMES[name])


def test_there_are_twelve_or_more_and_none_is_used_elsewhere() -> None:
    assert len(NAMES) >= 12 and not NAMES.keys() & {*EVA, *TEACHERS}


@pytest.mark.parametrize("name", NAMES)
def test_every_patch(name: str) -> None:
    teacher = teacher_of(name)
    sparse, images = SparseViT(teacher), random_images(teacher)
    expected, found = with_gradient(teacher, images), with_gradient(sparse, images)
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-4
    teacher, sparse, images = teacher.double(), sparse.double(), images.double()
    expected, found = with_gradient(teacher, images), with_gradient(sparse, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_random_patches_under_jitter(name: str) -> None:
    """timm's own model of whole jittered images, in which the other patches are masked."""
    teacher = teacher_of(name).double()
    sparse, images = SparseViT(teacher, probe=False), random_images(teacher).double()
    high, wide = sparse.image_size
    for flip in (False, True):
        kept = random_kept(2, int(torch.randint(2, 12, ())), sparse.num_patches)
        shift = torch.stack([torch.randint(-side, side, ()) for side in (high, wide)])
        flips = torch.tensor(flip)
        _, places = ops.gather_patches(images, kept, shift, flips, patch_size=sparse.patch_size)
        expected = Masked(teacher, places)(jitter_images(images, shift, flips))
        found = sparse(images, kept, jitter=(shift, flips)).logits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
