"""Faults to plant into any backend: a factor on q, k or v, and one on the result of an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.cases import CHANGED
from smi_fast.verify.engine_grid import engine_calls

# A few tokens would have too few rows: their rounding doesn't cancel in the norm.
LABELS = ("47-32", "47-32-dense", "66-64-kept", "66-64-kept-dense", "ragged-plain", "ragged-dense")
CALLS_WITH_FACTORS = [
    call for call in op_calls() if call.op.startswith("gather_attention") and call.label in LABELS
]
# The first call of each op with about a thousand elements.
CALL_OF_EACH_OP = list(
    {
        call.op: call
        for call in reversed(op_calls())
        if 1000 < max(tensor.numel() for tensor in call.tensors) < 10_000
    }.values()
)
# A call of each step of the engine that is large enough for its rounding to cancel in the norm.
STEPS_WITH_A_FACTOR = list(
    {call.op: call for call in engine_calls() if call.arguments[0].numel() > 3000}.values()
)


def rounded_nans() -> list[Tensor]:
    """Results of the engine's steps in bfloat16 from NaN whose rounding has a carry to the top."""
    nan = torch.full((3, 20), 0x7FFF_FFFF, dtype=torch.int32).view(torch.float32)
    normalized, x, out = torch.zeros(3, 3, 20, dtype=torch.bfloat16)
    torch.ops.smi_fast.add_normalize_(nan.clone(), None, None, 1e-6, normalized, torch.empty(3))
    torch.ops.smi_fast.gelu_(x, nan[0], out)
    turned = torch.ones(1, 1, 2, 1, 20, dtype=torch.bfloat16)
    torch.ops.smi_fast.rotate_(turned, torch.zeros(20), nan[:2].view(1, 1, 1, 40), True)
    return [normalized, x, out, turned[:, :, 0]]


class Factor:
    """The functions of a backend, which read q, k or v times a factor."""

    def __init__(self, functions: Any, part: str, factor: float) -> None:
        self.functions, self.part, self.factor = functions, "qkv".index(part), factor

    def _scaled(self, qkv: Tensor) -> Tensor:
        qkv = qkv.clone()
        qkv[:, :, self.part] *= self.factor
        return qkv

    def gather_attention(self, qkv: Tensor, *rest: Any) -> Any:
        return self.functions.gather_attention(self._scaled(qkv), *rest)

    def gather_attention_backward(self, grad: Tensor, qkv: Tensor, *rest: Any) -> Any:
        return self.functions.gather_attention_backward(grad, self._scaled(qkv), *rest)


class ScaledResults:
    """The functions of a backend, whose first result comes out times a factor."""

    def __init__(self, functions: Any, factor: float) -> None:
        self.functions, self.factor = functions, factor

    def __getattr__(self, op: str) -> Any:
        def run(*arguments: Any) -> Any:
            results = getattr(self.functions, op)(*arguments)
            if op in CHANGED:
                first = arguments[CHANGED[op][0]]
            else:
                first = results if isinstance(results, Tensor) else results[0]
            first.mul_(self.factor)
            return results

        return run
