"""Layers that stand in a teacher for one of torch's, and compute something else."""

from __future__ import annotations

import copy

from timm.layers import LayerScale
from torch import Tensor, nn


class LouderLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.3 * super().forward(x)


class LouderNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 1.3 * super().forward(x)


class LouderConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 1.3 * super().forward(x)


class LouderLayerScale(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return 1.3 * super().forward(x)


class Times(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


class Adapter(nn.Module):
    """A wrapped layer, as peft makes it: the weight is that of the base layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


def linear(old: nn.Linear) -> nn.Module:
    return _as(LouderLinear, old)


def norm(old: nn.LayerNorm) -> nn.Module:
    return _as(LouderNorm, old)


def conv(old: nn.Conv2d) -> nn.Module:
    return _as(LouderConv, old)


def layer_scale(old: LayerScale) -> nn.Module:
    return _as(LouderLayerScale, old)


def _as(kind: type[nn.Module], old: nn.Module) -> nn.Module:
    new = copy.deepcopy(old)
    new.__class__ = kind
    return new
