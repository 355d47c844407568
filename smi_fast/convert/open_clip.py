"""Image towers of open_clip, which are read without importing it."""

from __future__ import annotations

import copy
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast.convert.build import Weights, build, class_of, one_eps, prove, renamed
from smi_fast.teacher import UnsupportedTeacher

_RULES = (
    (r"^class_embedding$", "cls_token"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.gamma$", r".ls\1.gamma"),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
_POOLS = {"tok": "token", "avg": "avg"}


def from_open_clip(visual: nn.Module) -> VisionTransformer:
    """Convert an image tower of open_clip into a timm ``VisionTransformer`` that computes the same.

    The new module has copies of the weights, in eval mode; the tower stays unchanged. The two are
    compared on random images. The output is the tower's embedding [B, D], not normalised. A model
    of ``open_clip.create_model_and_transforms`` knows the mean and std of its images, and the
    module's ``pretrained_cfg`` has them.

    >>> model = open_clip.create_model("ViT-B-32", pretrained="openai")  # doctest: +SKIP
    >>> SparseViT(from_open_clip(model.visual)).num_classes  # doctest: +SKIP
    512

    Args:
        visual: ``model.visual``: a ``VisionTransformer`` of open_clip, or a ``TimmModel`` around a
            timm ``VisionTransformer`` or ``Eva``, of which it is a copy.

    Raises:
        UnsupportedTeacher: another class, a ``VisionTransformer`` with attentional pooling, blocks
            of its own or output tokens, or a tower that timm's modules can't compute to a relative
            error of 1e-4.
    """
    name, tower = class_of(visual, "open_clip"), _any(visual)
    if name == "TimmModel":
        converted = _trunk(tower)
    elif name == "VisionTransformer":
        converted = _vision_transformer(tower)
    else:
        hint = "; pass model.visual" if hasattr(visual, "visual") else ""
        raise UnsupportedTeacher(
            f"{name} of open_clip can't be converted: expected a VisionTransformer or a TimmModel"
            + hint
        )
    known = getattr(visual, "preprocess_cfg", {})
    if known.get("mean") and known.get("std"):
        own = getattr(converted, "pretrained_cfg", None) or {}
        space = {"mean": tuple(known["mean"]), "std": tuple(known["std"])}
        converted.pretrained_cfg = {**own, **space}
    prove(visual, converted)
    return converted


def _vision_transformer(visual: Any) -> VisionTransformer:
    if visual.attn_pool is not None or visual.pool_type not in _POOLS or visual.output_tokens:
        raise UnsupportedTeacher(
            "expected a VisionTransformer of open_clip that returns one embedding, pooled from the "
            "class token or the mean of the patches"
        )
    blocks = visual.transformer.resblocks
    kinds = {type(block).__name__ for block in blocks}
    if kinds != {"ResidualAttentionBlock"}:
        raise UnsupportedTeacher(
            f"expected ResidualAttentionBlocks, got {', '.join(sorted(kinds))}"
        )
    activation = type(blocks[0].mlp.gelu).__name__
    if activation not in _ACTIVATIONS:
        raise UnsupportedTeacher(
            f"expected activation {' or '.join(_ACTIVATIONS)}, got {activation}"
        )
    return build(
        _weights(visual),
        image_size=tuple(visual.image_size),
        heads=blocks[0].attn.num_heads,
        eps=one_eps(visual),
        activation=_ACTIVATIONS[activation],
        pool=_POOLS[visual.pool_type],
    )


def _weights(visual: Any) -> Weights:
    """The tower's weights under timm's names."""
    weights = renamed(visual.state_dict(), _RULES)
    patch = weights["patch_embed.proj.weight"]
    if "norm_pre.weight" not in weights:
        weights["patch_embed.proj.bias"] = patch.new_zeros(len(patch))
    weights["cls_token"] = weights["cls_token"][None, None]
    weights["pos_embed"] = weights["pos_embed"][None]
    if visual.final_ln_after_pool:
        weights = renamed(weights, ((r"^norm\.", "fc_norm."),))
    projection = weights.pop("proj", None)
    if projection is not None:
        weights["head.weight"] = projection.T
        weights["head.bias"] = projection.new_zeros(projection.shape[1])
    return weights


def _trunk(visual: Any) -> VisionTransformer:
    """A copy of the timm model inside, with the projection behind it as its head."""
    trunk = copy.deepcopy(visual.trunk).eval()
    if not isinstance(trunk, VisionTransformer | Eva):
        raise UnsupportedTeacher(
            "expected a TimmModel around a timm VisionTransformer or Eva, got "
            f"{type(trunk).__name__}"
        )
    layers = [layer for layer in visual.head if not isinstance(layer, nn.Dropout)]
    if layers:
        if len(layers) > 1 or not isinstance(layers[0], nn.Linear):
            names = ", ".join(type(layer).__name__ for layer in layers)
            raise UnsupportedTeacher(f"expected a TimmModel with a linear projection, got {names}")
        trunk.head = copy.deepcopy(layers[0])
        trunk.num_classes = layers[0].out_features
    return trunk


def _any(model: nn.Module) -> Any:
    """The same module; mypy takes each of its attributes for a tensor."""
    return model
