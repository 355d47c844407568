"""The blocks of a teacher, tokens in and tokens out: by an engine, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smi_fast import engine, ops
from smi_fast.engine import Engine
from smi_fast.engine.precision import FLOAT32
from smi_fast.teacher.attention import attend_first_rows, first_row_probabilities, project_qkv
from smi_fast.teacher.narrowing import most_attended, with_prefix
from smi_fast.teacher.ragged import RaggedRows
from smi_fast.teacher.steps import after_attention, after_mlp, hidden
from smi_fast.teacher.taps import (
    HIDDEN,
    KEYS,
    OUTPUT,
    PROBABILITIES,
    QUERIES,
    ROW,
    SCORES,
    TOKENS,
    VALUES,
)

# What a block computes behind its q, k and v, and behind its attention.
_BEHIND_QKV = {OUTPUT, HIDDEN, TOKENS}
_BEHIND_ATTENTION = {HIDDEN, TOKENS}


class BlocksOutput(NamedTuple):
    """What :class:`Blocks` returns.

    Attributes:
        tokens: [B, R, D] after the last block, and in a call also after the norm behind it; R is
            the rows that the head reads, or all N.
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
    rotations: Sequence[Tensor] | None

    def rotation(self, block: int) -> Tensor | None:
        """The rotation of the kept patches in one block; None where positions are not rotary."""
        return None if self.rotations is None else self.rotations[block]


