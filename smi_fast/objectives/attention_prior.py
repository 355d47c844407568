"""SARDFQ's prior: the class token attends to a few places, drawn at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher.taps import of_blocks

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT

# Standard deviations of a component, in sides of the image.
SPREAD = (0.05, 0.25)


class AttentionPrior(Objective):
    """Squared distance of the class token's attention from random Gaussian mixtures.

    With ``a_lh`` [B, K] the class token's probabilities for the patches in block l, counted from 1
    to L, and head h, and a mixture ``prior_lh`` for each, equal to::

        sum(l / L * F.mse_loss(a_lh, prior_lh) for l in range(L // 2, L + 1) for h in heads)

    Source: SARDFQ (arXiv 2412.16553), attention priors alignment: mixtures of up to five
    components, a mixture for each head, the deeper half of the blocks, depth weights l / L. Its
    weight is searched for each model there, from 1 to 1e5. Not stated there, and chosen here: one
    to five components are equally likely, centres are uniform, the standard deviation along each
    axis is uniform in :data:`SPREAD` sides, shares are uniform, and a mixture sums to one over the
    patches that are seen.

    The mixtures lie on the un-jittered grid, so a patch keeps its share while the image moves. With
    kept patches a mixture is read there and scaled to sum to one again. They are drawn once for
    each batch. The teacher must have a class token.

    Args:
        weight: factor.
        components: at most, in a mixture.
    """

    name = "attention_prior"

    def __init__(self, weight: float = 1.0, components: int = 5) -> None:
        if components < 1:
            raise ValueError(f"expected 1 component or more, got {components}")
        self.weight, self.components = weight, components
        self._mixtures: Tensor | None = None

    def __repr__(self) -> str:
        return f"AttentionPrior(weight={self.weight}, components={self.components})"

    def taps(self, depth: int) -> tuple[str, ...]:
        first = max(depth // 2, 1)
        return of_blocks("attention.{}.row", range(first - 1, depth), depth)

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        blocks = len(self.taps(teacher.depth))
        shape = (blocks, batch, int(teacher.vit.blocks[0].attn.num_heads))
        mixtures = random_mixtures(shape, teacher.grid, self.components, generator)
        self._mixtures = mixtures.to(teacher.device, teacher.dtype)

    def __call__(self, inputs: LossInputs) -> Tensor:
        if self._mixtures is None:
            raise RuntimeError("begin() draws the mixtures: call it before the first iteration")
        teacher = inputs.teacher
        names, distances = self.taps(teacher.depth), []
        for index, (name, mixture) in enumerate(zip(names, self._mixtures, strict=True)):
            attention = inputs.taps[name][:, :, teacher.num_prefix_tokens :]
            target = mixture.gather(2, inputs.kept[:, None].expand(-1, mixture.shape[1], -1))
            target = target / target.sum(2, keepdim=True)
            depth_weight = (teacher.depth - len(names) + index + 1) / teacher.depth
            squared = (attention - target).square().mean((0, 2)).sum()
            distances.append(depth_weight * squared)
        return torch.stack(distances).sum()


def random_mixtures(
    shape: tuple[int, ...],
    grid: tuple[int, int],
    components: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mixtures of one to ``components`` Gaussians on a grid: [*shape, rows·columns], sum 1."""
    draw = torch.rand(*shape, components, 5, generator=generator)
    count = torch.randint(1, components + 1, (*shape, 1), generator=generator)
    low, high = SPREAD
    density = draw[..., 4] * (torch.arange(components) < count)
    axes = []
    for axis, side in enumerate(grid):
        places = (torch.arange(side) + 0.5) / side
        spread = low + (high - low) * draw[..., 2 + axis, None]
        axes.append((-0.5 * ((places - draw[..., axis, None]) / spread).square()).exp() / spread)
    mixtures = torch.einsum("...k,...kr,...kc->...rc", density, *axes).flatten(-2)
    # A mixture far narrower than a patch may miss every centre: it is then uniform.
    return (mixtures + 1e-12) / (mixtures + 1e-12).sum(-1, keepdim=True)
