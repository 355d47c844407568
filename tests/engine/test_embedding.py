"""The tokens in front of the first block, which the CPU engine makes of patches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from smi_fast.engine.cpu import CpuEngine
from smi_fast.engine.embedding import Embedding, embed_patches
from smi_fast.teacher import embedding
from tests.helpers.kernels import needs_cpp
from tests.helpers.teachers import make_teacher

pytestmark = needs_cpp

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def inputs(batch: int, kept: int, length: int = 768) -> tuple[Tensor, Tensor]:
    """Patches [B, K, C·P·P] and their positions of 16."""
    positions = torch.stack([torch.randperm(16)[:kept] for _ in range(batch)] or [torch.empty(0)])
    return torch.randn(batch, kept, length), positions.long()[:batch]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3},
        {"no_embed_class": True, "reg_tokens": 2},
        {"pos_embed": "none"},
        {"pre_norm": True},
        {"in_chans": 1, "embed_dim": 189},
    ],
    ids=str,
)
def test_equals_layers_of_torch(options: dict[str, object], dtype: torch.dtype) -> None:
    vit = make_teacher("vit_tiny_patch16_224", img_size=64, depth=1, **options).to(dtype)
    check(vit.requires_grad_(False), dtype)


def test_equals_a_distilled_teacher_and_one_without_a_bias() -> None:
    vit = make_teacher("deit_tiny_distilled_patch16_224", img_size=64, depth=1)
    assert isinstance(vit, VisionTransformerDistilled)
    vit.patch_embed.proj.bias = None
    check(vit.requires_grad_(False), torch.float32)


def check(vit: VisionTransformerDistilled, dtype: torch.dtype) -> None:
    length = vit.patch_embed.proj.weight[0].numel()
    engine = CpuEngine(vit.blocks)
    for batch, kept in ((2, 5), (3, 1), (1, 16), (2, 0)):
        patches, positions = inputs(batch, kept, length)
        # Patches and their gradient may have any strides.
        patches = patches.to(dtype).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        ours = embedding.embed(vit, patches, positions, engine)
        theirs = vit.norm_pre(embedding.patch_tokens(vit, patches, positions))
        close = partial(torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        close(ours, theirs)
        grad = torch.randn_like(theirs.mT).mT
        found, right = (torch.autograd.grad(y, patches, grad)[0] for y in (ours, theirs))
        close(found, right)
        named = "_EmbedPatches" in str(ours.grad_fn) + str(ours.grad_fn.next_functions)
        assert named, "the engine embedded the patches"


def test_a_position_out_of_range_is_refused() -> None:
    patches, positions = inputs(2, 4)
    weights = Embedding(torch.randn(6, 768), None, torch.randn(1, 1, 6), None, torch.randn(16, 6))
    positions[1, 2] = 16
    with pytest.raises(RuntimeError, match=r"expected positions in \[0, 16\), got 16 at \[1, 2\]"):
        embed_patches(patches, positions, weights)
