"""What was derived from weights, and whether these are still the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Run = TypeVar("Run")
Last = TypeVar("Last")


class WeightWatch:
    """Notices when the owner of some modules changes or replaces their weights.

    It sees in-place changes that torch counts, which those of ``weight.data`` and of fused
    optimisers are not.

    Args:
        modules: whose parameters are watched; the set of their names stays the same.
    """

    def __init__(self, modules: nn.Module) -> None:
        self._names = [
            (module, name)
            for module in modules.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        self._state: list[object] = []
        self._held: list[Tensor] = []

    def changed(self) -> bool:
        """Whether the weights are others than at the last call; true at the first one."""
        found = (module._parameters[name] for module, name in self._names)
        weights = [weight for weight in found if weight is not None]
        # A flat list of numbers is cheap to compare, and this runs in every pass.
        state: list[object] = [weights[0].dtype]
        state += [weight.data_ptr() for weight in weights]
        state += [weight._version for weight in weights]
        if self._state == state:
            return False
        self._state = state
        # These views keep the memory of replaced weights, so that no other gets its address.
        self._held = [weight.detach() for weight in weights]
        return True

    def forget(self) -> None:
        """Report a change at the next call."""
        self._state, self._held = [], []

    def __getstate__(self) -> dict[str, object]:
        """A copy has other weights."""
        return {**vars(self), "_state": [], "_held": []}


class WeightCopy:
    """The values of weights at one moment, to notice every change.

    Args:
        modules: whose parameters and buffers are copied.
    """

    def __init__(self, modules: nn.Module) -> None:
        self._modules = modules
        # The weights too, so that no other gets the address of one that is replaced.
        self._then = [(weight, weight.clone()) for weight in self._weights()]

    def changed(self) -> bool:
        """Whether weights have other values, or are elsewhere. The host waits for the device."""
        now = self._weights()
        if len(now) != len(self._then):
            return True
        if any(a.data_ptr() != b.data_ptr() for a, (b, _) in zip(now, self._then, strict=True)):
            return True
        others = [
            (weight != values).any() for weight, (_, values) in zip(now, self._then, strict=True)
        ]
        return bool(torch.stack(others).any())

    def _weights(self) -> list[Tensor]:
        return [
            weight.detach() for weight in (*self._modules.parameters(), *self._modules.buffers())
        ]


class FollowsWeights(Generic[Run, Last]):
    """An engine's runs of blocks and of the last block, folded anew after weights have changed.

    Args:
        blocks: all blocks of a teacher, frozen.
    """

    def __init__(self, blocks: nn.Sequential) -> None:
        self._watch = WeightWatch(blocks)
        self._runs: dict[Hashable, Run] = {}
        self._last: dict[Hashable, Last] = {}

    def refresh(self) -> None:
        """Forget what was folded."""
        self._watch.forget()
        self._runs, self._last = {}, {}

    def derived(self) -> tuple[object, ...]:
        """What was folded, for whoever is to keep its memory."""
        return (*self._runs.values(), *self._last.values())

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles fold anew: packed weights are in a format of MKL or oneDNN."""
        return {**vars(self), "_runs": {}, "_last": {}}

    def _follow_weights(self) -> None:
        """Forget what was folded from other weights: the owner of the teacher may change them."""
        if self._watch.changed():
            self._runs, self._last = {}, {}
