"""Which teachers are computed exactly: what their modules must be.

These checks read the modules and name the one that is refused. What a reading can't tell is for
:mod:`smi_fast.teacher.probe`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import (
    AttentionPoolLatent,
    AttentionRope,
    DropPath,
    GluMlp,
    Mlp,
    PatchDropout,
    PatchDropoutWithIndices,
    PatchEmbed,
    SwiGLU,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from smi_fast.engine.folding import is_plain
from smi_fast.teacher.frozen import frozen_copy

# Functions that the published code (arXiv 2510.27186) binds over a timm model's methods. They keep
# tokens and return attention maps, which SparseViT does itself. The probe runs them.
_PUBLISHED_PATCHES = frozenset(
    {"vit_forward", "vit_forward_features", "vit_block_forward", "vit_attention_forward"}
)
_OVERRIDABLE = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_POOLS = ("token", "avg", "avgmax", "max")
# Modules that do nothing in eval mode, and that SparseViT therefore leaves out.
_IDLE = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices, type(None))
_SKIPPED_OF_TEACHER = ("pos_drop", "patch_drop")
_SKIPPED_OF_BLOCK = ("drop_path1", "drop_path2")
_SKIPPED_OF_ATTENTION = ("attn_drop", "proj_drop")
# Where the teacher is inside of something else, by the attribute that has it.
_WRAPPERS = {
    "_orig_mod": "pass teacher._orig_mod, the module before torch.compile",
    "timm_model": "pass teacher.timm_model",
    "trunk": "pass teacher.trunk",
    "visual": "pass its image tower, in open_clip teacher.visual.trunk",
    "merge_and_unload": "pass teacher.merge_and_unload()",
    "module": "pass teacher.module",
}
_MERGE = (
    "merge an adapter into the weights first (peft: teacher = teacher.merge_and_unload()), or "
    "convert a quantised teacher back to floating point"
)


class UnsupportedTeacher(TypeError):
    """The model can't be computed exactly on kept patches; the message names the module."""


def freeze(vit: VisionTransformer) -> VisionTransformer:
    """A frozen copy over the same weights, without patched methods."""
    frozen = copy_of(vit)
    for module in frozen.modules():
        for name in _OVERRIDABLE:
            if callable(vars(module).get(name)):
                delattr(module, name)
    return frozen


def copy_of(vit: VisionTransformer) -> VisionTransformer:
    """A frozen copy over the same weights.

    Raises:
        UnsupportedTeacher: something in it can't be copied.
    """
    try:
        return frozen_copy(vit)
    except RuntimeError as error:
        raise UnsupportedTeacher(
            f"the teacher can't be copied ({error}): remove weight_norm or pruning from it first"
        ) from error


def check_teacher(teacher: nn.Module) -> VisionTransformer:
    """The teacher, when each of its modules is one that SparseViT computes exactly.

    Raises:
        UnsupportedTeacher: it isn't; the message names the module.
    """
    if not isinstance(teacher, VisionTransformer | Eva):
        hints = (hint for name, hint in _WRAPPERS.items() if hasattr(teacher, name))
        raise UnsupportedTeacher(
            "expected a timm VisionTransformer or Eva, got "
            f"{type(teacher).__module__}.{type(teacher).__name__}"
            + "".join(f"; {hint}" for hint in list(hints)[:1])
        )
    if any(weight.is_inference() for weight in teacher.parameters()):
        raise UnsupportedTeacher(
            "the teacher's weights were made in torch.inference_mode(), so nothing can be "
            "differentiated through it: make or load the teacher outside of it"
        )
    for name, module in teacher.named_modules():
        _refuse_hooks(name or "the teacher", module)
        _refuse_patches(name or "the teacher", module)
    _refuse_own_methods("the teacher", teacher, VisionTransformer, VisionTransformerDistilled, Eva)
    _check_idle("", teacher, _SKIPPED_OF_TEACHER)
    _check_patch_embed(teacher.patch_embed)
    if len(teacher.blocks) == 0:
        raise UnsupportedTeacher("expected at least one block, got none")
    for index, block in enumerate(teacher.blocks):
        _check_block(f"blocks.{index}", block, teacher.num_prefix_tokens)
    if teacher.attn_pool is not None:
        _expect_type("attn_pool", teacher.attn_pool, AttentionPoolLatent)
        if teacher.attn_pool.pos_embed is not None:
            raise UnsupportedTeacher("attn_pool has positions of its own, kept patches don't")
    elif teacher.global_pool not in _POOLS:
        raise UnsupportedTeacher(
            "expected a pooling that gives one row an image, got "
            f"global_pool={teacher.global_pool!r}"
        )
    return teacher


