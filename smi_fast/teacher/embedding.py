"""From patches of pixels to the tokens in front of the first block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.engine import Engine
from smi_fast.engine.embedding import Embedding
from smi_fast.engine.iteration_reference import embed_tokens


def check_images(images: Tensor, size: tuple[int, int, int], weight: Tensor) -> None:
    """Refuse images other than [B, C, H, W] of a size, and unlike a teacher's weight.

    Raises:
        ValueError: wrong shape, data type or device.
    """
    expected = f"[B, {', '.join(map(str, size))}]"
    if not isinstance(images, Tensor):
        raise ValueError(f"expected images as a tensor {expected}, got {type(images).__name__}")
    if images.dim() != 4 or images.shape[1:] != size:
        raise ValueError(f"expected images {expected} for this teacher, got {list(images.shape)}")
    if images.dtype != weight.dtype or images.device != weight.device:
        raise ValueError(
            f"expected images like the teacher's weights, {weight.dtype} on {weight.device}, "
            f"got {images.dtype} on {images.device}"
        )


def check_patches(patches: Tensor, kept: Tensor, weight: Tensor, count: int) -> None:
    """Check patches and their places; the range of these only on the CPU, without a wait.

    Args:
        patches: [B, K, C·P·P].
        kept: int64 [B, K].
        weight: of the patch embedding [D, C, P, P].
        count: number of patches of a whole image.

    Raises:
        ValueError: wrong shape, data type or device, or a place outside the grid.
    """
    width = weight[0].numel()
    if patches.dim() != 3 or patches.shape[2] != width or patches.dtype != weight.dtype:
        raise ValueError(
            f"expected patches {weight.dtype} [B, K, {width}] for this teacher, "
            f"got {patches.dtype} {list(patches.shape)}"
        )
    if kept.shape != patches.shape[:2] or kept.dtype != torch.int64:
        raise ValueError(
            f"expected kept int64 {list(patches.shape[:2])} for these patches, "
            f"got {kept.dtype} {list(kept.shape)}"
        )
    if {patches.device, kept.device} != {weight.device}:
        raise ValueError(
            f"expected patches and kept on {weight.device}, got {patches.device} and {kept.device}"
        )
    on_host = kept.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and bool(((kept < 0) | (kept >= count)).any()):
        raise ValueError(f"expected kept in 0..{count - 1}, got {kept.min()}..{kept.max()}")


def embed(
    vit: VisionTransformer, patches: Tensor, positions: Tensor, engine: Engine | None
) -> Tensor:
    """The tokens [B, prefix + K, D] of patches in front of a frozen teacher's first block.

    Args:
        vit: the teacher.
        patches: [B, K, C·P·P].
        positions: int64 [B, K], the place of each in the grid.
        engine: that runs the blocks, and then also embeds patches that have no norm of their own.
    """
    project = vit.patch_embed
    if engine is None or not isinstance(project.norm, nn.Identity):
        tokens = patch_tokens(vit, patches, positions)
    else:
        weight, bias = project.proj.weight.flatten(1), project.proj.bias
        prefix, at, table = _embeddings(vit)
        embedding = Embedding(weight, bias, prefix, at, table)
        tokens = engine.embed(patches, positions, embedding)
    embedded: Tensor = vit.norm_pre(tokens)
    return embedded


def patch_tokens(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
    """The tokens [B, prefix + K, D] of patches with their position embeddings.

    Args:
        vit: a model of timm.
        patches: [B, K, C·P·P].
        positions: int64 [B, K], the place of each in the grid.
    """
    project = vit.patch_embed
    x = project.norm(F.linear(patches, project.proj.weight.flatten(1), project.proj.bias))
    return embed_tokens(x, None, *_embeddings(vit), positions)


def _embeddings(vit: VisionTransformer) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Prefix tokens [1, P, D], their position embedding, and that of patches [patches, D]."""
    # timm's distilled teachers make register tokens when asked for them, and never read them.
    distilled = isinstance(vit, VisionTransformerDistilled)
    tokens = [vit.cls_token, vit.dist_token if distilled else vit.reg_token]
    found = [token for token in tokens if token is not None]
    if not found:
        found = [vit.patch_embed.proj.weight.new_empty(1, 0, vit.embed_dim)]
    prefix = torch.cat(found, dim=1) if len(found) > 1 else found[0]
    if vit.pos_embed is None:
        return prefix, None, None
    if vit.no_embed_class:
        return prefix, None, vit.pos_embed[0]
    count = vit.num_prefix_tokens
    return prefix, vit.pos_embed[:, :count], vit.pos_embed[0, count:]
