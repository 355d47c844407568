"""How many kernels a GPU would be asked for, counted where there is none.

An op of PyTorch that makes something new counts as one kernel, though some need several, and a view
or an allocation as none. Triton kernels count as they are launched, and aren't run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class Launches(TorchDispatchMode):
    """Counts by the name of the op or kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            return result.zero_()  # what isn't run writes nothing, and indices must be in range
        if not func.is_view and func is not aten._unsafe_view.default:
            self.kernels[str(func)] += 1
        return result
