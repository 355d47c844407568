"""Check that a teacher can be computed exactly, and make its frozen copy."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolLatent, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from smi_fast.teacher.frozen import frozen_copy

# The published code (arXiv 2510.27186) replaces methods of a timm model with these functions. They
# select the kept tokens and return the attention maps, which SparseViT does itself.
_PUBLISHED_PATCHES = frozenset(
    {"vit_forward", "vit_forward_features", "vit_block_forward", "vit_attention_forward"}
)
_OVERRIDABLE = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class UnsupportedTeacher(TypeError):
    """The model can't be computed exactly on kept patches; the message names the module."""


def freeze(vit: VisionTransformer) -> VisionTransformer:
    """A frozen copy over the same weights, without methods that were patched onto the model."""
    frozen = frozen_copy(vit)
    for module in frozen.modules():
        for name in _OVERRIDABLE:
            if callable(vars(module).get(name)):
                delattr(module, name)
    return frozen


def check_teacher(teacher: nn.Module) -> VisionTransformer:
    """The teacher, if :class:`smi_fast.SparseViT` computes it exactly.

    Raises:
        UnsupportedTeacher: it doesn't.
    """
    if not isinstance(teacher, VisionTransformer):
        raise UnsupportedTeacher(
            "expected a timm VisionTransformer, got "
            f"{type(teacher).__module__}.{type(teacher).__name__}"
        )
    _refuse_own_methods("the teacher", teacher, VisionTransformer, VisionTransformerDistilled)
    _check_patch_embed(teacher.patch_embed)
    if len(teacher.blocks) == 0:
        raise UnsupportedTeacher("expected at least one block, got none")
    for index, block in enumerate(teacher.blocks):
        name = f"blocks.{index}"
        _expect_type(name, block, Block)
        _expect_type(f"{name}.attn", block.attn, Attention)
        _expect_type(f"{name}.mlp", block.mlp, Mlp, GluMlp, SwiGLU)
        _refuse_own_methods(name, block, Block)
        _refuse_own_methods(f"{name}.attn", block.attn, Attention)
        width = len(block.attn.qkv.weight) // 3 // block.attn.num_heads
        if abs(block.attn.scale - width**-0.5) > 1e-9:
            raise UnsupportedTeacher(
                f"expected {name}.attn to scale by 1/sqrt({width}), got {block.attn.scale:.4g}"
            )
    if teacher.attn_pool is not None:
        _expect_type("attn_pool", teacher.attn_pool, AttentionPoolLatent)
        if teacher.attn_pool.pos_embed is not None:
            raise UnsupportedTeacher("attn_pool has positions of its own, kept patches don't")
    if teacher.attn_pool is None and teacher.global_pool not in ("token", "avg", "avgmax", "max"):
        raise UnsupportedTeacher(
            "expected a pooling that gives one row an image, got "
            f"global_pool={teacher.global_pool!r}"
        )
    return teacher


def _check_patch_embed(embed: Any) -> None:
    _expect_type("patch_embed", embed, PatchEmbed)
    high, wide = embed.patch_size
    if high != wide:
        raise UnsupportedTeacher(f"expected square patches, got patch_embed of {high} x {wide}")
    proj = embed.proj
    if proj.stride != proj.kernel_size or any(proj.padding) or proj.groups != 1:
        raise UnsupportedTeacher("expected patch_embed.proj to read each patch once, got overlaps")


def _expect_type(name: str, module: nn.Module, *types: type[nn.Module]) -> None:
    if type(module) not in types:
        expected = " or ".join(t.__name__ for t in types)
        raise UnsupportedTeacher(f"expected {name} to be {expected}, got {type(module).__name__}")


def _refuse_own_methods(name: str, module: nn.Module, *known: type[nn.Module]) -> None:
    """Refuse a method that a subclass or a patch has changed: SparseViT would not call it."""
    for method in _OVERRIDABLE:
        patch = vars(module).get(method)
        if patch is not None and getattr(patch, "__name__", "") not in _PUBLISHED_PATCHES:
            raise UnsupportedTeacher(f"{name} has its {method} replaced: its own would be ignored")
        owner = next((base for base in type(module).__mro__ if method in vars(base)), None)
        if owner is not None and owner not in known and owner is not nn.Module:
            raise UnsupportedTeacher(f"{name} is a {owner.__name__} with a {method} of its own")
