"""A fault that rounding to half precision hides in single elements: a factor on q, k or v."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smi_fast.verify.call_grid import op_calls

# With one token all probabilities are 1, with two most of them come out alike.
CALLS_WITH_FACTORS = [
    call
    for call in op_calls()
    if call.label in ("47-32", "47-32-dense", "66-64-kept", "66-64-kept-dense")
    or call.label in ("ragged-plain", "ragged-dense")
]


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
