"""The arithmetic that an iteration of inversion needs."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer


def forward_flops(vit: VisionTransformer, kept: int) -> tuple[int, int]:
    """FLOPs of one image's forward pass on ``kept`` patches: (linear layers, attention).

    A multiplication and its addition are two FLOPs. Only GEMMs count. In the last block only the
    class token's row counts, and the keys and values of all tokens, which that row reads.
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
    """FLOPs of an iteration: a forward pass, and as many again for the gradient of the images.

    Weights are frozen, so the backward pass of a linear layer is one GEMM of the same size. The
    backward pass of attention needs two GEMMs for each of the forward pass. Only one of them counts
    here, so a share of the peak that is computed from these FLOPs is about a hundredth too low.
    """
    return 2 * batch * sum(forward_flops(vit, kept))
