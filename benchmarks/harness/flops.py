"""The arithmetic that a step of inversion can't do without."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer


def forward_flops(vit: VisionTransformer, kept: int) -> tuple[int, int]:
    """FLOPs of one image's forward pass on kept patches: of linear layers, and of attention.

    A multiplication and its addition are two. Only matrix products count. Of the last block only
    the class row is computed, and what that row reads: the keys and values of all tokens.
    """
    width, tokens = vit.embed_dim, kept + vit.num_prefix_tokens
    per_token = sum(
        layer.weight.numel()
        for block in vit.blocks[:1]
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    )
    whole_blocks = len(vit.blocks) - 1
    keys_and_values = 2 * width**2
    linear = (
        kept * vit.patch_embed.proj.weight.numel()
        + (whole_blocks * tokens + 1) * per_token
        + (tokens - 1) * keys_and_values
        + vit.head.weight.numel()
    )
    attention = 2 * width * tokens * (whole_blocks * tokens + 1)
    return 2 * linear, 2 * attention


def needed_flops(vit: VisionTransformer, batch: int, kept: int) -> int:
    """FLOPs of a step: forward, and as much again for the gradient of the images.

    Weights are frozen, so a linear layer's gradient is one product of the same size. Attention's
    are two for each of its own; counting one leaves out about a hundredth of the step, so that
    shares of a peak computed from it are on the low side.
    """
    return 2 * batch * sum(forward_flops(vit, kept))
