"""Frozen copies of a network that share its weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """A copy of the module and its children over the same weights, in eval mode.

    The copy has no hooks, and its parameters get no gradients.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()
    }
    memo.update((id(b), b.detach()) for b in module.buffers())
    frozen = copy.deepcopy(module, memo).eval()
    for child in frozen.modules():
        for name, value in vars(child).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    return frozen
