"""What a teacher's head reads, and how many numbers it gives."""

from __future__ import annotations

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@torch.no_grad()
def classes(vit: VisionTransformer) -> int:
    """Length of the logits. A head that replaced timm's doesn't change the model's num_classes."""
    if isinstance(vit.head, nn.Identity):
        return 0
    return int(vit.head(vit.patch_embed.proj.weight.new_zeros(1, vit.embed_dim)).shape[-1])


def rows_read(vit: VisionTransformer) -> int | None:
    """Number of tokens, from the first, that the head reads after the last block; None for all."""
    if vit.global_pool != "token" or vit.attn_pool is not None:
        return None
    return int(vit.num_prefix_tokens) if isinstance(vit, VisionTransformerDistilled) else 1
