"""Fold LayerNorm's affine part and LayerScale into the weights of a frozen block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.utils import parametrize

# LayerNorm's affine part is folded only from these, since a subclass may compute something else.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)
_IDLE_OR_SCALE = (nn.Identity, LayerScale)


def foldable(block: Any) -> bool:
    """Whether a block has nothing but linear layers, LayerNorm, GELU and maybe LayerScale.

    Subclasses don't count as these, because their own forward would be ignored.
    """
    if type(block) is not Block:
        return False
    attention, mlp = block.attn, block.mlp
    norms = (block.norm1, block.norm2)
    if type(mlp) is not Mlp or getattr(attention, "gate", None) is not None:
        return False
    plain = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm)
    idle = (attention.proj_drop, mlp.drop1, mlp.drop2)
    layers = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    return (
        all(type(norm) in _LAYER_NORMS and norm.bias is not None for norm in norms)
        and all(type(module) is nn.Identity for module in plain)
        and all(type(module) in (nn.Dropout, nn.Identity) for module in idle)
        and all(is_plain(layer, nn.Linear) for layer in layers)
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and all(type(scale) in _IDLE_OR_SCALE for scale in (block.ls1, block.ls2))
    )


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer computes what its weight says: it is of this type and no subclass, and the
    weight is a plain tensor.

    A parametrized layer (torch.nn.utils.parametrize) counts too: its weight is the effective one.
    """
    own = type(layer)
    parametrized = parametrize.is_parametrized(layer) and own.__bases__ == (kind,)
    return (own is kind or parametrized) and type(layer.weight) in (Tensor, nn.Parameter)


@dataclass(frozen=True)
class FoldedBlock:
    """Weights of one block after folding, for D channels, attention width A and MLP width F.

    Attributes:
        qkv: [3A, D]. The bias of k cancels in the softmax. The bias of v passes through attention
            unchanged, so ``proj_bias`` contains it.
        q_bias: [A].
        proj: [D, A].
        proj_bias: [D].
        fc1: [F, D].
        fc1_bias: [F].
        fc2: [D, F].
        fc2_bias: [D].
        eps: of the two LayerNorms.
        heads: number of attention heads.
    """

    qkv: Tensor
    q_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    eps: tuple[float, float]
    heads: int

    @classmethod
    @torch.no_grad()
    def of(cls, block: Block) -> FoldedBlock:
        """Fold a :func:`foldable` block. Weights that folding doesn't change are shared."""
        attention, mlp = block.attn, block.mlp
        qkv, qkv_bias = _after_norm(attention.qkv, block.norm1)
        q_bias, _, v_bias = qkv_bias.chunk(3)
        proj, proj_bias = _before_scale(attention.proj, block.ls1, v_bias)
        fc1, fc1_bias = _after_norm(mlp.fc1, block.norm2)
        fc2, fc2_bias = _before_scale(mlp.fc2, block.ls2)
        return cls(
            qkv,
            q_bias.contiguous(),
            proj.contiguous(),
            proj_bias,
            fc1,
            fc1_bias,
            fc2.contiguous(),
            fc2_bias,
            (block.norm1.eps, block.norm2.eps),
            attention.num_heads,
        )


def _bias(linear: nn.Linear) -> Tensor:
    """The bias [F], zero for a layer without one."""
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that follows the norm, with the norm's affine part folded in."""
    return linear.weight * norm.weight, _bias(linear) + linear.weight @ norm.bias


def _before_scale(
    linear: nn.Linear, scale: nn.Module, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer, with the LayerScale that follows it folded in.

    ``extra`` is a constant that is missing from the layer's input, so the bias gets
    ``weight @ extra``.
    """
    weight, bias = linear.weight, _bias(linear)
    if extra is not None:
        bias = bias + weight @ extra
    if isinstance(scale, LayerScale):
        weight, bias = scale.gamma[:, None] * weight, scale.gamma * bias
    return weight, bias
