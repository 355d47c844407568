"""The steps of blocks on a GPU that depend on the precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smi_fast.engine import schemas  # noqa: F401  (registers torch.ops.smi_fast.*)
from smi_fast.engine.folding import FoldedBlock
from smi_fast.engine.precision import FLOAT32, TF32, stored_type
from smi_fast.ops import backends

# The backend of the kernels between products.
BACKEND = "triton"


class Steps:
    """The steps of folded blocks in one precision.

    Attributes:
        precision: of the products.
        functions: the kernels.
        fused: whether GELU and its derivative are fused into products.
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
        if self.fused:
            written = derivative, hidden, block.approximate
            self.functions.linear_gelu_(x, block.fc1, block.fc1_bias, *written)
        else:
            torch.mm(x, block.fc1.T, out=derivative)
            self.functions.gelu_(derivative, block.fc1_bias, hidden, block.approximate)

    def activate_backward(
        self, block: FoldedBlock, grad: Tensor, derivative: Tensor, d_fc1: Tensor
    ) -> None:
        """Write the gradient of the first layer into d_fc1 [rows, F], from that of the second."""
        if self.fused:
            self.functions.multiplied_product_(grad, block.fc2, derivative, d_fc1)
        else:
            torch.mm(grad, block.fc2, out=d_fc1)
            self.functions.multiply_(d_fc1, derivative)
