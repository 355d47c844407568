"""The steps of blocks on a GPU that depend on the precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

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

    def activate(self, block: FoldedBlock, x: Tensor, derivative: Tensor, hidden: Tensor) -> None:
        """Write GELU of the MLP's first layer into hidden [rows, F], and its derivative."""

        def separate() -> None:
            torch.mm(x, block.fc1.T, out=derivative)
            self.functions.gelu_(derivative, block.fc1_bias, hidden, block.approximate)

        arguments = x, block.fc1, block.fc1_bias, derivative, hidden, block.approximate
        self._run("linear_gelu_", (x, block.fc1), arguments, separate)

    def activate_backward(
        self, block: FoldedBlock, grad: Tensor, derivative: Tensor, d_fc1: Tensor
    ) -> None:
        """Write the gradient of the first layer into d_fc1 [rows, F], from that of the second."""

        def separate() -> None:
            torch.mm(grad, block.fc2, out=d_fc1)
            self.functions.multiply_(d_fc1, derivative)

        arguments = grad, block.fc2, derivative, d_fc1
        self._run("multiplied_product_", (grad, block.fc2), arguments, separate)

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
