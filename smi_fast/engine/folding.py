"""Fold the affine part of norms, and LayerScale, into the weights of a frozen block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from timm.layers import (
    GELU,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    QuickGELU,
    RmsNorm,
    SwiGLU,
)
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.utils import parametrize

# A norm's affine part is folded only from these, since a subclass may compute something else.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)
_IDLE = (nn.Dropout, nn.Identity)
_IDLE_OR_SCALE = (nn.Identity, LayerScale)
# How timm's own GELUs are approximated, in the terms of the engine's step.
_GELUS = {GELU: "none", GELUTanh: "tanh", QuickGELU: "sigmoid"}
# The attributes of a FoldedBlock that products read.
MATRICES = ("qkv", "proj", "fc1", "fc2")


def foldable(block: Any) -> bool:
    """Whether a block has only linear layers, LayerNorm or RMSNorm, GELU or SwiGLU, and maybe
    LayerScale.

    It may be one of Eva, whose queries and keys are rotated. Subclasses don't count as these,
    because their own forward would be ignored.
    """
    if type(block) not in (Block, EvaBlock) or not _foldable_mlp(block.mlp):
        return False
    attention = block.attn
    if getattr(attention, "gate", None) is not None:
        return False
    inner = [norm for norm in (attention.norm, block.mlp.norm) if type(norm) is not nn.Identity]
    norms, layers = (block.norm1, block.norm2, *inner), (*_qkv_layers(attention), attention.proj)
    plain = (attention.q_norm, attention.k_norm)
    scales = () if type(block) is EvaBlock else (block.ls1, block.ls2)
    return (
        (all(map(_is_layer_norm, norms)) or all(map(_is_rms_norm, norms)))
        and all(type(module) is nn.Identity for module in plain)
        and type(attention.proj_drop) in _IDLE
        and all(is_plain(layer, nn.Linear) for layer in layers)
        and len({layer.out_features for layer in layers[:-1]}) == 1  # k and v have as many heads
        and all(type(scale) in _IDLE_OR_SCALE for scale in scales)
    )


def first_unfoldable(blocks: Sequence[Any]) -> int | None:
    """The first block that can't be folded, or can't run with the first one."""
    for index, block in enumerate(blocks):
        if not foldable(block) or Kind.of(block) != Kind.of(blocks[0]):
            return index
    return None


def unfoldable(index: int) -> str:
    """Why a block is not :func:`foldable`."""
    return f"blocks.{index} has more than LayerNorm or RMSNorm, GELU or SwiGLU, and LayerScale"


class Kind(NamedTuple):
    """What the blocks of one run have in common.

    Attributes:
        centred: whether their norms are LayerNorm, or RMSNorm.
        attention_norm: whether there is a norm in front of attention's projection.
        mlp_norm: whether there is one in front of the MLP's second layer.
        approximate: how GELU is approximated: "none" (also without a GELU), "tanh", or "sigmoid"
            for quick GELU.
    """

    centred: bool
    attention_norm: bool
    mlp_norm: bool
    approximate: str

    @classmethod
    def of(cls, block: Any) -> Kind:
        """That of a block of timm."""
        attention_norm, mlp_norm = (
            type(norm) is not nn.Identity for norm in (block.attn.norm, block.mlp.norm)
        )
        centred = _is_layer_norm(block.norm1)
        return cls(centred, attention_norm, mlp_norm, _approximation(block.mlp))


def has_eva_steps(block: Any) -> bool:
    """Whether a block may have more steps than that of a plain ViT: rotary positions, SwiGLU, a
    norm inside of attention or of the MLP, RMSNorm, or an approximated GELU.
    """
    plain = type(block) is Block and type(block.mlp) is Mlp
    return not plain or Kind.of(block) != (True, False, False, "none")


def is_foldable_norm(norm: Any) -> bool:
    """Whether a norm is LayerNorm or RMSNorm with its affine part, and not one of a subclass."""
    return _is_layer_norm(norm) or _is_rms_norm(norm)


def is_centred(norm: Any) -> bool:
    """Whether a norm that is foldable subtracts the mean: LayerNorm, but not RMSNorm."""
    return _is_layer_norm(norm)


def _is_layer_norm(norm: Any) -> bool:
    return type(norm) in _LAYER_NORMS and norm.bias is not None


def _is_rms_norm(norm: Any) -> bool:
    return type(norm) is RmsNorm and norm.weight is not None


def _approximation(mlp: Any) -> str:
    if type(mlp.act) is nn.GELU:
        return str(mlp.act.approximate)
    return _GELUS.get(type(mlp.act), "none")


def _foldable_mlp(mlp: Any) -> bool:
    if type(mlp) is Mlp:
        known = type(mlp.act) in (nn.GELU, *_GELUS)
    elif type(mlp) is GluMlp:
        known = type(mlp.act) is nn.SiLU and not mlp.gate_last and mlp.chunk_dim == -1
    else:
        known = type(mlp) is SwiGLU and type(mlp.act) is nn.SiLU
    return (
        known
        and all(type(module) in _IDLE for module in (mlp.drop1, mlp.drop2))
        and all(is_plain(layer, nn.Linear) for layer in (*_fc1_layers(mlp), mlp.fc2))
    )


def _qkv_layers(attention: Any) -> tuple[Any, ...]:
    if attention.qkv is not None:
        return (attention.qkv,)
    return attention.q_proj, attention.k_proj, attention.v_proj


def _fc1_layers(mlp: Any) -> tuple[Any, ...]:
    """The first layer, or with SwiGLU maybe two: that of the gate, and that of its input."""
    return (mlp.fc1_g, mlp.fc1_x) if type(mlp) is SwiGLU else (mlp.fc1,)


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
        qkv: [3A, D]. The bias of v passes through attention unchanged, so ``proj_bias`` contains
            it, unless there is a norm in between.
        q_bias: [A].
        k_bias: [A]. It cancels in the softmax, unless keys are rotated.
        v_bias: [A], what the norm in front of ``proj`` adds to its input; None without a norm.
        proj: [D, A].
        proj_bias: [D].
        fc1: [F, D], or of SwiGLU [2F, D], the rows of the gate first.
        fc1_bias: [F] or [2F].
        fc2: [D, F].
        fc2_bias: [D].
        eps: of the two norms, then of those in front of proj and of fc2, where there are any.
        heads: number of attention heads.
        half: whether rotary positions pair the channels of two halves, or neighbours.
        centred: whether the norms are LayerNorm, or RMSNorm.
        approximate: how GELU is approximated, see :class:`Kind`.
    """

    qkv: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    eps: tuple[float, ...]
    heads: int
    half: bool
    centred: bool
    approximate: str

    @classmethod
    @torch.no_grad()
    def of(cls, block: Any) -> FoldedBlock:
        """Fold a :func:`foldable` block. Weights that folding doesn't change are shared."""
        attention, mlp, kind = block.attn, block.mlp, Kind.of(block)
        scale1, scale2 = _scales(block)
        qkv, qkv_bias = _after_norm(*_joined_qkv(attention), block.norm1)
        q_bias, k_bias, v_bias = (bias.contiguous() for bias in qkv_bias.chunk(3))
        eps = [block.norm1.eps, block.norm2.eps]
        if kind.attention_norm:
            weight, bias = attention.proj.weight, _bias(attention.proj)
            proj, proj_bias = _after_norm(weight, bias, attention.norm)
            eps.append(attention.norm.eps)
        else:
            proj, proj_bias = _after_constant(attention.proj, v_bias)
        proj, proj_bias = _before_scale(proj, proj_bias, scale1)
        fc1, fc1_bias = _after_norm(*_joined(_fc1_layers(mlp)), block.norm2)
        fc2, fc2_bias = mlp.fc2.weight, _bias(mlp.fc2)
        if kind.mlp_norm:
            fc2, fc2_bias = _after_norm(fc2, fc2_bias, mlp.norm)
            eps.append(mlp.norm.eps)
        fc2, fc2_bias = _before_scale(fc2, fc2_bias, scale2)
        return cls(
            qkv,
            q_bias,
            k_bias,
            v_bias if kind.attention_norm else None,
            proj.contiguous(),
            proj_bias,
            fc1,
            fc1_bias,
            fc2.contiguous(),
            fc2_bias,
            tuple(eps),
            attention.num_heads,
            bool(getattr(attention, "rotate_half", False)),
            kind.centred,
            kind.approximate,
        )

    def stored_as(self, dtype: torch.dtype | None) -> FoldedBlock:
        """The same with its matrices in another data type; None for their own. Biases, which
        steps between products add, stay as they are.
        """
        if dtype is None:
            return self
        rounded = {name: getattr(self, name).to(dtype) for name in MATRICES}
        return replace(self, **rounded)

    @property
    def gated(self) -> bool:
        """Whether the MLP has SwiGLU in the place of GELU."""
        return len(self.fc1) == 2 * self.fc2.shape[1]

    @property
    def proj_eps(self) -> float | None:
        """The eps of the norm in front of proj, where there is one."""
        return None if self.v_bias is None else self.eps[2]

    @property
    def fc2_eps(self) -> float | None:
        """The eps of the norm in front of fc2, where there is one."""
        without = 2 if self.v_bias is None else 3
        return self.eps[-1] if len(self.eps) > without else None

    def query_bias(self, rotary: bool) -> Tensor:
        """The bias that attention adds: of queries [A], with rotary positions of keys too [2A]."""
        return torch.cat([self.q_bias, self.k_bias]) if rotary else self.q_bias


