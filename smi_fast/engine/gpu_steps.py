"""The steps of blocks on a GPU that depend on the precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smi_fast.engine import schemas  # noqa: F401  (registers torch.ops.smi_fast.*)
from smi_fast.engine.folding import FoldedBlock
from smi_fast.engine.precision import FLOAT32, TF32, stored_type
from smi_fast.ops import backends, tuning

# The backend of the kernels between products.
BACKEND = "triton"
# The sides of tiles that kernels of products can have.
SIDES = (64, 128)


class Normalized(NamedTuple):
    """What a norm inside of a block leaves for backward: rows [rows, W], float32 rstd [rows]."""

    rows: Tensor
    rstd: Tensor


class Steps:
    """The steps of folded blocks in one precision.

    Attributes:
        precision: of the products.
        functions: the kernels.
        fused: whether GELU and its derivative may be fused into products.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.functions = backends.by_name(BACKEND).functions
        self.fused = precision != FLOAT32

    def folded(self, block: Any) -> FoldedBlock:
        """A block that was folded, with its matrices as products read them."""
        folded = FoldedBlock.of(block).stored_as(stored_type(self.precision))
        if self.precision == TF32:
            # Tensor cores of sm_90 take TF32 only along the inner dimension, in backward that of D.
            folded = replace(folded, fc2=folded.fc2.T.contiguous().T)
        return folded

    def normalize(
        self, x: Tensor, eps: float | None, to: Normalized | None, centred: bool
    ) -> Tensor:
        """Rows [rows, W] after a norm inside of a block, written into ``to``; x without one."""
        if eps is None or to is None:
            return x
        self.functions.add_normalize_(x, None, None, eps, *to, centred)
        return to.rows

    def normalize_backward(self, grad: Tensor, of: Normalized | None, centred: bool) -> Tensor:
        """The gradient [rows, W] in front of a norm inside of a block, from that behind it."""
        if of is None:
            return grad
        gradient = torch.zeros_like(grad, dtype=of.rstd.dtype)
        copy = None if grad.dtype == gradient.dtype else torch.empty_like(grad)
        self.functions.normalize_backward_(gradient, grad, *of, copy, centred)
        return gradient if copy is None else copy

    def activate(self, block: FoldedBlock, x: Tensor, derivative: Tensor, hidden: Tensor) -> None:
        """Write the MLP's hidden layer into hidden [rows, F], and the derivatives of GELU [rows, F]
        or of SwiGLU [rows, 2F].
        """
        if block.gated:
            torch.mm(x, block.fc1.T, out=derivative)
            self.functions.swiglu_(derivative, block.fc1_bias, hidden)
            return

        def separate() -> None:
            torch.mm(x, block.fc1.T, out=derivative)
            self.functions.gelu_(derivative, block.fc1_bias, hidden, block.approximate)

        arguments = x, block.fc1, block.fc1_bias, derivative, hidden, block.approximate
        self._run("linear_gelu_", (x, block.fc1), arguments, separate)

    def activate_backward(
        self,
        block: FoldedBlock,
        grad: Tensor,
        derivative: Tensor,
        normalized: Normalized | None,
        d_hidden: Tensor,
        d_gated: Tensor | None,
    ) -> Tensor:
        """The gradient of the MLP's first layer, from that of its second.

        Args:
            block: which one.
            grad: [rows, D].
            derivative: what :meth:`activate` wrote.
            normalized: what the norm in front of the second layer left, where there is one.
            d_hidden: [rows, F], is written.
            d_gated: [rows, 2F], is written with SwiGLU.
        """
        if normalized is not None or d_gated is not None:
            torch.mm(grad, block.fc2, out=d_hidden)
            d_hidden = self.normalize_backward(d_hidden, normalized, block.centred)
            if d_gated is not None:
                self.functions.swiglu_backward_(d_hidden, derivative, d_gated)
                return d_gated
            self.functions.multiply_(d_hidden, derivative)
            return d_hidden

        def separate() -> None:
            torch.mm(grad, block.fc2, out=d_hidden)
            self.functions.multiply_(d_hidden, derivative)

        arguments = grad, block.fc2, derivative, d_hidden
        self._run("multiplied_product_", (grad, block.fc2), arguments, separate)
        return d_hidden

    def _run(
        self,
        fused: str,
        factors: tuple[Tensor, Tensor],
        arguments: tuple[Any, ...],
        separate: Callable[[], None],
    ) -> None:
        """Run a product and the step after it, in one kernel or in two.

        On a GPU the fastest is taken, and untuned the fused one that chooses its tiles by itself.
        """
        if not self.fused:
            separate()
            return
        function = partial(getattr(self.functions, fused), *arguments)
        ways: dict[str, Callable[[], object]] = {"fused": function}
        ways |= {f"fused, tiles of {side}": partial(function, side=side) for side in SIDES}
        ways["separate"] = separate
        key = f"{fused} {self.precision} {tuning.described(factors)}"
        ways[tuning.fastest(factors[0].device, key, ways)]()
