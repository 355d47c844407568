"""SparseViT: a frozen timm Vision Transformer that computes only the kept patches."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import ops
from smi_fast.ops.backends import AUTO, check_name
from smi_fast.ops.grid import pixel_mask
from smi_fast.teacher.attention import pool_importance
from smi_fast.teacher.blocks import Blocks
from smi_fast.teacher.frozen import SharedWeights
from smi_fast.teacher.probe import probe as compare
from smi_fast.teacher.support import check_teacher, freeze
from smi_fast.teacher.taps import parse

Jitter = tuple[Tensor | tuple[int, int], Tensor | bool]


class SparseOutput(NamedTuple):
    """What :class:`SparseViT` returns.

    Attributes:
        logits: [B, classes].
        importance: [B, K], the attention of the rows that the head reads to each kept patch in the
            last block, or None when it wasn't asked for. It has no gradient.
        taps: the requested tensors by name, see :mod:`smi_fast.teacher.taps`.
    """

    logits: Tensor
    importance: Tensor | None
    taps: dict[str, Tensor]


class SparseViT(nn.Module):
    """A frozen view of a timm ``VisionTransformer`` that takes a set of kept patches.

    The weights are shared with the wrapped model, not copied, and never get a gradient; the wrapped
    module itself is left as it was. With every patch kept the logits are those of the model in eval
    mode.

    The last block computes only the rows that the head reads: with token pooling those of the class
    (and distillation) token. Importance is the attention of those rows, averaged over heads: the
    class token's row with token pooling, the pooling's own latent query with map pooling, the mean
    of all patches' rows when patches are averaged.

    Args:
        teacher: a timm ``VisionTransformer`` with global attention and square patches: any prefix
            tokens, LayerScale, q/k norm, pre-norm, token, average, maximum or map pooling. One that
            the published code has patched is taken as the model it was.
        backend: which implementation of the ops to use, see :mod:`smi_fast.ops.backends`.
        probe: whether to compare logits and pixel gradients of one image with the teacher's own,
            which costs a forward and a backward pass of each.

    Attributes:
        channels: of an image.
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels.
        grid: patches per side, (rows, columns).
        num_classes: length of the logits.

    Raises:
        UnsupportedTeacher: for anything that it can't compute exactly.
        BackendUnavailable: there is no such backend.
    """

    def __init__(self, teacher: nn.Module, *, backend: str = AUTO, probe: bool = True) -> None:
        super().__init__()
        vit = check_teacher(teacher)
        self.backend = check_name(backend)
        self.channels = int(vit.patch_embed.proj.in_channels)
        self.image_size: tuple[int, int] = tuple(vit.patch_embed.img_size)
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.patch_size = int(vit.patch_embed.patch_size[0])
        self.num_classes = int(getattr(vit.head, "out_features", vit.num_classes))
        self.vit = freeze(vit)
        self._weights = SharedWeights(vit, self.vit)
        self._blocks = Blocks(
            self.vit.blocks, self.num_prefix_tokens, _rows_read(vit), self.backend
        )
        if probe and self.device.type != "meta":
            compare(vit, self)

    @property
    def num_patches(self) -> int:
        """Patches of a whole image."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.vit.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens."""
        return int(self.vit.num_prefix_tokens)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights, and so of the images."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.vit.patch_embed.proj.weight
        return weight

    def refresh(self) -> None:
        """Computes everything anew that was derived from weights.

        Replaced weights, optimiser steps and ``load_state_dict`` are noticed without it. Only
        changes that torch doesn't count need it: fused optimisers, and in-place writes to
        ``weight.data``. :meth:`SparseInverter.invert <smi_fast.SparseInverter.invert>` calls it.
        """
        self._weights.follow()
        self._blocks.refresh()

    def requires_grad_(self, requires_grad: bool = True) -> SparseViT:
        """Refuses to train: no weight gradient is ever computed.

        Raises:
            ValueError: ``requires_grad`` is true.
        """
        if requires_grad:
            raise ValueError("SparseViT computes no gradients of weights: train the teacher itself")
        return self

    def train(self, mode: bool = True) -> SparseViT:
        """Stays in eval mode: a frozen teacher has no other."""
        return super().train(False)

    def every_patch(self, batch: int) -> Tensor:
        """The set that keeps all patches, int64 [batch, rows·columns]."""
        return torch.arange(self.num_patches, device=self.device).expand(batch, -1)

    def pixel_mask(self, kept: Tensor) -> Tensor:
        """Which pixels belong to kept patches, bool [B, 1, H, W].

        A loop of your own freezes the background with it: after each iteration,
        ``torch.where(mask, images, background)``.
        """
        return pixel_mask(kept, self.patch_size, *self.image_size)

    def forward(
        self,
        images: Tensor,
        kept: Tensor | None = None,
        *,
        jitter: Jitter | None = None,
        importance: bool = False,
        taps: Collection[str] = (),
    ) -> SparseOutput:
        """Logits of the kept patches of (jittered) images.

        Args:
            images: [B, C, H, W] of the model's own size, normalised as the model expects.
            kept: int64 [B, K], distinct patches of the un-jittered grid; None keeps all.
            jitter: (shift, flip) as :func:`smi_fast.ops.gather_patches` takes them; None for
                neither.
            importance: also return the importance of each kept patch.
            taps: also return these intermediate tensors, see :mod:`smi_fast.teacher.taps`.

        Raises:
            ValueError: wrong shape, data type or device of the images or of ``kept``, or a tap that
                doesn't exist.
        """
        self._check_images(images)
        if not torch.compiler.is_compiling():
            self._weights.follow()
        if kept is None:
            kept = self.every_patch(len(images))
        shift, flip = jitter if jitter is not None else ((0, 0), False)
        patches, positions = ops.gather_patches(
            images, kept, shift, flip, patch_size=self.patch_size, backend=self.backend
        )
        wanted = parse(taps, self.depth, self.num_prefix_tokens) if taps else {}
        x, row, tapped = self._blocks(self._embed(patches, positions), wanted, importance)
        x = self.vit.norm(x)
        if importance and isinstance(self.vit.attn_pool, AttentionPoolLatent):
            row = pool_importance(self.vit.attn_pool, x[:, self.num_prefix_tokens :])
        return SparseOutput(self.vit.forward_head(x), row, tapped)

    def _check_images(self, images: Tensor) -> None:
        expected = (self.channels, *self.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"expected images [B, {expected[0]}, {expected[1]}, {expected[2]}] "
                f"for this teacher, got {list(images.shape)}"
            )
        if images.dtype != self.dtype or images.device != self.device:
            raise ValueError(
                f"expected images like the teacher's weights, {self.dtype} on {self.device}, "
                f"got {images.dtype} on {images.device}"
            )

    def _embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        embed = self.vit.patch_embed
        x = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
        prefix, table = _embeddings(self.vit)
        if table is not None:
            x = x + table[positions]
        x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        embedded: Tensor = self.vit.norm_pre(x)
        return embedded


def _rows_read(vit: VisionTransformer) -> int | None:
    """How many of the first tokens the head reads after the last block; None for all."""
    if vit.global_pool != "token" or vit.attn_pool is not None:
        return None
    return int(vit.num_prefix_tokens) if isinstance(vit, VisionTransformerDistilled) else 1


def _embeddings(vit: VisionTransformer) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens [1, prefix, D] with positions added, and the positions [rows·columns, D]."""
    tokens = [vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token]
    found = [token for token in tokens if token is not None]
    if not found:
        found = [vit.patch_embed.proj.weight.new_empty(1, 0, vit.embed_dim)]
    prefix = torch.cat(found, dim=1) if len(found) > 1 else found[0]
    if vit.pos_embed is None:
        return prefix, None
    if vit.no_embed_class:
        return prefix, vit.pos_embed[0]
    count = vit.num_prefix_tokens
    return prefix + vit.pos_embed[:, :count], vit.pos_embed[0, count:]