def _bias(linear: nn.Linear) -> Tensor:
    """The bias [F], zero for a layer without one."""
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _joined(layers: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Weight and bias of layers with the same input, one after the other."""
    if len(layers) == 1:
        return layers[0].weight, _bias(layers[0])
    return torch.cat([layer.weight for layer in layers]), torch.cat([_bias(x) for x in layers])


def _joined_qkv(attention: Any) -> tuple[Tensor, Tensor]:
    """Weight [3A, D] and bias [3A] of q, k and v. Eva may keep the bias outside of their layer."""
    weight, bias = _joined(_qkv_layers(attention))
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return weight, bias


def _scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    """The factors [D] of LayerScale behind attention and behind the MLP."""
    if type(block) is EvaBlock:
        return block.gamma_1, block.gamma_2
    first, second = (getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2))
    return first, second


def _after_norm(
    weight: Tensor, bias: Tensor, norm: nn.LayerNorm | RmsNorm
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that follows the norm, with the norm's affine part folded in."""
    scaled = weight * norm.weight
    return scaled, bias if isinstance(norm, RmsNorm) else bias + weight @ norm.bias


def _after_constant(linear: nn.Linear, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose input lacks a constant [F]."""
    return linear.weight, _bias(linear) + linear.weight @ missing


def _before_scale(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer, with the LayerScale that follows it folded in."""
    return (weight, bias) if gamma is None else (gamma[:, None] * weight, gamma * bias)
