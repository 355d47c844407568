"""The blocks of a teacher, tokens in and tokens out: by an engine, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from timm.models.eva import EvaBlock
from torch import Tensor, nn

from smi_fast import engine, ops
from smi_fast.engine import Engine
from smi_fast.teacher.attention import attend_first_rows, first_row_probabilities, project_qkv
from smi_fast.teacher.taps import OUTPUT, PROBABILITIES, ROW, SCORES, TOKENS


class BlocksOutput(NamedTuple):
    """What :class:`Blocks` returns.

    Attributes:
        tokens: [B, R, D] after the last block; R is the rows that the head reads, or all N.
        importance: [B, K], or None when it wasn't asked for.
        taps: tensors by the name of their tap.
    """

    tokens: Tensor
    importance: Tensor | None
    taps: dict[str, Tensor]


class Way(NamedTuple):
    """How the blocks run in one pass.

    Attributes:
        engine: that runs them, or None for block by block.
        rotations: of patches in each block, see :func:`smi_fast.teacher.rotary.rotations`.
    """

    engine: Engine | None
    rotations: Sequence[Tensor | None]


class Blocks:
    """The blocks of a frozen teacher.

    Args:
        blocks: of a timm ``VisionTransformer`` or ``Eva``, at least one.
        prefix: prefix tokens in front of the patches.
        rows_read: the first tokens after the last block that the head reads; None for all.
        backend: which implementation of the ops to use.
    """

    def __init__(
        self, blocks: nn.Sequential, prefix: int, rows_read: int | None, backend: str
    ) -> None:
        # nn.Module types every attribute as "Tensor | Module", which no block's attn is.
        self._blocks: Any = blocks
        self._prefix, self._rows_read = prefix, rows_read
        self._backend = backend
        self._engines = engine.candidates(blocks)

    def refresh(self) -> None:
        """Forget what engines derived from the weights."""
        for candidate in self._engines:
            candidate.refresh()

    def __call__(
        self,
        x: Tensor,
        taps: dict[int, dict[str, str]],
        importance: bool,
        rotations: Sequence[Tensor] | None = None,
    ) -> BlocksOutput:
        """Run all blocks.

        Args:
            x: tokens [B, N, D].
            taps: {block: {name: kind}}, see :func:`smi_fast.teacher.taps.parse`.
            importance: also return the importance of each patch.
            rotations: of patches in each block; None for no rotary embedding.
        """
        fast = engine.choose(self._engines, x.device, x.dtype, self._backend)
        way = Way(fast, rotations or [None] * len(self._blocks))
        found: dict[str, Tensor] = {}
        done, last = 0, len(self._blocks) - 1
        for index in sorted(taps.keys() - {last}):
            x = self._run(way, x, done, index)
            x = self._tapped(way, x, index, taps[index], found)
            done = index + 1
        x = self._run(way, x, done, last)
        x, row = self._last(way, x, taps.get(last, {}), importance, found)
        return BlocksOutput(x, row, found)

    def _run(self, way: Way, x: Tensor, start: int, stop: int) -> Tensor:
        """Tokens after the blocks from ``start`` up to ``stop``; the same ones when these meet."""
        if start < stop and way.engine is not None:
            return way.engine.run(x, start, stop)
        for block, rotation in zip(
            self._blocks[start:stop], way.rotations[start:stop], strict=True
        ):
            y = block.norm1(x)
            qkv = project_qkv(block.attn, y, rotation)
            out, _ = ops.gather_attention(qkv, backend=self._backend)
            x = _after_attention(block, x, y, out)
        return x

    def _last(
        self,
        way: Way,
        x: Tensor,
        names: dict[str, str],
        importance: bool,
        found: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens after the last block, and importance. A tap other than its row needs all rows."""
        index = len(self._blocks) - 1
        if set(names.values()) - {ROW}:
            row = self._importance(self._rows(way, x.detach())[1]) if importance else None
            return self._tapped(way, x, index, names, found), row
        if names:
            found.update(dict.fromkeys(names, self._class_row(way, x, index)))
        if self._rows_read is None and not importance:
            return self._run(way, x, index, index + 1), None
        x, probabilities = self._rows(way, x)
        return x, self._importance(probabilities) if importance else None

    def _rows(self, way: Way, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [B, R, D] of the last block that the head reads, and their probabilities."""
        read = self._rows_read
        if read is not None and way.engine is not None:
            return way.engine.last_block_rows(x, read)
        block = self._blocks[-1]
        y = block.norm1(x)
        out, probabilities = attend_first_rows(block.attn, y, read, way.rotations[-1])
        return _after_attention(block, x[:, :read], y[:, :read], out), probabilities

    def _importance(self, probabilities: Tensor) -> Tensor:
        """Attention to each patch [B, K], mean over heads: of the class token, or of all patches
        where the head reads every token.
        """
        queries = slice(self._prefix, None) if self._rows_read is None else slice(0, 1)
        return probabilities[:, :, queries, self._prefix :].detach().mean(dim=(1, 2))

    def _tapped(
        self,
        way: Way,
        x: Tensor,
        index: int,
        names: dict[str, str],
        found: dict[str, Tensor],
    ) -> Tensor:
        """Tokens after one block, whose taps go into ``found``."""
        block, kinds = self._blocks[index], set(names.values())
        parts: dict[str, Tensor] = {}
        if ROW in kinds:
            parts[ROW] = self._class_row(way, x, index)
        if kinds <= {ROW, TOKENS}:
            x = self._run(way, x, index, index + 1)
        else:
            y = block.norm1(x)
            qkv = project_qkv(block.attn, y, way.rotations[index])
            if {SCORES, PROBABILITIES} & kinds:
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                parts[SCORES] = q * q.shape[-1] ** -0.5 @ k.mT
                parts[PROBABILITIES] = parts[SCORES].softmax(dim=-1)
                out = (parts[PROBABILITIES] @ v).transpose(1, 2).flatten(2)
            else:
                out, _ = ops.gather_attention(qkv, backend=self._backend)
            parts[OUTPUT] = out.unflatten(2, (block.attn.num_heads, -1))
            x = _after_attention(block, x, y, out)
        parts[TOKENS] = x
        found.update((name, parts[kind]) for name, kind in names.items())
        return x

    def _class_row(self, way: Way, x: Tensor, index: int) -> Tensor:
        """The first token's probabilities [B, heads, N] in a block's attention."""
        block = self._blocks[index]
        y, rotation = block.norm1(x), way.rotations[index]
        return first_row_probabilities(block.attn, y, 1, rotation)[0][:, :, 0]


def _after_attention(block: Any, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """The rest of a block, token by token: projection, residuals and MLP.

    Args:
        block: which one.
        x: tokens before it [B, R, D].
        y: their first norm [B, R, D].
        out: attention's output [B, R, H·d].
    """
    attention = block.attn
    out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(y).sigmoid()
    scale1, scale2 = _layer_scales(block)
    x = x + scale1(attention.proj(out))
    x = x + scale2(block.mlp(block.norm2(x)))
    return x


def _layer_scales(block: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """LayerScale of a block's attention and of its MLP; in Eva a factor, or None."""
    if not isinstance(block, EvaBlock):
        return block.ls1, block.ls2
    first, second = (
        (lambda y: y) if gamma is None else gamma.mul for gamma in (block.gamma_1, block.gamma_2)
    )
    return first, second
