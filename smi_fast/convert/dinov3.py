"""DINOv3 of transformers, which is an ``Eva`` of timm: its positions are rotary ones only."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.eva import Eva
from torch import nn

from smi_fast.convert.build import Weights, loaded, one_eps, renamed, stacked
from smi_fast.teacher import UnsupportedTeacher

# From the names of transformers 4.56 and 5 to those of timm. The order matters.
_RULES = (
    (r"^(?:model\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)


def dinov3(model: nn.Module, image_size: tuple[int, int]) -> Eva:
    """The ``Eva`` of copies of a ``DINOv3ViTModel``'s weights, whose output is the class token.

    Args:
        model: of transformers.
        image_size: (height, width) in pixels; rotary positions are of any size.

    Raises:
        UnsupportedTeacher: an activation that Eva doesn't have, or weights of something else.
    """
    config: Any = model.config
    gated = bool(config.use_gated_mlp)
    expected = "silu" if gated else "gelu"
    if config.hidden_act != expected:
        kind = "gated MLPs" if gated else "plain MLPs"
        raise UnsupportedTeacher(
            f"expected a DINOv3ViTModel of {kind} with hidden_act {expected!r}, "
            f"got {config.hidden_act!r}"
        )
    weights = _weights(model, gated)
    patch, fc2 = weights["patch_embed.proj.weight"], weights["blocks.0.mlp.fc2.weight"]
    registers = weights.get("reg_token")
    vit = Eva(
        img_size=image_size,
        patch_size=tuple(patch.shape[2:]),
        in_chans=patch.shape[1],
        num_classes=0,
        global_pool="token",
        embed_dim=len(patch),
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=(fc2.shape[1] + 0.5) / len(patch),  # which timm rounds down to the width
        swiglu_mlp=gated,
        attn_type="rope",  # the attention that has a bias of keys
        norm_layer=partial(LayerNorm, eps=one_eps(model)),
        init_values=1.0,
        num_reg_tokens=0 if registers is None else registers.shape[1],
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=config.rope_theta,
        rope_rotate_half=True,
        use_fc_norm=False,
    )
    vit.rope.to(patch.device)
    converted: Eva = loaded(vit, weights)
    return converted


def _weights(model: nn.Module, gated: bool) -> Weights:
    """The weights under timm's names, with zeros for biases that are absent."""
    named = renamed(model.state_dict(), _RULES)
    weights = {name: weight for name, weight in named.items() if weight.numel()}
    weights.pop("embeddings.mask_token", None)
    for name, weight in list(weights.items()):
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and bias not in weights:
            weights[bias] = torch.zeros_like(weight[:, 0])
    weights = stacked(weights, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    parts = ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",)
    return stacked(weights, parts, "mlp.fc1")
