"""Importance: the score of each kept patch, by which a schedule ranks them at a stop.

``SparseInverter(importance=...)`` takes a name, a function, or an object of this module. The
iteration before a stop computes it, without jitter, from the images that the teacher sees.

- "attention": the attention of the row that the head reads, see :class:`Attention`.
- "rollout": the attention of all blocks, multiplied, see :class:`Rollout`.
- "gradient": how much the loss depends on each patch's token, see :class:`Gradient`.
- "random": a random order, see :class:`Random`.
- "smoothed-attention" and so on: the mean over each patch's neighbours, see :class:`Smoothed`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TypeAlias

import torch
from torch import Tensor

from smi_fast.ops.grid import neighbourhood_mean
from smi_fast.teacher import SparseViT
from smi_fast.teacher.narrowing import refuse_narrowed
from smi_fast.teacher.taps import of_blocks, parse

SMOOTHED = "smoothed-"


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreInputs:
    """What an importance may read.

    Attributes:
        view: [B, C, H, W], the images as the teacher saw them, normalised, without jitter. The next
            update changes them: copy them to hold on to them.
        kept: int64 [B, K], the patches that the teacher computed, ascending.
        attention: [B, K], the importance that :class:`smi_fast.SparseViT` returns.
        teacher: the network that is inverted.
        taps: the tensors that the importance asked for, by name.
        gradients: the gradient of the loss for each of them, None where the loss doesn't depend on
            it; empty unless the importance ``differentiates``.
        rows: which images of the whole batch these are.
    """

    view: Tensor
    kept: Tensor
    attention: Tensor
    teacher: SparseViT
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    rows: slice | Tensor = field(default_factory=lambda: slice(None))


class Importance(ABC):
    """Scores kept patches; the highest score is the most important patch.

    Attributes:
        differentiates: whether it reads the gradient of the loss for its taps.
    """

    differentiates: bool = False

    def taps(self, depth: int) -> tuple[str, ...]:
        """Names of the taps that it reads from a teacher with ``depth`` blocks.

        See :mod:`smi_fast.teacher.taps`.
        """
        return ()

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        """Prepare for a batch: draw random numbers.

        Args:
            teacher: the network that is inverted.
            batch: B, the number of images.
            generator: draws random numbers, on the CPU; None for torch's own.
        """
        return None

    @abstractmethod
    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """The scores [B, K]."""


Scores: TypeAlias = Importance | Callable[[ScoreInputs], Tensor] | str


@dataclass(frozen=True)
class Attention(Importance):
    """Attention probability of each patch, mean over heads, and over blocks where some are chosen.

    Without ``blocks`` it is the importance of :class:`smi_fast.SparseViT`, which comes out of the
    row that the head reads and costs nothing. With ``blocks`` it is the class token's attention in
    each of them, which computes that row a second time.

    >>> Attention(blocks=(-1, -2)).taps(depth=4)
    ('attention.3.row', 'attention.2.row')

    Args:
        blocks: indices, from the end when negative; None for the last block as above.

    Raises:
        ValueError: no block, or no whole numbers.
    """

    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.blocks is None:
            return
        chosen = tuple(self.blocks) if isinstance(self.blocks, Iterable) else ()
        if not chosen or not all(map(_is_index, chosen)):
            raise ValueError(f"expected blocks, such as (-1,), got {self.blocks!r}")
        object.__setattr__(self, "blocks", chosen)

    def taps(self, depth: int) -> tuple[str, ...]:
        return () if self.blocks is None else of_blocks("attention.{}.row", self.blocks, depth)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        if self.blocks is None:
            return inputs.attention
        rows = torch.stack([inputs.taps[name] for name in self.taps(inputs.teacher.depth)])
        return rows[..., inputs.teacher.num_prefix_tokens :].mean(dim=(0, 2))


@dataclass(frozen=True)
class Rollout(Importance):
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928), from what the head reads to patches.

    With A_l the attention of block l [N, N] among the tokens of the kept patches, mean over heads,
    it is the row of the class token in::

        (A_L / 2 + I / 2) @ ... @ (A_1 / 2 + I / 2)

    Where the head reads other tokens, the row is the mean over patches (average and maximum
    pooling), or weighted by the pooling's own attention (map pooling).

    No engine gives attention matrices. So the iteration before a stop runs block by block and
    stores them, ``depth * B * heads * N * N`` numbers; with ``max_batch`` B is that of a part.

    >>> Rollout().taps(depth=2)
    ('attention.0', 'attention.1')
    """

    def taps(self, depth: int) -> tuple[str, ...]:
        return of_blocks("attention.{}", None, depth)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        teacher, prefix = inputs.teacher, inputs.teacher.num_prefix_tokens
        row = _read(inputs)
        for name in reversed(self.taps(teacher.depth)):
            maps = inputs.taps[name].to(row.dtype).mean(dim=1)
            row = (row + (row[:, None] @ maps)[:, 0]) / 2
        return row[:, prefix:]


def _is_index(block: object) -> bool:
    return isinstance(block, Integral) and not isinstance(block, bool)


