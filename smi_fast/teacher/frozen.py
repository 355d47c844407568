"""Frozen copies of a network that share its weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """A copy of the module and its children over the same weights, in eval mode.

    The copy has no hooks, and its parameters get no gradients.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()
    }
    memo.update((id(b), b.detach()) for b in module.buffers())
    for part in module.modules():
        # A hook may hold a graph, which can't be copied: an empty table takes the place of each.
        tables = (value for name, value in vars(part).items() if name.endswith("_hooks"))
        memo.update((id(table), type(table)()) for table in tables if isinstance(table, dict))
    return copy.deepcopy(module, memo).eval()


class SharedWeights:
    """Keeps a frozen copy on the weights of the module that it was made of.

    In-place changes are shared by themselves. This follows weights that were *replaced*: by
    assignment, through ``.data``, by ``load_state_dict(assign=True)``, or by a cast or move of the
    original. A copy that was itself cast or moved has weights of its own from then on.

    Args:
        original: the module that was copied.
        copied: its :func:`frozen_copy`.
    """

    def __init__(self, original: nn.Module, copied: nn.Module) -> None:
        pairs = list(zip(original.modules(), copied.modules(), strict=True))
        # Each module's own table of parameters: reading it costs less than an attribute.
        self._tables = [
            (theirs._parameters, ours._parameters, name)
            for theirs, ours in pairs
            for name, weight in theirs._parameters.items()
            if weight is not None
        ]
        # These views keep the memory of replaced weights, so that no new weight gets its address.
        self._shared = [self._view(theirs[name]) for theirs, _, name in self._tables]
        self._addresses = [view.data_ptr() for view in self._shared]

    @staticmethod
    def _view(weight: Tensor | None) -> Tensor:
        assert weight is not None
        return weight.detach()

    def __getstate__(self) -> dict[str, object]:
        """A copied or pickled teacher has weights of its own, so there is nothing to follow."""
        return {"_tables": [], "_shared": [], "_addresses": []}

    def follow(self) -> None:
        """Point the copy at every weight of the original that was replaced."""
        found = [theirs[name].data_ptr() for theirs, _, name in self._tables]  # type: ignore[union-attr]
        if found == self._addresses:
            return
        with torch.no_grad():
            for index, (theirs, ours, name) in enumerate(self._tables):
                own = ours[name]
                assert own is not None
                if own.data_ptr() == self._addresses[index] != found[index]:
                    # A new parameter, because it also shares the count of in-place changes.
                    ours[name] = nn.Parameter(self._view(theirs[name]), requires_grad=False)
                self._shared[index] = self._view(theirs[name])
        self._addresses = found
