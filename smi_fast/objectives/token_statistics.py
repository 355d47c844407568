"""Statistic matching for the tokens of a ViT, which keeps no statistics of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher import SparseViT
from smi_fast.teacher.taps import of_blocks

# Of each tap: mean [D] and variance [D] of every channel.
Statistics = Mapping[str, tuple[Tensor, Tensor]]


class TokenStatistics(Objective):
    """Distance between the statistics of patch tokens and given ones, block by block.

    With the patch tokens ``x_l`` [B, K, D] of each block, without prefix tokens, equal to::

        sum(torch.dist(var(x_l), var_l) + torch.dist(mean(x_l), mean_l))

    where mean and biased variance are over images and patches. Source: DeepInversion's term (arXiv
    1912.08795, equation 4), whose BatchNorm statistics are here those that
    :func:`collect_statistics` records, or that were published with a teacher. No weight is
    published for tokens.

    The statistics are of all patches, the term sees the kept ones: it then asks that the kept
    patches together look like a whole image.

    Args:
        statistics: of taps such as "block.3.tokens", mean and variance [D] on the teacher's device.
        weight: factor.

    Raises:
        ValueError: no statistics, or of something that isn't tokens.
    """

    name = "token_statistics"

    def __init__(self, statistics: Statistics, weight: float = 0.05) -> None:
        if not statistics or not all(name.endswith(".tokens") for name in statistics):
            raise ValueError(f"expected statistics of block.N.tokens, got {list(statistics)}")
        self.statistics, self.weight = dict(statistics), weight

    def __repr__(self) -> str:
        return f"TokenStatistics({len(self.statistics)} blocks, weight={self.weight})"

    def taps(self, depth: int) -> tuple[str, ...]:
        return tuple(self.statistics)

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        width = int(teacher.vit.embed_dim)
        for name, pair in self.statistics.items():
            for tensor in pair:
                if tensor.shape != (width,) or tensor.device != teacher.device:
                    raise ValueError(
                        f"expected {name} with mean and variance [{width}] on {teacher.device}, "
                        f"got {list(tensor.shape)} on {tensor.device}"
                    )

    def __call__(self, inputs: LossInputs) -> Tensor:
        distances = []
        for name, (mean, var) in self.statistics.items():
            tokens = inputs.taps[name][:, inputs.teacher.num_prefix_tokens :]
            own_var, own_mean = torch.var_mean(tokens, dim=(0, 1), correction=0)
            distances += [torch.dist(own_var, var), torch.dist(own_mean, mean)]
        return torch.stack(distances).sum()


@torch.no_grad()
def collect_statistics(
    teacher: nn.Module, loader: Iterable[Any], blocks: Sequence[int] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel of patch tokens, for :class:`TokenStatistics`.

    Args:
        teacher: a timm ``VisionTransformer`` or a :class:`SparseViT`.
        loader: gives batches of normalised images [B, C, H, W], alone or first in a tuple or list.
        blocks: from 0, or from the end when negative; None for all.

    Returns:
        for each tap "block.N.tokens" mean [D] and biased variance [D], of all tokens together,
        summed in float64.

    Raises:
        ValueError: no image at all, or a block that isn't there.
    """
    sparse = teacher if isinstance(teacher, SparseViT) else SparseViT(teacher)
    names = of_blocks("block.{}.tokens", blocks, sparse.depth)
    count = 0
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in loader:
        images = (batch[0] if isinstance(batch, (tuple, list)) else batch).to(sparse.device)
        added = len(images) * sparse.num_patches
        for name, tokens in sparse(images, taps=names).taps.items():
            patches = tokens[:, sparse.num_prefix_tokens :].double()
            own = torch.var_mean(patches, dim=(0, 1), correction=0)[::-1]
            found[name] = _joined(found[name], own, added / (count + added)) if count else own
        count += added
    if not count:
        raise ValueError("expected a loader with images, got none")
    dtype = sparse.dtype
    return {name: (mean.to(dtype), var.to(dtype)) for name, (mean, var) in found.items()}


def _joined(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], share: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of two samples together (Chan, Golub and LeVeque, 1979).

    Args:
        first: mean and variance of one.
        second: likewise of the other.
        share: of the other in both.
    """
    (mean, var), (other_mean, other_var) = first, second
    apart = other_mean - mean
    joined = torch.lerp(var, other_var, share) + share * (1 - share) * apart.square()
    return mean + share * apart, joined