def _read(inputs: ScoreInputs) -> Tensor:
    """How much the head reads of each token after the last block, [B, prefix + K]; sums to 1."""
    teacher, attention = inputs.teacher, inputs.attention
    prefix, (batch, patches) = teacher.num_prefix_tokens, attention.shape
    # Products of many matrices need more digits than half precision has.
    dtype = torch.promote_types(attention.dtype, torch.float32)
    row = attention.new_zeros(batch, prefix + patches, dtype=dtype)
    if teacher.vit.attn_pool is not None:
        row[:, prefix:] = attention
    elif teacher.vit.global_pool == "token":
        row[:, 0] = 1
    else:
        row[:, prefix:] = 1 / patches
    return row


@dataclass(frozen=True)
class Gradient(Importance):
    """Gradient times token: how much the loss would change if a patch's token were 0.

    It is ``(gradient * token).sum(-1).abs()`` for the tokens after a block, to first order. The
    gradient is that of the whole loss.

    >>> Gradient().taps(depth=4)
    ('block.2.tokens',)

    Args:
        block: index, from the end when negative; by default the block before the last, whose tokens
            are the last that the head reads of a patch.

    Raises:
        ValueError: no whole number.
    """

    block: int = -2
    differentiates = True

    def __post_init__(self) -> None:
        if not _is_index(self.block):
            raise ValueError(f"expected a block, such as -2, got {self.block!r}")

    def taps(self, depth: int) -> tuple[str, ...]:
        return of_blocks("block.{}.tokens", (self.block,), depth)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        (name,) = self.taps(inputs.teacher.depth)
        gradient = inputs.gradients[name]
        if gradient is None:
            raise ValueError("importance 'gradient' needs an objective that depends on the tokens")
        products = gradient * inputs.taps[name]
        return products[:, inputs.teacher.num_prefix_tokens :].sum(-1).abs()


class Random(Importance):
    """A random order of the patches of each image, drawn once for a batch."""

    def __init__(self) -> None:
        self._drawn: Tensor | None = None

    def __repr__(self) -> str:
        return "Random()"

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        shape = (batch, teacher.num_patches)
        self._drawn = torch.rand(shape, generator=generator, dtype=torch.float32).to(teacher.device)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        if self._drawn is None:
            raise RuntimeError("begin() draws the order: call it before the first iteration")
        return self._drawn[inputs.rows].gather(1, inputs.kept)


@dataclass(frozen=True)
class Smoothed(Importance):
    """Another importance, averaged over each patch's 3 x 3 neighbourhood.

    Stopped patches count as 0, so patches score high which lie together.

    >>> Smoothed(Rollout())
    Smoothed(importance=Rollout())

    Args:
        importance: the other one.

    Raises:
        TypeError: it is none.
    """

    importance: Importance

    def __post_init__(self) -> None:
        if not isinstance(self.importance, Importance):
            raise TypeError(
                f"expected an importance to smooth, such as Rollout(), got {self.importance!r}"
            )

    @property
    def differentiates(self) -> bool:  # type: ignore[override]
        return self.importance.differentiates

    def taps(self, depth: int) -> tuple[str, ...]:
        return self.importance.taps(depth)

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        self.importance.begin(teacher, batch, generator)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        return neighbourhood_mean(self.importance(inputs), inputs.kept, inputs.teacher.grid)


@dataclass(frozen=True)
class UserImportance(Importance):
    """A function of :class:`ScoreInputs` as an importance."""

    function: Callable[[ScoreInputs], Tensor]

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        return self.function(inputs)


_NAMED: dict[str, Callable[[], Importance]] = {
    "attention": Attention,
    "rollout": Rollout,
    "gradient": Gradient,
    "random": Random,
}
NAMES = (*_NAMED, *(SMOOTHED + name for name in _NAMED))


def as_importance(given: Scores, teacher: SparseViT) -> Importance:
    """The importance of a name or a function, or itself, for one teacher.

    Raises:
        ValueError: another name, or a teacher that doesn't have what the importance reads.
        TypeError: neither a name nor a function.
    """
    importance = _as_importance(given)
    try:
        taps = importance.taps(teacher.depth)
        refuse_narrowed(parse(taps, teacher.depth, teacher.num_prefix_tokens), teacher.narrow)
    except ValueError as error:
        raise ValueError(f"importance {given!r} can't score this teacher: {error}") from error
    return importance


def _as_importance(given: Scores) -> Importance:
    if isinstance(given, str):
        if given not in NAMES:
            raise ValueError(f"expected importance {', '.join(NAMES)}, got {given!r}")
        plain = _NAMED[given.removeprefix(SMOOTHED)]()
        return Smoothed(plain) if given.startswith(SMOOTHED) else plain
    if isinstance(given, Importance):
        return given
    if callable(given) and not isinstance(given, type):
        return UserImportance(given)
    raise TypeError(f"expected importance as a name or a function, got {given!r}")


@torch.no_grad()
def score(importance: Importance, inputs: ScoreInputs) -> Tensor:
    """The scores [B, K], without gradient.

    Raises:
        ValueError: the importance returns anything else than a score for each kept patch.
    """
    scores, kept = importance(inputs), inputs.kept
    if not isinstance(scores, Tensor) or scores.shape != kept.shape:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"expected importance {importance!r} to return scores {list(kept.shape)}, got {got}"
        )
    if scores.dtype == torch.bool or scores.is_complex() or scores.device != kept.device:
        raise ValueError(
            f"expected importance {importance!r} to return real numbers on {kept.device}, "
            f"got {scores.dtype} on {scores.device}"
        )
    return scores.detach()
