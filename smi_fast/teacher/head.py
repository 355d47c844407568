"""What a teacher's head reads, and how many numbers it gives."""

from __future__ import annotations

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


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


def logits_of(vit: VisionTransformer, x: Tensor) -> Tensor:
    """The logits [B, classes] of normalised tokens [B, R, D], those that the head reads.

    Equal to ``vit.forward_head(x)``. Where the head reads one token, that is all there is: a token
    that is picked out of several has a gradient of zeros for the others, which fills memory.
    """
    if rows_read(vit) == 1 and x.shape[1] == 1:
        logits: Tensor = vit.head(vit.head_drop(vit.fc_norm(x.squeeze(1))))
    else:
        logits = vit.forward_head(x)
    return logits
