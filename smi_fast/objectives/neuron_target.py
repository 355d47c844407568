"""Images that excite neurons of a block: feature visualisation of a ViT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.teacher.taps import of_blocks

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT

# Which tap has the neurons, and which of its tokens are read.
_TAPS = {
    "tokens": "block.{}.tokens",
    "mlp_hidden": "mlp.{}.hidden",
    "class_token": "block.{}.tokens",
}
PLACES = tuple(_TAPS)


class NeuronTarget(Objective):
    """Negative activation of neurons of a block, the mean over images and tokens.

    The activations [B, K, F] of the kept patches are their tokens after the block ("tokens"), or
    the hidden layer of the block's MLP, after its activation function ("mlp_hidden").
    "class_token" is the class token after the block, [B, 1, F]. A neuron is a channel of them, or a
    direction, over which they are projected. Equal to one of::

        -activations[..., channel].mean()
        -(activations @ F.normalize(direction, dim=-1)).mean()

    Only the blocks up to this one run, unless another objective reads the logits.

    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False, "batch": 2}
    >>> neurons = NeuronTarget(1, channel=[3, 5], where="mlp_hidden")
    >>> list(invert(teacher, objectives=[neurons], **options).history)
    ['neuron']

    Args:
        block: index, from the end when negative.
        channel: index of a channel; or a list with one for each image. Without channel and
            direction the targets of the inversion are read: channels int64 [B], or directions
            [B, F].
        direction: [F] for all images, or [B, F]; its length doesn't matter.
        where: "tokens", "mlp_hidden" or "class_token".
        weight: factor.

    Raises:
        ValueError: another place, or channel and direction together; at the start of an inversion,
            a block or channel out of range, a direction of another width, data type or device,
            another number than images, or a teacher without class token.
    """

    name = "neuron"
    separable = True
    reads_logits = False

    def __init__(
        self,
        block: int,
        channel: int | Sequence[int] | None = None,
        direction: Tensor | None = None,
        where: str = "tokens",
        weight: float = 1.0,
    ) -> None:
        if where not in PLACES:
            raise ValueError(f"expected where {', '.join(PLACES)}, got {where!r}")
        if channel is not None and direction is not None:
            raise ValueError("expected channel or direction, got both")
        self.block, self.channel, self.direction = block, channel, direction
        self.where, self.weight = where, weight
        self._neurons: Tensor | None = None

    def __repr__(self) -> str:
        neuron = f"channel={self.channel}"
        if self.direction is not None:
            neuron = f"direction={list(self.direction.shape)}"
        return f"NeuronTarget({self.block}, {neuron}, {self.where!r}, weight={self.weight})"

    def taps(self, depth: int) -> tuple[str, ...]:
        return of_blocks(_TAPS[self.where], (self.block,), depth)

    def check_targets(self, targets: Tensor | None, teacher: SparseViT) -> None:
        if self.channel is not None or self.direction is not None:
            return
        if targets is None:
            raise ValueError(
                "expected a channel or a direction, or one for each image as targets, got none"
            )
        if targets.is_floating_point():
            self._check_directions(targets, "targets", (2,), teacher)
        else:
            self._check_channels(targets, "targets", (1,), teacher)

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        if self.where == "class_token" and teacher.vit.cls_token is None:
            raise ValueError("expected a teacher with a class token for where='class_token'")
        if self.channel is not None:
            neurons, dims = torch.as_tensor(self.channel), (0, 1)
            self._check_channels(neurons, "channel", dims, teacher)
        elif self.direction is not None:
            neurons, dims = self.direction.detach(), (1, 2)
            self._check_directions(neurons, "direction", dims, teacher)
        else:
            return
        if neurons.dim() == dims[0]:
            neurons = neurons.expand(batch, *neurons.shape)
        if len(neurons) != batch:
            raise ValueError(
                f"expected one neuron, or one for each of {batch} images, got {len(neurons)}"
            )
        self._neurons = neurons.to(teacher.device)

    def _check_channels(
        self, given: Tensor, name: str, dims: tuple[int, ...], teacher: SparseViT
    ) -> None:
        width = self.width(teacher)
        if given.dtype != torch.int64 or given.dim() not in dims:
            raise ValueError(
                f"expected {name} as whole numbers of {' or '.join(map(str, dims))} dimensions, "
                f"got {given.dtype} {list(given.shape)}"
            )
        wrong = given[(given < 0) | (given >= width)]
        if wrong.numel():
            raise ValueError(f"expected {name} in 0..{width - 1}, got {int(wrong.flatten()[0])}")

    def _check_directions(
        self, given: Tensor, name: str, dims: tuple[int, ...], teacher: SparseViT
    ) -> None:
        width = self.width(teacher)
        like = (teacher.dtype, teacher.device)
        if (given.dtype, given.device) != like or given.dim() not in dims:
            raise ValueError(
                f"expected {name} as {like[0]} of {' or '.join(map(str, dims))} dimensions on "
                f"{like[1]}, got {given.dtype} {list(given.shape)} on {given.device}"
            )
        if given.shape[-1] != width:
            raise ValueError(f"expected {name} of width {width}, got {given.shape[-1]}")
        if not bool((given.isfinite().all(-1) & given.any(-1)).all()):
            raise ValueError(f"expected finite {name} of a length above 0, got others")

    def width(self, teacher: SparseViT) -> int:
        """F, the number of a teacher's channels where this objective reads them."""
        (tap,) = self.taps(teacher.depth)
        block = teacher.vit.blocks[int(tap.split(".")[1])]
        hidden = self.where == "mlp_hidden"
        return int(block.mlp.fc2.in_features if hidden else teacher.vit.embed_dim)

    def __call__(self, inputs: LossInputs) -> Tensor:
        neurons = inputs.targets if self._neurons is None else inputs.rows_of(self._neurons)
        assert neurons is not None
        return -self.activation(inputs.taps, neurons, inputs.teacher).mean()

    def activation(self, taps: Mapping[str, Tensor], neurons: Tensor, teacher: SparseViT) -> Tensor:
        """[B], the activation of a neuron for each image, the mean over tokens.

        Args:
            taps: of the images, with the one that this objective reads.
            neurons: channels int64 [B] or directions [B, F].
            teacher: that the taps are of.
        """
        (name,) = self.taps(teacher.depth)
        prefix = teacher.num_prefix_tokens
        read = slice(0, 1) if self.where == "class_token" else slice(prefix, None)
        mean = taps[name][:, read].mean(dim=1)
        if neurons.dim() == 1:
            return mean.gather(1, neurons[:, None]).squeeze(1)
        return (mean * F.normalize(neurons, dim=1)).sum(1)
