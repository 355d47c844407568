"""The error that a kernel may have, in proportion to that of eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# The noise of float32 sums, relative to the result. PyTorch's fused attention may take products of
# float32 in three parts of TF32.
NOISE = 4 * torch.finfo(torch.float32).eps
SDPA_NOISE = 8 * torch.finfo(torch.float32).eps


class Error(NamedTuple):
    """The error of one result in one measure.

    Attributes:
        measure: "element" or "norm", see :func:`errors`.
        value: the error.
        budget: the largest that is allowed.
    """

    measure: str
    value: float
    budget: float

    @property
    def share(self) -> float:
        """The error as a fraction of its budget; infinite when it isn't a number."""
        if not math.isfinite(self.value):
            return math.inf
        if not self.budget:
            return math.inf if self.value else 0.0
        return self.value / self.budget

    @property
    def allowed(self) -> bool:
        return self.value <= self.budget  # false for nan

    def __str__(self) -> str:
        return f"error {self.value:.3g} of the {self.measure}, budget {self.budget:.3g}"


def errors(ours: Tensor, eager: Tensor, exact: Tensor, noise: float = NOISE) -> Iterator[Error]:
    """The errors of one result, each with its budget.

    * element: the largest error of an element. Budget:
      ``2 · error(eager, same dtype) + floor · max|exact|``. The floor, half an ulp but at least
      ``noise``, matters where eager happens to round exactly. In float64 it is 1e-12, because eager
      is itself the reference.
    * norm: the error of the 2-norm. Rounding errors cancel in it, a wrong factor doesn't: a factor
      that half precision hides in every element shows here. Budget: ``2 · error(eager)``, plus
      twice the change that independent errors of the rows, as large as eager's and the floor,
      would make, plus ``noise`` times the norm.

    Where the exact result is too large for the data type, infinity is right; where it is NaN, only
    NaN is. Where only eager is not finite, because it overflowed on the way, its error counts as
    zero.

    Args:
        ours: the result of the kernel.
        eager: that of the reference in the data type of ``ours``.
        exact: that of the reference in float64, from the same rounded arguments.
        noise: the relative error that float32 sums may have in another order.
    """
    floor = max(torch.finfo(ours.dtype).eps / 2, noise)
    if ours.dtype == torch.float64:
        floor = noise = 1e-12
    limit = torch.finfo(ours.dtype).max
    missing = exact.isnan()
    exact = exact.clamp(-limit, limit).masked_fill(missing, 0.0)
    eager = torch.where(eager.isfinite(), eager.double(), exact)
    ours = ours.double().clamp(-limit, limit)
    ours = torch.where(missing, torch.where(ours.isnan(), 0.0, torch.nan), ours)

    error, yardstick = (float((result - exact).abs().max()) for result in (ours, eager))
    yield Error("element", error, 2 * yardstick + floor * float(exact.abs().max()))

    norm = float(exact.norm())
    error, yardstick = (abs(float(result.norm()) - norm) for result in (ours, eager))
    # An error e of a row r changes the norm by up to |e| |r| / norm. The changes of independent
    # rows add up as the root of the sum of their squares.
    rows = _row_norms(exact)
    changes = (_row_norms(eager - exact) + floor * rows) * rows
    random = float(changes.norm()) / norm if norm else 0.0
    yield Error("norm", error, 2 * (yardstick + random) + noise * norm)


def _row_norms(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2).norm(dim=-1) if tensor.dim() > 1 else tensor.abs()
