"""Taps: the names of intermediate tensors that :class:`smi_fast.SparseViT` returns on request.

A tap names a block and one of its tensors. Blocks are counted from 0; ``last`` is the last one. The
tokens are P prefix tokens, then the K kept patches in the order of ``kept``:

- ``block.3.tokens`` [B, P + K, D], the block's output;
- ``attention.3`` [B, heads, P + K, P + K], softmax probabilities;
- ``attention.3.scores`` [B, heads, P + K, P + K], the input of the softmax, with its 1/sqrt(d);
- ``attention.3.output`` [B, P + K, heads, d], the heads' outputs, before the output projection;
- ``attention.3.row`` [B, heads, P + K], the probabilities of the class token, the first one;
- ``attention.3.q``, ``.k`` and ``.v`` [B, heads, P + K, d], queries, keys and values, with timm's
  order of axes, as they enter attention: after q/k norm and rotary positions, before the 1/sqrt(d);
- ``mlp.3.hidden`` [B, P + K, F], the MLP's hidden layer: the input of its second linear layer
  ``fc2``, after the activation, the gate and the norm that it may have.

All taps have gradients. Tokens and rows cost almost nothing. For scores and probabilities the block
stores its attention matrix. Hidden layers, queries, keys and values need no more memory, but no
engine gives them, so their block runs op by op. A last block with taps computes every row, unless
``row`` is its only tap. A forward pass without taps costs nothing extra.

With ``SparseViT(..., until=4)`` the first four blocks run, and of these only what the taps read:
no block behind the last tap, and nothing of its block that no tap needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral

TOKENS, PROBABILITIES, SCORES, OUTPUT, ROW = "tokens", "probabilities", "scores", "output", "row"
QUERIES, KEYS, VALUES, HIDDEN = "q", "k", "v", "hidden"
_FORM = re.compile(
    r"(?:block\.(\d+|last)\.(tokens)|mlp\.(\d+|last)\.(hidden)"
    r"|attention\.(\d+|last)(?:\.(scores|output|row|q|k|v))?)"
)


def of_blocks(form: str, blocks: Sequence[int] | None, depth: int) -> tuple[str, ...]:
    """The names of one tap in several blocks, from a form such as "attention.{}".

    Args:
        form: a name with {} in place of the block.
        blocks: indices of blocks, from the end when negative; None for all.
        depth: number of the teacher's blocks.

    Raises:
        ValueError: no list of whole numbers, no block at all, or one that the teacher doesn't have.
    """
    try:
        chosen = tuple(range(depth) if blocks is None else blocks)
    except TypeError:
        chosen = ()
    if not chosen or not all(isinstance(block, Integral) for block in chosen):
        raise ValueError(f"expected blocks as whole numbers, [0, -1], got {blocks!r}")
    if any(not -depth <= block < depth for block in chosen):
        raise ValueError(f"expected blocks in -{depth}..{depth - 1}, got {chosen}")
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
            forms = "block.3.tokens, mlp.3.hidden, attention.3, .row, .scores, .output, .q, .k, .v"
            raise ValueError(f"expected a tap such as {forms}, or of last, got {name!r}")
        block, tokens, mlp, hidden, attention, kind = match.groups()
        place = block or mlp or attention
        index = depth - 1 if place == "last" else int(place)
        if index >= depth:
            raise ValueError(f"expected a tap of blocks 0..{depth - 1}, got {name!r}")
        if kind == ROW and prefix == 0:
            raise ValueError(f"the teacher has no class token: no {name!r}")
        wanted.setdefault(index, {})[name] = tokens or hidden or kind or PROBABILITIES
    return wanted


def blocks_read(names: Iterable[str], depth: int) -> int:
    """Number of the first blocks of a teacher with ``depth`` blocks that give these taps."""
    return max(parse(names, depth, prefix=1), default=-1) + 1


def check_until(until: int, wanted: dict[int, dict[str, str]], depth: int) -> None:
    """Refuse an early exit that isn't one, or in front of a tap.

    Args:
        until: number of the first blocks that may run.
        wanted: of :func:`parse`.
        depth: number of the teacher's blocks.

    Raises:
        ValueError: it is out of range, or a tap is of a later block.
    """
    if not isinstance(until, int) or not 0 <= until <= depth:
        raise ValueError(f"expected until, a number of blocks, in 0..{depth}, got {until!r}")
    later = [name for index, names in wanted.items() if index >= until for name in names]
    if later:
        raise ValueError(f"expected taps of the first {until} blocks, until={until}, got {later}")
