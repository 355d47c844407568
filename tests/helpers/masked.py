"""timm's own model as the yardstick of a kept subset: nothing is gathered before the head."""

from __future__ import annotations

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Masked(nn.Module):
    """timm's own model of whole images, in which no token attends to a patch that isn't kept.

    Its head reads the prefix tokens and the kept patches. So nothing is gathered before the head,
    and timm itself rotates each patch.
    """

    def __init__(self, teacher: VisionTransformer | Eva, kept: Tensor) -> None:
        super().__init__()
        self.teacher = teacher
        prefix = torch.arange(teacher.num_prefix_tokens).expand(len(kept), -1)
        self.rows = torch.cat([prefix, kept + teacher.num_prefix_tokens], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        count = self.teacher.num_prefix_tokens + self.teacher.patch_embed.num_patches
        seen = torch.zeros(len(self.rows), count, dtype=torch.bool).scatter(1, self.rows, True)
        mask = seen[:, None, None].expand(-1, 1, count, -1)
        x = self.teacher.forward_features(images, attn_mask=mask)
        x = x.gather(1, self.rows[..., None].expand(-1, -1, x.shape[2]))
        logits: Tensor = self.teacher.forward_head(x)
        return logits
