"""Taps: the names of intermediate tensors that :class:`smi_fast.SparseViT` returns on request.

A tap names a block and one of its tensors. Blocks are counted from 0; ``last`` is the last one. The
tokens are P prefix tokens, then the K kept patches in the order of ``kept``:

- ``block.3.tokens`` [B, P + K, D], the block's output;
- ``attention.3`` [B, heads, P + K, P + K], softmax probabilities;
- ``attention.3.scores`` [B, heads, P + K, P + K], the input of the softmax, with its 1/sqrt(d);
- ``attention.3.output`` [B, P + K, heads, d], the heads' outputs, before the output projection;
- ``attention.3.row`` [B, heads, P + K], the probabilities of the class token, the first one.

All taps have gradients. Tokens and rows cost almost nothing. For scores and probabilities the block
stores its attention matrix. A last block with taps computes every row, unless ``row`` is its only
tap. A forward pass without taps costs nothing extra.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

TOKENS, PROBABILITIES, SCORES, OUTPUT, ROW = "tokens", "probabilities", "scores", "output", "row"
_FORM = re.compile(
    r"(?:block\.(\d+|last)\.(tokens)|attention\.(\d+|last)(?:\.(scores|output|row))?)"
)


def of_blocks(form: str, blocks: Sequence[int] | None, depth: int) -> tuple[str, ...]:
    """The names of one tap in several blocks, from a form such as "attention.{}".

    Args:
        form: a name with {} in place of the block.
        blocks: indices of blocks, from the end when negative; None for all.
        depth: number of the teacher's blocks.

    Raises:
        ValueError: a block that the teacher doesn't have.
    """
    chosen = range(depth) if blocks is None else blocks
    if any(not -depth <= block < depth for block in chosen):
        raise ValueError(f"expected blocks in -{depth}..{depth - 1}, got {tuple(chosen)}")
    return tuple(form.format(block % depth) for block in chosen)


def parse(names: Iterable[str], depth: int, prefix: int) -> dict[int, dict[str, str]]:
    """Parse names of taps into {block: {name: kind}}.

    Args:
        names: of taps.
        depth: number of the teacher's blocks.
        prefix: number of the teacher's prefix tokens.

    Raises:
        ValueError: one text in place of a list, a name that isn't a tap, a block that the teacher
            doesn't have, or a row of a teacher without class token.
    """
    if isinstance(names, str):
        raise ValueError(f"expected a list of taps, [{names!r}], got {names!r}")
    wanted: dict[int, dict[str, str]] = {}
    for name in names:
        match = _FORM.fullmatch(name)
        if match is None:
            forms = "block.3.tokens, attention.3, attention.3.row, .scores or .output"
            raise ValueError(f"expected a tap such as {forms}, or of last, got {name!r}")
        block, tokens, attention, kind = match.groups()
        place = block or attention
        index = depth - 1 if place == "last" else int(place)
        if index >= depth:
            raise ValueError(f"expected a tap of blocks 0..{depth - 1}, got {name!r}")
        if kind == ROW and prefix == 0:
            raise ValueError(f"the teacher has no class token: no {name!r}")
        wanted.setdefault(index, {})[name] = tokens or kind or PROBABILITIES
    return wanted
