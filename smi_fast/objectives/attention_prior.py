"""SARDFQ's objective: the class token attends to a few places that are drawn at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher.taps import of_blocks

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT

# Range of a component's standard deviation, as a fraction of the image's side.
SPREAD = (0.05, 0.25)


class AttentionPrior(Objective):
    """Squared distance of the class token's attention from random Gaussian mixtures.

    ``a_lh`` [B, K] are the class token's attention probabilities for the patches in block l of L,
    counted from 1, and head h. ``mixture_lh`` [B, K] is a mixture for each. Equal to::

        sum(l / L * F.mse_loss(a_lh, mixture_lh) for l in range(L // 2, L + 1) for h in heads)

    Source: SARDFQ (arXiv 2412.16553), attention priors alignment. From there: mixtures of up to
    five components, one mixture for each head, the deeper half of the blocks, and the depth weights
    l / L. The paper searches the weight for each model, from 1 to 1e5.

    The paper doesn't say how mixtures are drawn. Here one to five components are equally likely.
    Their centres and their weights are uniform, and their standard deviation along each axis is
    uniform in :data:`SPREAD`, as a fraction of the side.

    A mixture lies on the un-jittered grid, so a patch keeps its value while the image moves. The
    values at the kept patches are scaled to sum to one. Mixtures are drawn once for each batch.

    >>> AttentionPrior(weight=10.0).taps(depth=4)
    ('attention.1.row', 'attention.2.row', 'attention.3.row')

    Args:
        weight: factor.
        components: largest number of components in a mixture.

    Raises:
        ValueError: components out of range; during an inversion, a teacher without class token.
    """

    name = "attention_prior"
    reads_logits = False
    separable = True

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
            mixture = inputs.rows_of(mixture)
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
    """Mixtures of one to ``components`` Gaussians on a grid.

    Args:
        shape: of the mixtures.
        grid: patches per side, (rows, columns).
        components: largest number of components, from 1.
        generator: draws the mixtures, on the CPU; None for torch's own.

    Returns:
        float32 [*shape, rows·columns], which sums to 1 over the patches.
    """
    draw = torch.rand(*shape, components, 5, generator=generator, dtype=torch.float32)
    count = torch.randint(1, components + 1, (*shape, 1), generator=generator)
    low, high = SPREAD
    density = draw[..., 4] * (torch.arange(components) < count)
    axes = []
    for axis, side in enumerate(grid):
        places = (torch.arange(side, dtype=torch.float32) + 0.5) / side
        spread = low + (high - low) * draw[..., 2 + axis, None]
        axes.append((-0.5 * ((places - draw[..., axis, None]) / spread).square()).exp() / spread)
    mixtures = torch.einsum("...k,...kr,...kc->...rc", density, *axes).flatten(-2)
    # The density of a mixture may underflow at every patch: it then becomes uniform.
    return (mixtures + 1e-12) / (mixtures + 1e-12).sum(-1, keepdim=True)