def _check_block(name: str, block: Any, prefix: int) -> None:
    _expect_type(name, block, Block, EvaBlock)
    of_eva = type(block) is EvaBlock
    _expect_type(
        f"{name}.attn", block.attn, *((EvaAttention, AttentionRope) if of_eva else (Attention,))
    )
    _expect_type(f"{name}.mlp", block.mlp, Mlp, GluMlp, SwiGLU)
    _check_idle(f"{name}.", block, _SKIPPED_OF_BLOCK)
    _check_idle(f"{name}.attn.", block.attn, _SKIPPED_OF_ATTENTION)
    _check_qkv(f"{name}.attn", block.attn)
    if of_eva and block.attn.num_prefix_tokens != prefix:
        raise UnsupportedTeacher(
            f"expected {name}.attn to leave the {prefix} prefix tokens unrotated, got "
            f"{block.attn.num_prefix_tokens}"
        )


def _check_qkv(name: str, attention: Any) -> None:
    # Parts of this layer are computed from its weight, so a subclass could compute something else.
    qkv = attention.qkv
    if qkv is not None and not is_plain(qkv, nn.Linear):
        raise UnsupportedTeacher(
            f"expected {name}.qkv to be a plain Linear, got {_describe(qkv)}: {_MERGE}"
        )
    rows = attention.q_proj.out_features if qkv is None else len(qkv.weight) // 3
    width = rows // attention.num_heads
    if abs(attention.scale - width**-0.5) > 1e-9:
        raise UnsupportedTeacher(
            f"expected {name} to scale by 1/sqrt({width}), got {attention.scale:.4g}"
        )


def _check_patch_embed(embed: Any) -> None:
    _expect_type("patch_embed", embed, PatchEmbed)
    high, wide = embed.patch_size
    if high != wide:
        raise UnsupportedTeacher(f"expected square patches, got patch_embed of {high} x {wide}")
    proj = embed.proj
    if not is_plain(proj, nn.Conv2d):
        raise UnsupportedTeacher(
            f"expected patch_embed.proj to be a plain Conv2d, got {_describe(proj)}: {_MERGE}"
        )
    if proj.stride != proj.kernel_size or any(proj.padding) or proj.groups != 1:
        raise UnsupportedTeacher("expected patch_embed.proj to read each patch once, got overlaps")
    if embed.img_size is None:
        raise UnsupportedTeacher("expected a patch_embed with an image size, got one without")
    if any(side % high for side in embed.img_size):
        raise UnsupportedTeacher(
            f"expected an image size that the patch size {high} divides, got {embed.img_size}"
        )


def _describe(module: Any) -> str:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    weight = getattr(module, "weight", None)
    if kind.startswith("torch.nn.modules.") and isinstance(weight, torch.Tensor):
        return f"{type(module).__name__} with a weight of type {type(weight).__name__}"
    return kind


def _check_idle(prefix: str, module: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if type(getattr(module, name)) not in _IDLE:
            raise UnsupportedTeacher(
                f"expected {prefix}{name} to do nothing in eval mode, "
                f"got {_describe(getattr(module, name))}"
            )


def _expect_type(name: str, module: nn.Module, *types: type[nn.Module]) -> None:
    if type(module) not in types:
        expected = " or ".join(t.__name__ for t in types)
        raise UnsupportedTeacher(f"expected {name} to be {expected}, got {type(module).__name__}")


def _refuse_hooks(name: str, module: nn.Module) -> None:
    """A hook may change what passes through, and the copy that is computed has none."""
    for table, hooks in vars(module).items():
        if table.endswith(("forward_hooks", "pre_hooks", "backward_hooks")) and hooks:
            if "state_dict" in table:
                continue
            hook = type(next(iter(hooks.values()))).__name__
            raise UnsupportedTeacher(
                f"{name} has a hook ({hook}), which would be ignored: remove it before wrapping "
                "(weight_norm and pruning have functions for that), and read the inside by taps"
            )


def _refuse_patches(name: str, module: nn.Module) -> None:
    for method in _OVERRIDABLE:
        patch = vars(module).get(method)
        if callable(patch) and getattr(patch, "__name__", "") not in _PUBLISHED_PATCHES:
            raise UnsupportedTeacher(f"{name} has its {method} replaced: its own would be ignored")


def _refuse_own_methods(name: str, module: nn.Module, *known: type[nn.Module]) -> None:
    for method in _OVERRIDABLE:
        owner = next((base for base in type(module).__mro__ if method in vars(base)), None)
        if owner is not None and owner not in known and owner is not nn.Module:
            raise UnsupportedTeacher(f"{name} is a {owner.__name__} with a {method} of its own")


def is_patched(vit: VisionTransformer) -> bool:
    """Whether the published code has patched the teacher, so that it takes indices too."""
    return "forward" in vars(vit)
