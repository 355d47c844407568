"""Rotary position embeddings (RoPE) of kept patches: each is rotated by its own place."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor


@torch.no_grad()
def rotations(vit: Any, positions: Tensor) -> list[Tensor] | None:
    """The rotations of patches in each block, or None for a teacher without RoPE.

    Args:
        vit: the teacher.
        positions: int64 [B, K], where each patch lies on the grid.

    Returns:
        for each block the sines and cosines [B, K, 1 or heads, 2d] of channels of a head. The
        blocks share one tensor, except in "mixed" RoPE, in which every head has its own.
    """
    rope = getattr(vit, "rope", None)
    if rope is None:
        return None
    if not vit.dynamic_img_size and hasattr(rope, "feat_shape"):
        table = rope.get_embed()
    else:
        table = rope.get_embed(shape=vit.patch_embed.grid_size)
    if vit.rope_mixed:  # [depth, heads, patches, 2d]
        return [block.transpose(0, 1)[positions] for block in table]
    return [table[positions].unsqueeze(2)] * len(vit.blocks)


def rotate(attention: Any, x: Tensor, rotation: Tensor | None) -> Tensor:
    """The queries or keys x [B, R, H, d] of the first tokens, rotated from the first patch on."""
    prefix = attention.num_prefix_tokens if rotation is not None else x.shape[1]
    if rotation is None or x.shape[1] <= prefix:
        return x
    patches, count = x[:, prefix:], x.shape[1] - prefix
    half = getattr(attention, "rotate_half", False)
    rotated = apply_rot_embed_cat(patches, rotation[:, :count], half=half).type_as(x)
    return torch.cat([x[:, :prefix], rotated], dim=1) if prefix else rotated
