"""What a captured CUDA graph can't hold, refused where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Torch's own marks of ops whose result the host must see before it can go on.
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostAccessError(RuntimeError):
    """The host would wait for the device, or copy to it from memory of its own."""


class HostGuard(TorchDispatchMode):
    """Refuses reads by the host, shapes that depend on data, and copies from the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.index.Tensor:
            # Tagged, but its shape depends on data only where an index is a mask.
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                raise HostAccessError(f"{func} with a mask has a shape that depends on data")
        elif WAITING & set(func.tags):
            raise HostAccessError(f"{func} waits for the device")
        if func is torch.ops.aten.lift_fresh.default:
            raise HostAccessError("a tensor made of numbers of the host is copied to the device")
        before = {t.device for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is(t)}
        result = func(*args, **(kwargs or {}))
        after = {t.device for t in torch.utils._pytree.tree_leaves(result) if _is(t)}
        if before and not after <= before:
            raise HostAccessError(f"{func} copies from {before} to {after}")
        return result


def _is(value: object) -> bool:
    return isinstance(value, Tensor)
