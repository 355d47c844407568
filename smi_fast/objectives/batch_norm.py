"""DeepInversion's objective: features of a CNN match the statistics that its BatchNorm recorded."""

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
    """Distance of the statistics of each BatchNorm's input from those that the layer recorded.

    ``x_l`` is the input of layer l. ``w_l`` is ``first_weight`` in the first layer and 1 in the
    others. Equal to::

        sum(w_l * (torch.dist(var(x_l), running_var_l) + torch.dist(mean(x_l), running_mean_l)))

    The mean and the biased variance are over batch, rows and columns. Source: DeepInversion (arXiv
    1912.08795), equation 4, with the weights of its code for ResNet-50.

    The CNN is a second network beside the teacher. It sees the whole jittered image, as in the
    published loop (arXiv 2510.27186), also after patches have stopped. The background then counts
    in the statistics, but only active patches follow the gradient. So the CNN's cost doesn't fall
    with the number of kept patches; ``every`` reduces it instead.

    >>> objective = BatchNormMatching(load_cnn("fashion-canvas"), weight=0.01)
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=[CrossEntropy(), objective], **options).history)
    ['cross_entropy', 'batch_norm']

    Args:
        cnn: any network with ``BatchNorm2d`` or timm's ``BatchNormAct2d``. It stays unchanged: the
            objective runs a frozen copy over the same weights.
        first_weight: factor of the first layer, in the order of ``cnn.modules()``.
        weight: factor.
        every: iterations from one evaluation to the next, as for every :class:`Objective`. The
            value is multiplied by it, as in lazy regularisation (arXiv 1912.04958, appendix B).
        mean: [C], of the normalised space in which the CNN takes images; by default from its
            ``pretrained_cfg``. A CNN without one takes images as the teacher does.
        std: [C], likewise.

    Raises:
        ValueError: a CNN without BatchNorm statistics or with an unknown kind of BatchNorm, or an
            option out of range; at the start of an inversion, a CNN whose data type or device isn't
            the teacher's.
    """

    name = "batch_norm"
    reads_logits = False

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
        self._record = _Record()
        self._cnn, self._layers = _with_matching(cnn, first_weight, self._record)
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
        self._record.backend = inputs.backend
        self._record.distances.clear()
        # Statistics of features that autocast has rounded would not be those that were recorded.
        with torch.autocast(inputs.images.device.type, enabled=False):
            self._cnn(self._cnn_images(inputs))
        total = torch.stack(self._record.distances).sum() * self.every
        self._record.distances.clear()
        return total

    def _cnn_images(self, inputs: LossInputs) -> Tensor:
        """The jittered images [B, C, H, W] in the CNN's normalised space."""
        if self._mean is None or self._std is None:
            return inputs.jittered
        space = inputs.space
        scale, offset = space.std / self._std, (space.mean - self._mean) / self._std
        return torch.addcmul(offset[:, None, None], inputs.jittered, scale[:, None, None])


class _Record:
    """The layers' distances in this iteration, and the backend that the layers use."""

    def __init__(self) -> None:
        self.distances: list[Tensor] = []
        self.backend = AUTO


class _MatchingBatchNorm(nn.Module):
    """A BatchNorm in eval mode that also records the distance of its input's statistics."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.BatchNorm2d, factor: float, record: _Record) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("expected BatchNorm that keeps running statistics, got one without")
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        one, zero = torch.ones_like(norm.running_var), torch.zeros_like(norm.running_var)
        self.register_buffer("weight", norm.weight.detach() if norm.affine else one)
        self.register_buffer("bias", norm.bias.detach() if norm.affine else zero)
        self.eps, self.factor, self.record = norm.eps, factor, record
        self.act = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, distance = ops.batch_norm_matching(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.eps,
            backend=self.record.backend,
        )
        self.record.distances.append(distance if self.factor == 1 else distance * self.factor)
        activated: Tensor = self.act(y)
        return activated


def _with_matching(
    cnn: nn.Module, first_weight: float, record: _Record
) -> tuple[nn.Module, tuple[_MatchingBatchNorm, ...]]:
    """A frozen copy with a matching layer in place of every BatchNorm, and these layers."""
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
            replaced[module] = _MatchingBatchNorm(module, factor, record)
        copied.set_submodule(name, replaced[module])
    if not replaced:
        raise ValueError(f"expected a network with BatchNorm2d, {type(cnn).__name__} has none")
    return copied, tuple(replaced.values())
