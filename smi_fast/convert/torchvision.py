"""ViTs of torchvision, which are read without importing it."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast.convert.build import build, class_of, one_eps, prove, renamed
from smi_fast.teacher import UnsupportedTeacher

_RULES = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.(?:head\.)?", "head."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def from_torchvision(model: nn.Module) -> VisionTransformer:
    """Convert a ViT of torchvision into a timm ``VisionTransformer`` that computes the same.

    The new module has copies of the weights, in eval mode; the model stays unchanged. The two are
    compared on random images. A model whose ``heads`` are an ``Identity`` gives an encoder, whose
    output is the normalised class token [B, D].

    The model doesn't say how its images are normalised: pass ``mean`` and ``std`` to
    :class:`smi_fast.SparseInverter`; for torchvision's own weights, ImageNet's.

    >>> model = torchvision.models.vit_b_16(weights="IMAGENET1K_V1")  # doctest: +SKIP
    >>> SparseViT(from_torchvision(model)).num_classes  # doctest: +SKIP
    1000

    Args:
        model: of ``torchvision.models.vit_b_16``, ``vit_b_32``, ``vit_l_16``, ``vit_l_32`` or
            ``vit_h_14``.

    Raises:
        UnsupportedTeacher: another class, a stem of several convolutions, a head of several layers,
            or a model that timm's modules can't compute to a relative error of 1e-4.
    """
    name, vit = class_of(model, "torchvision"), _any(model)
    if name != "VisionTransformer":
        raise UnsupportedTeacher(
            f"{name} of torchvision can't be converted: expected a VisionTransformer"
        )
    if not isinstance(vit.conv_proj, nn.Conv2d):
        raise UnsupportedTeacher("expected conv_proj to be one Conv2d, got a stem of several")
    layers = [part for part in vit.heads.modules() if not isinstance(part, nn.Sequential)]
    if not (len(layers) <= 1 and all(isinstance(p, nn.Linear | nn.Identity) for p in layers)):
        names = ", ".join(type(layer).__name__ for layer in layers)
        raise UnsupportedTeacher(f"expected heads of one Linear layer or none, got {names}")
    converted = build(
        renamed(model.state_dict(), _RULES),
        image_size=(vit.image_size, vit.image_size),
        heads=vit.encoder.layers[0].num_heads,
        eps=one_eps(model),
        activation="gelu",
    )
    prove(model, converted)
    return converted


def _any(model: nn.Module) -> Any:
    """The same module; mypy takes each of its attributes for a tensor."""
    return model
