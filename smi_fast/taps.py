"""Taps: what the inside of a :class:`smi_fast.SparseViT` can be asked for by name.

A tap names a block, counted from 0 or ``last``, and what to take from it. With P prefix tokens
before K kept patches, these in the order of ``kept``:

- ``block.3.tokens`` [B, P + K, D], the block's output, before the final norm;
- ``attention.3`` [B, heads, P + K, P + K], softmax probabilities;
- ``attention.3.scores`` [B, heads, P + K, P + K], what the softmax is taken of;
- ``attention.3.output`` [B, P + K, heads, d], the heads' outputs, before they are projected;
- ``attention.3.row`` [B, heads, P + K], the probabilities of the class token, the first of all.

All of them have gradients. Tokens and a row cost next to nothing, scores and probabilities make the
block hold its attention in memory, and a tapped last block computes every row unless only its row
is asked for. Who taps nothing pays for none of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from timm.models.vision_transformer import Attention
from torch import Tensor

from smi_fast import ops
from smi_fast.projection import parts_of, qkv_of

TOKENS, PROBABILITIES, SCORES, OUTPUT, ROW = "tokens", "probabilities", "scores", "output", "row"
_FORM = re.compile(
    r"(?:block\.(\d+|last)\.(tokens)|attention\.(\d+|last)(?:\.(scores|output|row))?)"
)


def of_blocks(form: str, blocks: Sequence[int] | None, depth: int) -> tuple[str, ...]:
    """``form``, such as "attention.{}", of each of the blocks; None stands for all.

    Raises:
        ValueError: a block that isn't there.
    """
    chosen = range(depth) if blocks is None else blocks
    if any(not -depth <= block < depth for block in chosen):
        raise ValueError(f"expected blocks in -{depth}..{depth - 1}, got {tuple(chosen)}")
    return tuple(form.format(block % depth) for block in chosen)


def parse(names: Iterable[str], depth: int, prefix: int) -> dict[int, dict[str, str]]:
    """For each tapped block the names given and what is to be taken under each.

    Raises:
        ValueError: a name that isn't a tap, of a block that isn't there, or a row without a token
            to have it.
    """
    wanted: dict[int, dict[str, str]] = {}
    for name in names:
        match = _FORM.fullmatch(name)
        if match is None:
            forms = "block.3.tokens, attention.3, attention.3.row, .scores or .output"
            raise ValueError(f"expected a tap such as {forms}, or of last, got {name!r}")
        block, tokens, attention, part = match.groups()
        place = block or attention
        index = depth - 1 if place == "last" else int(place)
        if index >= depth:
            raise ValueError(f"expected a tap of blocks 0..{depth - 1}, got {name!r}")
        if part == ROW and prefix == 0:
            raise ValueError(f"the teacher has no class token: no {name!r}")
        wanted.setdefault(index, {})[name] = tokens or part or PROBABILITIES
    return wanted


def attend(
    attention: Attention, y: Tensor, kinds: set[str], backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Self-attention among the tokens y [B, N, D] of a tapped block, and what may be tapped.

    Returns:
        what goes into the projection [B, N, heads·d], and the parts by kind.
    """
    qkv = qkv_of(attention, y)
    found: dict[str, Tensor] = {}
    if {SCORES, PROBABILITIES} & kinds:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        found[SCORES] = q * q.shape[-1] ** -0.5 @ k.mT
        found[PROBABILITIES] = found[SCORES].softmax(dim=-1)
        out = (found[PROBABILITIES] @ v).transpose(1, 2).flatten(2)
    else:
        out, _ = ops.gather_attention(qkv, backend=backend)
    found[OUTPUT] = out.unflatten(2, (attention.num_heads, -1))
    return out, found


def class_row(attention: Attention, y: Tensor) -> Tensor:
    """The first token's probabilities [B, heads, N] in the attention among y [B, N, D]."""
    q = parts_of(attention, y[:, :1], 0, 1).squeeze(2)
    k = parts_of(attention, y, 1, 2).squeeze(2)
    q, k = attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2)
    scores: Tensor = q * q.shape[-1] ** -0.5 @ k.mT
    return scores.softmax(dim=-1)[:, :, 0]
