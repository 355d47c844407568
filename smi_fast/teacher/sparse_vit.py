"""SparseViT: a frozen timm Vision Transformer that computes only the kept patches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from smi_fast import ops
from smi_fast.engine.precision import FLOAT32, check_precision
from smi_fast.ops.backends import AUTO, check_name
from smi_fast.ops.grid import pixel_mask
from smi_fast.teacher.attention import pool_importance
from smi_fast.teacher.blocks import Blocks, Way
from smi_fast.teacher.embedding import check_images, check_patches, embed
from smi_fast.teacher.frozen import SharedWeights
from smi_fast.teacher.head import classes, logits_of, rows_read
from smi_fast.teacher.narrowing import check_narrow, refuse_narrowed
from smi_fast.teacher.probe import probe as compare
from smi_fast.teacher.ragged import check_lengths
from smi_fast.teacher.rotary import rotations
from smi_fast.teacher.sigmoid_images import SigmoidImages
from smi_fast.teacher.support import check_teacher, freeze
from smi_fast.teacher.taps import check_until, parse

Jitter = tuple[Tensor | tuple[int, int], Tensor | bool]


class SparseOutput(NamedTuple):
    """Output of :class:`SparseViT`.

    Attributes:
        logits: [B, classes], or the embedding [B, width] of a teacher without a head; None where
            the pass ended early (``until``).
        importance: [B, K], the importance of each kept patch, without gradient; None unless it was
            asked for.
        taps: the requested tensors by name, see :mod:`smi_fast.teacher.taps`.
    """

    logits: Tensor | None
    importance: Tensor | None
    taps: dict[str, Tensor]


class SparseViT(nn.Module):
    """A frozen timm ``VisionTransformer`` or ``Eva`` that computes only the kept patches of images.

    - It shares the weights with the wrapped model and computes no gradient for them. The wrapped
      model stays unchanged. With every patch kept the logits equal those of the model in eval mode.
    - Patches are gathered as pixels, before they are embedded. With token pooling the last block
      computes only the rows that the head reads, those of the class and distillation tokens.
    - Importance [B, K] is the attention probability of each kept patch, averaged over heads. The
      query is the class token in the last block with token pooling, and the latent query with map
      pooling. With other poolings it is the mean over all patches as queries in the last block.
    - Hooks on the wrapped model are refused, and hooks that are added to ``vit`` later never fire,
      because the blocks run as one: taps read the inside.

    >>> kept = torch.tensor([[3, 9, 27, 28], [0, 1, 2, 63]])
    >>> output = SparseViT(teacher)(torch.randn(2, 3, 64, 64), kept, importance=True)
    >>> output.logits.shape, output.importance.shape
    (torch.Size([2, 10]), torch.Size([2, 4]))

    Args:
        teacher: a timm ``VisionTransformer`` or ``Eva`` (EVA-02, DINOv3) with global attention and
            square patches. It may have any prefix tokens, rotary positions, LayerScale, q/k norm,
            pre-norm, and token, average, maximum or map pooling. Patches of the published code to
            its methods are ignored.
        backend: which implementation of the ops to use, see :mod:`smi_fast.ops.backends`.
        probe: whether to compare logits and pixel gradients of one image with the teacher's own,
            which costs a forward and a backward pass of each. It is done without ``narrow``.
        narrow: {block: share}: in front of each of these blocks only this share of the patches'
            tokens goes on, those that the class token attends to most in it, ``int(K * share)`` of
            K and at least one, as in EViT (arXiv 2202.07800) but without a fused token. Gradients
            of what goes on are exact; no gradient goes through the choice. Patches that don't
            reach the last block have importance 0. By default all tokens go through all blocks.
        precision: of the matrix products in the blocks: "float32", the data type of the weights;
            or, for a teacher in float32, "bfloat16", which saves time where the processor has such
            products, or "tf32" on a GPU. Images, the residual stream, statistics, softmax, the head
            and importance stay float32, and so does a block whose inside is tapped.

    Attributes:
        channels: channels of an image.
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels.
        grid: patches per side, (rows, columns).
        num_classes: length of the logits; 0 for a teacher without a head.
        precision: as it was given.

    Raises:
        UnsupportedTeacher: the teacher can't be computed exactly on kept patches.
        BackendUnavailable: there is no such backend, or none that runs this teacher in this
            precision.
        ValueError: no such precision; ``narrow`` out of range, or for a teacher whose head reads
            all tokens.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        backend: str = AUTO,
        probe: bool = True,
        narrow: Mapping[int, float] | None = None,
        precision: str = FLOAT32,
    ) -> None:
        super().__init__()
        vit = check_teacher(teacher)
        self.backend, self.precision = check_name(backend), check_precision(precision)
        self.channels = int(vit.patch_embed.proj.in_channels)
        self.image_size: tuple[int, int] = tuple(vit.patch_embed.img_size)
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.patch_size = int(vit.patch_embed.patch_size[0])
        self.vit = freeze(vit)
        self._weights = SharedWeights(vit, self.vit)
        arguments = self.vit.blocks, self.num_prefix_tokens, rows_read(vit), self.backend
        self._blocks = Blocks(*arguments)
        if probe and self.device.type != "meta":
            compare(vit, self)  # in float32, because rounding would hide differences
        if precision != FLOAT32:
            self._blocks = Blocks(*arguments, precision)
            self._blocks.engine_for(self.device, self.dtype)
        self.num_classes = classes(self.vit)
        self._blocks.narrow = check_narrow(narrow, self.depth, rows_read(vit))

    @property
    def num_patches(self) -> int:
        """Number of patches of a whole image."""
        return self.grid[0] * self.grid[1]

    @property
    def narrow(self) -> dict[int, float]:
        """The share of tokens that goes into each narrowed block, ascending."""
        return dict(self._blocks.narrow)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def output_width(self) -> int:
        """Length of an output: of the logits, or of the embedding of a teacher without a head."""
        return self.num_classes or int(self.vit.embed_dim)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation and register tokens."""
        return int(self.vit.num_prefix_tokens)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights and of images."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.vit.patch_embed.proj.weight
        return weight

    def refresh(self) -> None:
        """Compute everything anew that was derived from weights.

        Replaced weights, optimiser steps and ``load_state_dict`` are noticed without it. Only
        changes that torch doesn't count need it: fused optimisers, and in-place writes to
        ``weight.data``. :meth:`SparseInverter.invert <smi_fast.SparseInverter.invert>` calls it.
        """
        self._weights.follow()
        self._blocks.refresh()

    def derived(self) -> tuple[object, ...]:
        """What was derived from weights; it stays in memory while this is held."""
        return self._blocks.derived()

    def requires_grad_(self, requires_grad: bool = True) -> SparseViT:
        """Refuse to train: no weight gradient is ever computed.

        Raises:
            ValueError: ``requires_grad`` is true.
        """
        if requires_grad:
            raise ValueError("SparseViT computes no gradients of weights: train the teacher itself")
        return self

    def train(self, mode: bool = True) -> SparseViT:
        """Stay in eval mode: a frozen teacher has no training mode."""
        return super().train(False)

    def at_size(self, image_size: tuple[int, int], *, probe: bool = True) -> SparseViT:
        """The same teacher for images of another size, over the same weights.

        timm resamples its position embeddings (``set_input_size``), so they alone are copied: make
        another one after they have changed.

        >>> SparseViT(teacher).at_size((32, 32)).grid
        (4, 4)

        Args:
            image_size: (height, width) in pixels, which the patch size divides.
            probe: as of :class:`SparseViT`.

        Raises:
            ValueError: the patch size doesn't divide it.
            UnsupportedTeacher: the teacher can't be computed exactly at this size.
        """
        if any(side < self.patch_size or side % self.patch_size for side in image_size):
            raise ValueError(
                f"expected a size that patches of {self.patch_size} pixels divide, "
                f"got {tuple(image_size)}"
            )
        self._weights.follow()
        resized = freeze(self.vit)
        resized.set_input_size(img_size=image_size)
        return SparseViT(
            resized,
            backend=self.backend,
            probe=probe,
            narrow=self.narrow,
            precision=self.precision,
        )

    def check_ragged(self) -> None:
        """Refuse a teacher that doesn't take ``lengths``.

        Raises:
            ValueError: its head reads all tokens, it is narrowed, or of another precision than
                float32, which not all of its blocks have then.
        """
        if rows_read(self.vit) is None:
            raise ValueError(
                "expected a teacher whose head reads its class token with lengths, got one that "
                "pools all tokens"
            )
        if self._blocks.narrow:
            raise ValueError(f"expected no narrow together with lengths, got {self.narrow}")
        if self.precision != FLOAT32:
            raise ValueError(f"expected precision float32 with lengths, got {self.precision!r}")

    def every_patch(self, batch: int) -> Tensor:
        """The set ``kept`` of all patches, int64 [batch, rows·columns]."""
        return torch.arange(self.num_patches, device=self.device).expand(batch, -1)

    def pixel_mask(self, kept: Tensor) -> Tensor:
        """A mask bool [B, 1, H, W], true at the pixels of the patches kept int64 [B, K].

        A loop of your own freezes the background with it: after each iteration
        ``images = torch.where(mask, images, background)``.
        """
        return pixel_mask(kept, self.patch_size, *self.image_size)

    def forward(
        self,
        images: Tensor | SigmoidImages,
        kept: Tensor | None = None,
        *,
        jitter: Jitter | None = None,
        importance: bool = False,
        taps: Collection[str] = (),
        until: int | None = None,
        lengths: Tensor | None = None,
    ) -> SparseOutput:
        """Logits of the kept patches of images, or of jittered images.

        Args:
            images: [B, C, H, W] of the model's image size, normalised as the model expects; or
                what their patches are computed from.
            kept: int64 [B, K], distinct patches of the un-jittered grid; None for all.
            jitter: (shift, flip), for all images or for each, as in
                :func:`smi_fast.ops.gather_patches`; None for no jitter.
            importance: also return the importance of each kept patch.
            taps: names of intermediate tensors to return, see :mod:`smi_fast.teacher.taps`.
            until: an early exit: number of the first blocks that may run, in 0..depth. They give
                the taps, and there are no logits. None for all blocks and logits.
            lengths: int64 [B], how many of ``kept`` count in each image, from 0 to K; later ones
                are padding, other patches of the image, which reach no logit, have no gradient and
                importance 0. The precision must be float32 then. None for K in each.

        Raises:
            ValueError: wrong shape, data type or device of the images or of ``kept``, an unknown
                tap or one of a narrowed block, ``until`` out of range, in front of a tap or
                together with importance, or ``lengths`` out of range, together with taps, until or
                narrow, or for a teacher whose head reads all tokens.
            BackendUnavailable: the backend can't run these images.
        """
        if not torch.compiler.is_compiling():
            self._weights.follow()
        shown = images.field if isinstance(images, SigmoidImages) else images
        check_images(shown, (self.channels, *self.image_size), self._weight)
        if kept is None:
            kept = self.every_patch(len(images))
        if lengths is not None:
            if until is not None or taps:
                raise ValueError("expected neither taps nor until together with lengths")
            return self._ragged(images, kept, jitter, importance, lengths)
        wanted = parse(taps, self.depth, self.num_prefix_tokens) if taps else {}
        refuse_narrowed(wanted, self._blocks.narrow)
        if until is not None:
            check_until(until, wanted, self.depth)
            if importance:
                raise ValueError(f"expected until=None with importance, got until={until}")
            if not wanted:
                return SparseOutput(None, None, {})
        patches, positions = self._gather(images, kept, jitter)
        x, way = self._tokens(patches, positions)
        if until is not None:
            return SparseOutput(None, None, self._blocks.read(x, way, wanted))
        return self._logits(x, way, wanted, importance)

    def forward_patches(
        self, patches: Tensor, kept: Tensor, *, importance: bool = False
    ) -> SparseOutput:
        """Logits of patches that were gathered before, such as those of a shard.

        It equals ``forward(images, kept)`` with the patches of ``ops.gather_patches``, and has
        gradients with respect to them. See :class:`smi_fast.pool.shards.SparseImageDataset`.

        Args:
            patches: [B, K, C·P·P], normalised as the model expects, channel by channel, row by row.
            kept: int64 [B, K], the distinct places of the patches in the grid, from 0.
            importance: also return the importance of each patch.

        Raises:
            ValueError: wrong shape, data type or device.
        """
        if not torch.compiler.is_compiling():
            self._weights.follow()
        check_patches(patches, kept, self._weight, self.num_patches)
        return self._logits(*self._tokens(patches, kept), {}, importance)

    def _tokens(self, patches: Tensor, positions: Tensor) -> tuple[Tensor, Way]:
        """The tokens in front of the first block, and how the blocks run."""
        way = self._blocks.way(patches, rotations(self.vit, positions))
        return embed(self.vit, patches, positions, way.engine), way

    def _logits(
        self,
        x: Tensor,
        way: Way,
        wanted: dict[int, dict[str, str]],
        importance: bool,
    ) -> SparseOutput:
        x, row, tapped = self._blocks(x, way, wanted, importance, self.vit.norm)
        if importance and isinstance(self.vit.attn_pool, AttentionPoolLatent):
            row = pool_importance(self.vit.attn_pool, x[:, self.num_prefix_tokens :])
        return SparseOutput(logits_of(self.vit, x), row, tapped)

    def _ragged(
        self,
        images: Tensor | SigmoidImages,
        kept: Tensor,
        jitter: Jitter | None,
        importance: bool,
        lengths: Tensor,
    ) -> SparseOutput:
        self.check_ragged()
        patches, positions = self._gather(images, kept, jitter)
        check_lengths(lengths, kept)
        x, way = self._tokens(patches, positions)
        x, row, _ = self._blocks.ragged(x, way, lengths + self.num_prefix_tokens, importance)
        return SparseOutput(self.vit.forward_head(self.vit.norm(x)), row, {})

    def _gather(
        self, images: Tensor | SigmoidImages, kept: Tensor, jitter: Jitter | None
    ) -> tuple[Tensor, Tensor]:
        """The kept patches [B, K, C·P·P] and their positions [B, K]."""
        shift, flip = jitter if jitter is not None else ((0, 0), False)
        if isinstance(images, Tensor):
            return ops.gather_patches(
                images, kept, shift, flip, patch_size=self.patch_size, backend=self.backend
            )
        return ops.gather_sigmoid_patches(
            images.field,
            kept,
            shift,
            flip,
            mean=images.space.mean,
            std=images.space.std,
            background=images.background,
            frozen=images.frozen,
            patch_size=self.patch_size,
            backend=self.backend,
        )
