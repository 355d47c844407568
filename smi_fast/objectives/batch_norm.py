"""DeepInversion's prior: images whose features have the statistics that a CNN's BatchNorm keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from smi_fast import ops
from smi_fast.objectives.base import LossInputs, Objective
from smi_fast.ops.backends import AUTO
from smi_fast.teacher.frozen import frozen_copy

if TYPE_CHECKING:
    from smi_fast.teacher import SparseViT


class BatchNormMatching(Objective):
    """Distance between the statistics of every BatchNorm's input and those that it recorded.

    With the layers' inputs ``x_l`` and ``first_weight`` on the first of them, equal to::

        sum(w_l * (torch.dist(var(x_l), running_var_l) + torch.dist(mean(x_l), running_mean_l)))

    where mean and biased variance are over batch, rows and columns. Source: DeepInversion (arXiv
    1912.08795), equation 4; the weight of the first layer is its code's. The default weight is that
    code's for ResNet-50.

    The CNN is a prior beside the teacher: it sees the whole jittered image, as in the published
    loop (arXiv 2510.27186), also when patches have stopped. The background then stands as it was
    left, it counts in the statistics, and only kept patches follow the term's gradient; so the cost
    of the CNN doesn't fall with the patches. ``every`` cuts it instead.

    Args:
        cnn: any network with ``BatchNorm2d`` or timm's ``BatchNormAct2d``; a frozen copy over the
            same weights is made once, it is itself left as it was.
        first_weight: factor of the first layer, in the order of ``cnn.modules()``.
        weight: factor of the term.
        every: iterations from one evaluation to the next. The value counts that many times in the
            step that has it, as lazy regularisation does (arXiv 1912.04958, appendix B), and is 0
            in the steps between.
        mean: of each channel, of the space in which the CNN takes images; by default from its
            ``pretrained_cfg``, and a CNN without one takes them as the teacher does.
        std: likewise.

    Raises:
        ValueError: no layer with statistics, a kind of BatchNorm that isn't known, or an option out
            of range; at the start of an inversion, a CNN of another data type or device than the
            teacher.
    """

    name = "batch_norm"

    def __init__(
        self,
        cnn: nn.Module,
        first_weight: float = 10.0,
        *,
        weight: float = 0.05,
        every: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"expected every 1 or more, got {every}")
        if (mean is None) != (std is None):
            raise ValueError("expected mean and std, or neither")
        self.weight, self.first_weight, self.every = weight, first_weight, every
        self._found = _Found()
        self._cnn, self._layers = _with_matching(cnn, first_weight, self._found)
        own = getattr(cnn, "pretrained_cfg", None) or {}
        space = (own.get("mean"), own.get("std")) if mean is None else (mean, std)
        like = self._layers[0].running_mean
        self._mean, self._std = (None if s is None else like.new_tensor(tuple(s)) for s in space)

    def __repr__(self) -> str:
        return (
            f"BatchNormMatching({type(self._cnn).__name__} of {len(self._layers)} layers, "
            f"first_weight={self.first_weight}, weight={self.weight}, every={self.every})"
        )

    def begin(self, teacher: SparseViT, batch: int, generator: torch.Generator | None) -> None:
        own = self._layers[0].running_mean
        if own.dtype != teacher.dtype or own.device != teacher.device:
            raise ValueError(
                f"expected the CNN like the teacher, {teacher.dtype} on {teacher.device}, "
                f"got {own.dtype} on {own.device}"
            )

    def __call__(self, inputs: LossInputs) -> Tensor:
        if inputs.iteration % self.every:
            return inputs.images.new_zeros(())
        self._found.backend = inputs.backend
        self._found.distances.clear()
        self._cnn(self._as_the_cnn_takes(inputs))
        total = torch.stack(self._found.distances).sum() * self.every
        self._found.distances.clear()
        return total

    def _as_the_cnn_takes(self, inputs: LossInputs) -> Tensor:
        if self._mean is None or self._std is None:
            return inputs.jittered
        space = inputs.space
        scale, offset = space.std / self._std, (space.mean - self._mean) / self._std
        return torch.addcmul(offset[:, None, None], inputs.jittered, scale[:, None, None])


class _Found:
    """What the layers have found in this step, and the backend that they are to use."""

    def __init__(self) -> None:
        self.distances: list[Tensor] = []
        self.backend = AUTO


class _MatchingBatchNorm(nn.Module):
    """A BatchNorm in eval mode that also says how far its input is from its statistics."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.BatchNorm2d, factor: float, found: _Found) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("expected BatchNorm that keeps running statistics, got one without")
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        one, zero = torch.ones_like(norm.running_var), torch.zeros_like(norm.running_var)
        self.register_buffer("weight", norm.weight.detach() if norm.affine else one)
        self.register_buffer("bias", norm.bias.detach() if norm.affine else zero)
        self.eps, self.factor, self.found = norm.eps, factor, found
        self.act = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, distance = ops.batch_norm_matching(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.eps,
            backend=self.found.backend,
        )
        self.found.distances.append(distance if self.factor == 1 else distance * self.factor)
        activated: Tensor = self.act(y)
        return activated


def _with_matching(
    cnn: nn.Module, first_weight: float, found: _Found
) -> tuple[nn.Module, tuple[_MatchingBatchNorm, ...]]:
    """A frozen copy in which every BatchNorm is a matching one, and these."""
    copied = frozen_copy(cnn)
    replaced: dict[nn.Module, _MatchingBatchNorm] = {}
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.BatchNorm2d):
            continue
        if type(module) not in (nn.BatchNorm2d, BatchNormAct2d):
            kind = type(module).__name__
            raise ValueError(f"expected {name} to be BatchNorm2d or BatchNormAct2d, got {kind}")
        if module not in replaced:
            factor = 1.0 if replaced else first_weight
            replaced[module] = _MatchingBatchNorm(module, factor, found)
        copied.set_submodule(name, replaced[module])
    if not replaced:
        raise ValueError(f"expected a network with BatchNorm2d, {type(cnn).__name__} has none")
    return copied, tuple(replaced.values())
