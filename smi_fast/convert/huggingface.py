"""ViTs of Hugging Face's transformers, which are read without importing it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.convert.build import Weights, build, class_of, one_eps, prove, renamed, stacked
from smi_fast.convert.dinov3 import dinov3
from smi_fast.teacher import UnsupportedTeacher


class Kind(NamedTuple):
    """How a class turns tokens into its output.

    Attributes:
        output: what of the model's answer the timm module returns.
        pool: timm's name of the pooling.
        left_out: pattern of the names of weights that the output doesn't depend on.
    """

    output: Callable[[Any], Tensor]
    pool: str = "token"
    left_out: str = r"pooler\.|embeddings\.mask_token$"

    def reads(self, name: str) -> bool:
        """Whether the output depends on the weight of this name of timm's."""
        return re.match(self.left_out, name) is None


def _logits(answer: Any) -> Tensor:
    logits: Tensor = answer.logits
    return logits


def _pooled(answer: Any) -> Tensor:
    pooled: Tensor = answer.pooler_output
    return pooled


def _embeds(answer: Any) -> Tensor:
    embeds: Tensor = answer.image_embeds
    return embeds


def _class_token(answer: Any) -> Tensor:
    token: Tensor = answer.last_hidden_state[:, 0]
    return token


_KINDS = {
    "ViTModel": Kind(_class_token),
    "ViTForImageClassification": Kind(_logits),
    "DeiTModel": Kind(_class_token),
    "DeiTForImageClassification": Kind(_logits),
    "DeiTForImageClassificationWithTeacher": Kind(_logits),
    "Dinov2Model": Kind(_class_token),
    "Dinov2WithRegistersModel": Kind(_class_token),
    "DINOv3ViTModel": Kind(_class_token),
    "CLIPVisionModel": Kind(_pooled),
    "CLIPVisionTransformer": Kind(_pooled),
    "CLIPVisionModelWithProjection": Kind(_embeds),
    "SiglipVisionModel": Kind(_pooled, "map"),
    "SiglipVisionTransformer": Kind(_pooled, "map"),
    "CLIPForImageClassification": Kind(_logits, "avg", r"norm\."),
    "SiglipForImageClassification": Kind(_logits, "avg", r"attn_pool\."),
}
_BOTH = "its head reads the class token and the mean of the patches; convert its encoder, model."
_TOWER = "it is two networks; convert model.vision_model"
_REASONS = {
    "Dinov2ForImageClassification": _BOTH + "dinov2",
    "Dinov2WithRegistersForImageClassification": _BOTH + "dinov2_with_registers",
    "CLIPModel": _TOWER,
    "SiglipModel": _TOWER,
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
# From the names of transformers 4 and 5 to those of timm. The order matters.
_RULES = (
    (r"^(?:vit|deit|dinov2|dinov2_with_registers|vision_model)\.", ""),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(?:position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_(weight|bias)$", r"attn_pool.in_proj.\1"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^(?:classifier|cls_classifier|visual_projection)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(?:attention\.attention|attention|self_attn)\.", ".attn."),
    (r"\.attn\.([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attn\.(?:output\.dense|o_proj|out_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
)


def from_huggingface(
    model: nn.Module, *, image_size: int | tuple[int, int] | None = None
) -> VisionTransformer | Eva:
    """Convert a ViT of transformers into a timm module that computes the same.

    It is a ``VisionTransformer``, or of DINOv3 an ``Eva``.

    The new module has copies of the weights, in eval mode; the model stays unchanged. The two are
    compared on random images. The output is that of the model's head, or for an encoder an
    embedding [B, D]:

    - of ``…ForImageClassification…``, the logits;
    - of ``ViTModel``, ``DeiTModel``, ``Dinov2…Model`` and ``DINOv3ViTModel``, the normalised class
      token ``last_hidden_state[:, 0]``, without the pooler that ``ViTModel`` may have;
    - of ``CLIPVisionModel`` and ``SiglipVisionModel``, ``pooler_output``;
    - of ``CLIPVisionModelWithProjection``, ``image_embeds``, not normalised.

    The model doesn't say how its images are normalised: pass ``mean`` and ``std`` of its image
    processor to :class:`smi_fast.SparseInverter`.

    >>> name = "facebook/dinov2-small"
    >>> encoder = transformers.Dinov2Model.from_pretrained(name)  # doctest: +SKIP
    >>> SparseViT(from_huggingface(encoder, image_size=224)).grid  # doctest: +SKIP
    (16, 16)

    Args:
        model: ``ViTModel``, ``ViTForImageClassification``, ``DeiTModel``,
            ``DeiTForImageClassification``, ``DeiTForImageClassificationWithTeacher``,
            ``Dinov2Model``, ``Dinov2WithRegistersModel``, ``DINOv3ViTModel``,
            ``CLIPVisionModel``, ``CLIPVisionModelWithProjection``, ``SiglipVisionModel`` or
            ``SiglipForImageClassification``.
        image_size: pixels of a side, or (height, width); None for that of the model's
            configuration. Position embeddings of another size are those that the model itself
            interpolates; rotary ones need none.

    Raises:
        UnsupportedTeacher: another class, or a model that timm's modules can't compute to a
            relative error of 1e-4.
    """
    name = class_of(model, "transformers")
    if name not in _KINDS:
        reason = _REASONS.get(name, f"expected one of {', '.join(_KINDS)}")
        raise UnsupportedTeacher(f"{name} of transformers can't be converted: {reason}")
    kind, config = _KINDS[name], _vision_config(model)
    if kind.pool == "map" and not getattr(config, "vision_use_head", True):
        raise UnsupportedTeacher(f"{name} without its head has no embedding of an image")
    own, size = _pair(config.image_size), _pair(image_size or config.image_size)
    if name == "DINOv3ViTModel":
        encoder = dinov3(model, size)
        prove(model, encoder, lambda own, images: kind.output(own(pixel_values=images)))
        return encoder
    if config.hidden_act not in _ACTIVATIONS:
        raise UnsupportedTeacher(
            f"expected {name} with hidden_act {', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}"
        )
    weights = _weights(model, kind)
    options: dict[str, bool] = {}
    if size != own:
        weights["pos_embed"] = _interpolated(model, weights, size)
        # Dinov2 interpolates unasked.
        options = {} if name.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    converted = build(
        _in_timms_layout(weights),
        image_size=size,
        heads=config.num_attention_heads,
        eps=one_eps(model),
        activation=_ACTIVATIONS[config.hidden_act],
        pool=kind.pool,
    )
    prove(model, converted, lambda own, images: kind.output(own(pixel_values=images, **options)))
    return converted


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _vision_config(model: Any) -> Any:
    """The configuration of the images' tower."""
    return getattr(model.config, "vision_config", model.config)


def _weights(model: nn.Module, kind: Kind) -> Weights:
    """The weights that the output depends on, under timm's names."""
    weights = renamed(model.state_dict(), _RULES)
    weights = {name: weight for name, weight in weights.items() if kind.reads(name)}
    weights = stacked(weights, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    return stacked(weights, ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1")


@torch.no_grad()
def _interpolated(model: nn.Module, weights: Weights, size: tuple[int, int]) -> Tensor:
    """The model's own position embeddings for images of this size, of prefix tokens too."""
    embeddings: Any = next(m for m in model.modules() if hasattr(m, "interpolate_pos_encoding"))
    patch = weights["patch_embed.proj.weight"]
    prefix = sum(name in weights for name in ("cls_token", "dist_token"))
    count = prefix + (size[0] // patch.shape[2]) * (size[1] // patch.shape[3])
    try:
        found: Tensor = embeddings.interpolate_pos_encoding(
            patch.new_empty(1, count, len(patch)), *size
        )
    except RuntimeError as error:  # transformers takes the grid of the embeddings for a square
        raise UnsupportedTeacher(
            f"{type(model).__name__} can't interpolate its position embeddings to images of "
            f"{size[0]} x {size[1]} ({error})"
        ) from error
    return found


def _in_timms_layout(weights: Weights) -> Weights:
    """The same weights in the shapes that timm has, with zeros where a part is absent."""
    weights, width = dict(weights), len(weights["patch_embed.proj.weight"])
    positions = weights["pos_embed"].reshape(1, -1, width)
    if "cls_token" in weights:
        weights["cls_token"] = weights["cls_token"].reshape(1, 1, width)
    if "reg_token" in weights:
        # Registers have no position.
        none = torch.zeros_like(weights["reg_token"])
        positions = torch.cat([positions[:, :1], none, positions[:, 1:]], dim=1)
    if "dist_token" in weights and "head_dist.weight" not in weights:
        # A token that no head reads is a register. This one has a position.
        weights["reg_token"] = weights.pop("dist_token")
    if "attn_pool.latent" in weights:
        for part in ("weight", "bias"):
            rows = weights.pop(f"attn_pool.in_proj.{part}")
            weights[f"attn_pool.q.{part}"] = rows[:width]
            weights[f"attn_pool.kv.{part}"] = rows[width:]
    if "head.weight" in weights and "head.bias" not in weights:
        weights["head.bias"] = weights["head.weight"].new_zeros(len(weights["head.weight"]))
    return {**weights, "pos_embed": positions}
