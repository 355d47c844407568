"""Statistic matching for the tokens of a ViT, with statistics recorded from images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher import SparseViT
from smi_fast.teacher.taps import of_blocks

# Mean [D] and variance [D] of the channels, by the name of a tap.
Statistics = Mapping[str, tuple[Tensor, Tensor]]


class TokenStatistics(Objective):
    """Distance of the statistics of patch tokens from recorded ones, summed over blocks.

    ``x_l`` [B, K, D] are the kept patches' tokens after block l, without prefix tokens. Equal to::

        sum(torch.dist(var(x_l), var_l) + torch.dist(mean(x_l), mean_l))

    The mean and the biased variance are over images and patches. Source: DeepInversion (arXiv
    1912.08795), equation 4, with :func:`collect_statistics` in place of the statistics of
    BatchNorm. There is no published weight for tokens.

    The recorded statistics are those of all patches of an image. So the objective asks the kept
    patches to have the statistics of a whole image.

    >>> statistics = collect_statistics(teacher, [torch.randn(4, 3, 64, 64)], blocks=[0, -1])
    >>> TokenStatistics(statistics)
    TokenStatistics(2 blocks, weight=0.05)

    Args:
        statistics: mean [D] and variance [D] on the teacher's device, by the name of a tap such as
            "block.3.tokens".
        weight: factor.

    Raises:
        ValueError: an empty mapping, or a tap that isn't tokens; at the start of an inversion,
            statistics of another width or device than the teacher's.
    """

    name = "token_statistics"
    reads_logits = False

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
    """Record mean and variance of each channel of the patch tokens, for :class:`TokenStatistics`.

    >>> statistics = collect_statistics(teacher, [torch.randn(4, 3, 64, 64)], blocks=[0])
    >>> [tensor.shape for tensor in statistics["block.0.tokens"]]
    [torch.Size([128]), torch.Size([128])]

    Args:
        teacher: a timm ``VisionTransformer`` or a :class:`SparseViT`.
        loader: yields batches of normalised images [B, C, H, W], alone or first in a tuple or list.
        blocks: indices of blocks, from the end when negative; None for all.

    Returns:
        mean [D] and biased variance [D] over all images and patches, summed in float64, by the name
        of the tap, "block.N.tokens".

    Raises:
        ValueError: a loader without images, or a block that the teacher doesn't have.
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
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], fraction: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the union of two samples (Chan, Golub and LeVeque, 1979).

    Args:
        first: mean and variance of the first sample.
        second: mean and variance of the second sample.
        fraction: size of the second sample over that of the union.
    """
    (mean, var), (other_mean, other_var) = first, second
    apart = other_mean - mean
    joined = torch.lerp(var, other_var, fraction) + fraction * (1 - fraction) * apart.square()
    return mean + fraction * apart, joined