class Blocks:
    """The blocks of a frozen teacher.

    Args:
        blocks: of a timm ``VisionTransformer`` or ``Eva``, at least one.
        prefix: prefix tokens in front of the patches.
        rows_read: the first tokens after the last block that the head reads; None for all.
        backend: which implementation of the ops to use.
        precision: of an engine's products; what runs one by one is in that of the weights.

    Attributes:
        narrow: share of the patches' tokens that goes into each of some blocks and on, see
            :class:`smi_fast.SparseViT`.
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        prefix: int,
        rows_read: int | None,
        backend: str,
        precision: str = FLOAT32,
    ) -> None:
        # nn.Module types every attribute as "Tensor | Module", which no block's attn is.
        self._blocks: Any = blocks
        self._prefix, self._rows_read = prefix, rows_read
        self._backend, self._precision = backend, precision
        self._engines = engine.candidates(blocks, precision, backend)
        self.narrow: dict[int, float] = {}

    def refresh(self) -> None:
        """Forget what engines derived from the weights."""
        for candidate in self._engines:
            candidate.refresh()

    def derived(self) -> tuple[object, ...]:
        """What engines derived from the weights."""
        return tuple(found for candidate in self._engines for found in candidate.derived())

    def engine_for(self, device: torch.device, dtype: torch.dtype) -> Engine | None:
        """The engine for tokens of this device and data type; None for one block after another.

        Raises:
            BackendUnavailable: there is none in the precision that was asked for.
        """
        return engine.choose(self._engines, device, dtype, self._backend, self._precision)

    def way(self, patches: Tensor, rotations: Sequence[Tensor] | None) -> Way:
        """How the blocks run on tokens of such patches.

        Raises:
            BackendUnavailable: there is no engine in the precision that was asked for.
        """
        return Way(self.engine_for(patches.device, patches.dtype), rotations)

    def __call__(
        self,
        x: Tensor,
        way: Way,
        taps: dict[int, dict[str, str]],
        importance: bool,
        norm: nn.Module,
    ) -> BlocksOutput:
        """Run all blocks, and the norm behind them.

        Args:
            x: tokens [B, N, D].
            way: how they run, see :meth:`way`.
            taps: {block: {name: kind}}, see :func:`smi_fast.teacher.taps.parse`.
            importance: also return the importance of each patch.
            norm: behind the blocks.
        """
        last, read = len(self._blocks) - 1, self._rows_read
        found: dict[str, Tensor] = {}
        if self.narrow:
            output = self._narrowed(way, x, taps, importance)
            return output._replace(tokens=norm(output.tokens))
        if way.engine is not None and read is not None and last not in taps:
            done = max(taps, default=-1) + 1
            x = self._before(way, x, done, taps, found)
            x, probabilities = way.engine.run_to_rows(x, done, read, norm, way.rotations)
            row = self._importance(probabilities) if importance else None
            return BlocksOutput(x, row, found)
        x = self._before(way, x, last, taps, found)
        x, row = self._last(way, x, taps.get(last, {}), importance, found)
        return BlocksOutput(norm(x), row, found)

    def _narrowed(
        self, way: Way, x: Tensor, taps: dict[int, dict[str, str]], importance: bool
    ) -> BlocksOutput:
        """Run all blocks, from the first narrowed one on with fewer tokens. All taps are before it.

        The importance of patches that don't reach the last block is 0.
        """
        found: dict[str, Tensor] = {}
        kept = x.shape[1] - self._prefix
        left = torch.arange(kept, device=x.device).expand(len(x), -1)
        done, last = min(self.narrow), len(self._blocks) - 1
        x = self._before(way, x, done, taps, found)
        for index, share in self.narrow.items():
            x = self._run(way, x, done, index)
            with torch.no_grad():
                attention = self._class_row(way, x, index)[:, :, self._prefix :].mean(1)
            places = most_attended(attention, share)
            left = left.gather(1, places)
            x = x.take_along_dim(with_prefix(places, self._prefix)[:, :, None], 1)
            if way.rotations is not None:
                turned = places[:, :, None, None]
                way = way._replace(rotations=[r.take_along_dim(turned, 1) for r in way.rotations])
            done = index
        x = self._run(way, x, done, last)
        x, row = self._last(way, x, {}, importance, found)
        if row is not None:
            row = row.new_zeros(len(row), kept).scatter(1, left, row)
        return BlocksOutput(x, row, found)

    def ragged(
        self,
        x: Tensor,
        way: Way,
        lengths: Tensor,
        importance: bool,
    ) -> BlocksOutput:
        """Run all blocks on a number of tokens of its own for each image.

        On the CPU the rows of all images are concatenated, so that padded rows cost nothing in an
        engine, and no product without one. Rotary positions, and a GPU, whose shapes are not to
        depend on data, keep rows padded, and blocks run one by one.

        Args:
            x: tokens [B, N, D].
            way: how the blocks run.
            lengths: int64 [B], tokens of each image, prefix tokens included; later ones don't
                count.
            importance: also return the importance of each patch, 0 for those that don't count.
        """
        packed = x.device.type == "cpu" and way.rotations is None
        rows = RaggedRows.of(lengths, x.shape[1], packed=packed)
        last, x = self._blocks[-1], rows.pack(x)
        if way.engine is not None and rows.index is not None:
            return self._packed(way.engine, x, rows, importance)
        for index, block in enumerate(self._blocks):
            y = block.norm1(x)
            qkv = rows.unpack(project_qkv(block.attn, y, way.rotation(index)))
            scored = importance and block is last
            out, row = ops.gather_attention(
                qkv, lengths=lengths, importance=scored, backend=self._backend
            )
            if block is last:
                read = slice(0, self._rows_read)
                x, y, out = rows.unpack(x)[:, read], rows.unpack(y)[:, read], out[:, read]
            else:
                out = rows.pack(out)
            x = after_attention(block, x, y, out)
            x = after_mlp(block, x, hidden(block, x))
        return BlocksOutput(x, row[:, self._prefix :] if row is not None else None, {})

    def _packed(
        self, engine: Engine, x: Tensor, rows: RaggedRows, importance: bool
    ) -> BlocksOutput:
        """Run all blocks in an engine, on concatenated rows x [1, R, D]."""
        last, read = len(self._blocks) - 1, self._rows_read
        assert read is not None
        if last:
            x = engine.run_ragged(x[0], 0, last, rows.offsets)[None]
        x, probabilities = engine.last_block_rows(x, read, offsets=rows.offsets)
        if not importance:
            return BlocksOutput(x, None, {})
        row = rows.unpack(probabilities[:, :, 0].mean(dim=1))
        return BlocksOutput(x, row[:, self._prefix :], {})

    def read(
        self,
        x: Tensor,
        way: Way,
        taps: dict[int, dict[str, str]],
    ) -> dict[str, Tensor]:
        """The taps alone, of which there is at least one: nothing behind the last one runs.

        The arguments are those of a call.
        """
        last = max(taps)
        found: dict[str, Tensor] = {}
        x = self._before(way, x, last, taps, found)
        self._tapped(way, x, last, taps[last], found, goes_on=False)
        return found

    def _before(
        self,
        way: Way,
        x: Tensor,
        stop: int,
        taps: dict[int, dict[str, str]],
        found: dict[str, Tensor],
    ) -> Tensor:
        """Tokens before the block ``stop``. Taps of the blocks until there go into ``found``."""
        done = 0
        for index in sorted(index for index in taps if index < stop):
            x = self._run(way, x, done, index)
            x = self._tapped(way, x, index, taps[index], found)
            done = index + 1
        return self._run(way, x, done, stop)

    def _run(self, way: Way, x: Tensor, start: int, stop: int) -> Tensor:
        """Tokens after the blocks from ``start`` up to ``stop``; the same ones when these meet."""
        if start < stop and way.engine is not None:
            return way.engine.run(x, start, stop, way.rotations)
        for index in range(start, stop):
            block = self._blocks[index]
            y = block.norm1(x)
            qkv = project_qkv(block.attn, y, way.rotation(index))
            out, _ = ops.gather_attention(qkv, backend=self._backend)
            x = after_attention(block, x, y, out)
            x = after_mlp(block, x, hidden(block, x))
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
            return way.engine.last_block_rows(x, read, way.rotations)
        block = self._blocks[-1]
        y = block.norm1(x)
        out, probabilities = attend_first_rows(block.attn, y, read, way.rotation(-1))
        x = after_attention(block, x[:, :read], y[:, :read], out)
        return after_mlp(block, x, hidden(block, x)), probabilities

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
        goes_on: bool = True,
    ) -> Tensor:
        """Tokens after one block, whose taps go into ``found``.

        Where nothing ``goes_on`` behind it, the block runs only as far as its taps are.
        """
        kinds = set(names.values())
        needed = kinds | {TOKENS} if goes_on else kinds
        parts: dict[str, Tensor] = {}
        if ROW in kinds:
            parts[ROW] = self._class_row(way, x, index)
        if kinds <= {ROW, TOKENS}:
            x = self._run(way, x, index, index + 1) if TOKENS in needed else x
        else:
            x = self._op_by_op(way, x, index, needed, parts)
        parts[TOKENS] = x
        found.update((name, parts[kind]) for name, kind in names.items())
        return x

    def _op_by_op(
        self, way: Way, x: Tensor, index: int, needed: set[str], parts: dict[str, Tensor]
    ) -> Tensor:
        """Tokens after one block, whose needed ``parts`` are kept; as they were if not needed."""
        block = self._blocks[index]
        y = block.norm1(x)
        qkv = project_qkv(block.attn, y, way.rotation(index))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        parts.update({QUERIES: q, KEYS: k, VALUES: v})
        if {SCORES, PROBABILITIES} & needed:
            parts[SCORES] = q * q.shape[-1] ** -0.5 @ k.mT
            parts[PROBABILITIES] = parts[SCORES].softmax(dim=-1)
        if not _BEHIND_QKV & needed:
            return x
        if PROBABILITIES in parts:
            out = (parts[PROBABILITIES] @ v).transpose(1, 2).flatten(2)
        else:
            out, _ = ops.gather_attention(qkv, backend=self._backend)
        parts[OUTPUT] = out.unflatten(2, (block.attn.num_heads, -1))
        if not _BEHIND_ATTENTION & needed:
            return x
        x = after_attention(block, x, y, out)
        parts[HIDDEN] = hidden(block, x)
        return after_mlp(block, x, parts[HIDDEN]) if TOKENS in needed else x

    def _class_row(self, way: Way, x: Tensor, index: int) -> Tensor:
        """The first token's probabilities [B, heads, N] in a block's attention."""
        block = self._blocks[index]
        y, rotation = block.norm1(x), way.rotation(index)
        return first_row_probabilities(block.attn, y, 1, rotation)[0][:, :, 0]
