"""SparseViT: a frozen timm Vision Transformer that computes kept patches, and only what is read."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from smi_fast import ops
from smi_fast.backends import AUTO, check_name, choose
from smi_fast.engine import FoldedBlocks
from smi_fast.projection import parts_of, qkv_of
from smi_fast.supported import check_teacher, freeze
from smi_fast.taps import ROW, TOKENS, attend, class_row, parse

Jitter = tuple[Tensor | tuple[int, int], Tensor | bool]


class SparseOutput(NamedTuple):
    """What :class:`SparseViT` returns.

    Attributes:
        logits: [B, classes].
        importance: [B, K], how much what the head reads attends to each kept patch in the last
            block, or None when it wasn't asked for. It has no gradient.
        taps: what was tapped, by name, see :mod:`smi_fast.taps`.
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
        backend: which implementation of the ops to use, see :mod:`smi_fast.backends`.

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

    def __init__(self, teacher: nn.Module, *, backend: str = AUTO) -> None:
        super().__init__()
        vit = check_teacher(teacher)
        self.backend = check_name(backend)
        self.channels = int(vit.patch_embed.proj.in_channels)
        self.image_size: tuple[int, int] = tuple(vit.patch_embed.img_size)
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.patch_size = int(vit.patch_embed.patch_size[0])
        self.num_classes = int(vit.num_classes)
        self.vit = freeze(vit)
        prefix, positions = _embeddings(self.vit)
        self._prefix: Tensor
        self._positions: Tensor | None
        self.register_buffer("_prefix", prefix, persistent=False)
        self.register_buffer("_positions", positions, persistent=False)
        self._folded = FoldedBlocks(self.vit.blocks)
        reads_tokens = vit.global_pool == "token" and vit.attn_pool is None
        self._rows_read = vit.num_prefix_tokens if reads_tokens else None
        if reads_tokens and not isinstance(vit, VisionTransformerDistilled):
            self._rows_read = 1

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

    def train(self, mode: bool = True) -> SparseViT:
        """Stays in eval mode: a frozen teacher has no other."""
        return super().train(False)

    def every_patch(self, batch: int) -> Tensor:
        """The set that keeps all patches, int64 [batch, rows·columns]."""
        return torch.arange(self.num_patches, device=self.device).expand(batch, -1)

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
            taps: also return these insides of the model, see :mod:`smi_fast.taps`.

        Raises:
            ValueError: wrong shape, data type or device of the images or of ``kept``, or a tap that
                there isn't.
        """
        self._check_images(images)
        if kept is None:
            kept = self.every_patch(len(images))
        shift, flip = jitter if jitter is not None else ((0, 0), False)
        patches, positions = ops.gather_patches(
            images, kept, shift, flip, patch_size=self.patch_size, backend=self.backend
        )
        x = self._embed(patches, positions)
        wanted = parse(taps, self.depth, self.num_prefix_tokens) if taps else {}
        tapped: dict[str, Tensor] = {}
        x = self._all_but_last(x, wanted, tapped)
        names = wanted.get(self.depth - 1)
        if names:
            x, row = self._tapped_last_block(x, importance, names, tapped)
        else:
            x, row = self._last_block(self.vit.blocks[-1], x, importance)
        x = self.vit.norm(x)
        if importance and isinstance(self.vit.attn_pool, AttentionPoolLatent):
            row = _map_pool_importance(self.vit.attn_pool, x[:, self.num_prefix_tokens :])
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
        if self._positions is not None:
            x = x + self._positions[positions]
        x = torch.cat([self._prefix.expand(len(x), -1, -1), x], dim=1)
        embedded: Tensor = self.vit.norm_pre(x)
        return embedded

    def _all_but_last(
        self, x: Tensor, wanted: dict[int, dict[str, str]], tapped: dict[str, Tensor]
    ) -> Tensor:
        done = 0
        for index in sorted(wanted.keys() - {self.depth - 1}):
            x = self._run(x, done, index)
            x = self._tapped_block(x, index, wanted[index], tapped)
            done = index + 1
        return self._run(x, done, self.depth - 1)

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The blocks from ``start`` up to ``stop``, none when they are equal."""
        if start < stop and self._runs_folded(x):
            return self._folded.engine(start, stop)(x)
        for block in self.vit.blocks[start:stop]:
            x = self._block(block, x)
        return x

    def _runs_folded(self, x: Tensor) -> bool:
        """Whether the C++ kernels were chosen and know the blocks; a compiler sees the blocks."""
        return (
            self._folded.possible
            and not torch.compiler.is_compiling()
            and choose("gather_attention", x.device, x.dtype, self.backend).name == "cpp"
        )

    def _block(self, block: Block, x: Tensor) -> Tensor:
        attention = block.attn
        y = block.norm1(x)
        out, _ = ops.gather_attention(qkv_of(attention, y), backend=self.backend)
        return _rest_of_block(block, x, y, out)

    def _last_block(
        self, block: Block, x: Tensor, importance: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The last block's rows that the head reads, and how much they attend to each patch."""
        attention, read, prefix = block.attn, self._rows_read, self.num_prefix_tokens
        if read is None and not importance:
            return self._run(x, self.depth - 1, self.depth), None
        if read is not None and self._runs_folded(x):
            x, shares = self._folded.first_rows_of_last(read)(x)
            return x, shares[:, :, 0, prefix:].mean(dim=1) if importance else None
        y = block.norm1(x)
        q = parts_of(attention, y[:, :read], 0, 1).squeeze(2)
        k, v = parts_of(attention, y, 1, 3).unbind(2)
        q = attention.q_norm(q).transpose(1, 2)
        k, v = attention.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        probabilities = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        rows = slice(0, 1) if read is not None else slice(prefix, None)
        row = probabilities[:, :, rows, prefix:].detach().mean(dim=(1, 2)) if importance else None
        return _rest_of_block(block, x[:, :read], y[:, :read], out), row

    def _tapped_block(
        self, x: Tensor, index: int, names: dict[str, str], tapped: dict[str, Tensor]
    ) -> Tensor:
        """A block that hands out its insides; its attention is spelt out only if that is asked."""
        block, kinds = self.vit.blocks[index], set(names.values())
        found = {ROW: class_row(block.attn, block.norm1(x))} if ROW in kinds else {}
        if kinds <= {ROW, TOKENS}:
            last = index == self.depth - 1
            x = self._block(block, x) if last else self._run(x, index, index + 1)
        else:
            y = block.norm1(x)
            out, parts = attend(block.attn, y, kinds, self.backend)
            found.update(parts)
            x = _rest_of_block(block, x, y, out)
        found[TOKENS] = x
        tapped.update((name, found[kind]) for name, kind in names.items())
        return x

    def _tapped_last_block(
        self, x: Tensor, importance: bool, names: dict[str, str], tapped: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Every row of the last block, unless only the class token's is tapped."""
        block = self.vit.blocks[-1]
        if set(names.values()) == {ROW}:
            tapped.update(dict.fromkeys(names, class_row(block.attn, block.norm1(x))))
            return self._last_block(block, x, importance)
        row = self._last_block(block, x.detach(), importance)[1] if importance else None
        return self._tapped_block(x, self.depth - 1, names, tapped), row


def _rest_of_block(block: Block, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """From attention's output to the block's: projection, residuals and MLP; all row by row."""
    attention = block.attn
    out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(y).sigmoid()
    x = x + block.ls1(attention.proj(out))
    x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


@torch.no_grad()
def _map_pool_importance(pool: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """Attention of the pooling's latent query to each patch, mean over heads and latents."""
    q = pool.q(pool.latent).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
    k = pool.kv(tokens).unflatten(2, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2)
    scores: Tensor = (pool.q_norm(q) * pool.scale) @ pool.k_norm(k).mT
    return scores.softmax(dim=-1).mean(dim=(1, 2))


def _embeddings(vit: VisionTransformer) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens [1, prefix, D] with positions added, and the positions [rows·columns, D]."""
    tokens = [vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token]
    width = vit.patch_embed.proj.weight.new_empty(1, 0, vit.embed_dim)
    prefix = torch.cat([width, *(token for token in tokens if token is not None)], dim=1)
    if vit.pos_embed is None:
        return prefix, None
    if vit.no_embed_class:
        return prefix, vit.pos_embed[0]
    count = vit.num_prefix_tokens
    return prefix + vit.pos_embed[:, :count], vit.pos_embed[0, count:]
