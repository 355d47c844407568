"""The published dense loop as PyTorch alone can make it fast: a baseline that is hard to beat.

Weights are frozen and in bfloat16, attention is PyTorch's fused one, and the network, the losses
and their gradient are compiled, on a GPU with CUDA graphs. Pixels, moments and sums are float32.
Like :mod:`benchmarks.baselines.published_loop` it imports nothing from smi_fast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.baselines.published_loop import total_variation


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by PyTorch, which replays CUDA graphs."""
    return torch.compile(function, mode="reduce-overhead", dynamic=False)


class StrongDense:
    """One inversion, iteration by iteration.

    Args:
        vit: on the device of ``init``; a copy of it is used.
        targets: class indices [B].
        init: first images [B, 3, H, W], normalised.
        jitter: shift int64 [T, 2] in pixels and flip bool [T] of each iteration, on the CPU.
        mean: of each channel, for normalised space.
        std: likewise.
        dtype: of the weights and of what products read.
        compiler: makes a function faster.

    Attributes:
        images: [B, 3, H, W], changed by each iteration.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        targets: Tensor,
        *,
        init: Tensor,
        jitter: tuple[Tensor, Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.bfloat16,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] = compiled,
    ) -> None:
        self._vit = copy.deepcopy(vit).to(dtype).requires_grad_(False)
        self._targets, self._dtype = targets, dtype
        self._jitter = [*zip(jitter[0].tolist(), jitter[1].tolist(), strict=True)]
        self.images = init.clone().requires_grad_()
        self._adam = torch.optim.Adam([self.images], lr=0.25, betas=(0.5, 0.99), fused=init.is_cuda)
        shape = (1, 3, 1, 1)
        centre, scale = (init.new_tensor(list(each)).view(shape) for each in (mean, std))
        self._low, self._high = -centre / scale, (1 - centre) / scale
        self._loss = compiler(self._loss_of)
        self._iteration = 0

    def _loss_of(self, images: Tensor, jittered: Tensor) -> Tensor:
        logits = self._vit(jittered.to(self._dtype)).to(images.dtype)
        return F.cross_entropy(logits, self._targets) + 1e-4 * total_variation(images)

    def step(self) -> None:
        """Take one iteration."""
        shift, flip = self._jitter[self._iteration % len(self._jitter)]
        self._iteration += 1
        jittered = self.images.roll(shift, (2, 3))
        self._adam.zero_grad()
        self._loss(self.images, jittered.flip(3) if flip else jittered).backward()
        self._adam.step()
        with torch.no_grad():
            self.images.clamp_(self._low, self._high)
