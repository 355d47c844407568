"""Ragged batches: a number of tokens of its own for each image, without a product for padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RaggedRows:
    """Which tokens of a padded batch [B, N, ...] count.

    Attributes:
        lengths: int64 [B]; of each image its first tokens count.
        tokens: N.
        index: int64 [R], the tokens that count among all B * N, whose rows are concatenated; None
            where padded rows stay, so that no shape depends on data.
    """

    lengths: Tensor
    tokens: int
    index: Tensor | None

    @classmethod
    def of(cls, lengths: Tensor, tokens: int, *, packed: bool) -> RaggedRows:
        """The rows of images that have ``lengths`` tokens of at most ``tokens``.

        Args:
            lengths: int64 [B].
            tokens: N.
            packed: whether to concatenate rows. That reads ``lengths`` on the host.
        """
        if not packed:
            return cls(lengths, tokens, None)
        counts = torch.arange(tokens, device=lengths.device) < lengths[:, None]
        return cls(lengths, tokens, counts.flatten().nonzero()[:, 0])

    @property
    def offsets(self) -> Tensor:
        """int64 [B + 1], where the concatenated rows of each image begin, and the last ones end."""
        return F.pad(self.lengths.cumsum(0), (1, 0))

    def pack(self, x: Tensor) -> Tensor:
        """Padded [B, N, ...] as concatenated rows [1, R, ...], or as it is."""
        return x if self.index is None else x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Concatenated rows [1, R, ...] as padded [B, N, ...], with 0 in rows that don't count."""
        if self.index is None:
            return x
        padded = x.new_zeros(len(self.lengths) * self.tokens, *x.shape[2:])
        whole: Tensor = padded.index_copy(0, self.index, x[0]).unflatten(0, (-1, self.tokens))
        return whole


def check_lengths(lengths: Tensor, kept: Tensor) -> None:
    """Check the numbers of patches of images; their range only on the CPU, without a wait.

    Raises:
        ValueError: they aren't int64 [B] in 0..K on the device of ``kept``.
    """
    batch, most = kept.shape
    expected = f"expected lengths int64 [{batch}] on {kept.device}, numbers in 0..{most}"
    if not isinstance(lengths, Tensor):
        raise ValueError(f"{expected}, got {type(lengths).__name__}")
    fits = lengths.shape == (batch,) and lengths.dtype == torch.int64
    if not fits or lengths.device != kept.device:
        raise ValueError(
            f"{expected}, got {lengths.dtype} {list(lengths.shape)} on {lengths.device}"
        )
    on_host = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and bool(((lengths < 0) | (lengths > most)).any()):
        raise ValueError(f"{expected}, got {lengths.tolist()}")
