"""Some images of a state, and several states as one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from smi_fast.inversion.state import InversionState
from smi_fast.ops.grid import widened

# What has a row for each image. Any of them may be None.
_ROWS = (
    "targets",
    "parameters",
    "kept",
    "lengths",
    "background",
    "frozen",
    "exp_avg",
    "exp_avg_sq",
    "rows",
)


def subset(state: InversionState, index: Sequence[int]) -> InversionState:
    """Some images of a state, as they are, with the record of the whole state.

    Args:
        state: of B images.
        index: which of them, ascending.
    """
    device = state.kept.device
    chosen = torch.tensor(index, dtype=torch.int64, device=device)
    found = copy.copy(state)
    if state.rows is None:
        found.rows = torch.arange(len(state.kept), device=device)
    for name in _ROWS:
        values: Tensor | None = getattr(found, name)
        if values is not None:
            setattr(found, name, values.index_select(0, chosen))
    shift, flip = _of_each_image(state)
    found.shift, found.flip = shift.index_select(-2, chosen), flip.index_select(-1, chosen)
    group = [number for number, count in enumerate(state.groups) for _ in range(count)]
    counts = [0] * len(state.groups)
    for image in index:
        counts[group[image]] += 1
    left = [number for number, count in enumerate(counts) if count]
    found.groups = tuple(counts[number] for number in left)
    found.iteration = state.iteration[left].clone()
    found.set_lengths(found.lengths)
    return found


def joined(first: InversionState, second: InversionState) -> InversionState:
    """The images of two states of one batch, which are behind the same stops, as one state.

    Args:
        first: of the images that come first.
        second: of the others.
    """
    found = copy.copy(first)
    first, second = _alike(first, second)
    for name in _ROWS:
        values = [getattr(state, name) for state in (first, second)]
        setattr(found, name, None if values[0] is None else torch.cat(values))
    found.shift = torch.cat([first.shift, second.shift], dim=-2)
    found.flip = torch.cat([first.flip, second.flip], dim=-1)
    found.groups = first.groups + second.groups
    found.iteration = torch.cat([first.iteration, second.iteration])
    found.set_lengths(found.lengths)
    return found


def _alike(*states: InversionState) -> list[InversionState]:
    """The states with as many columns in ``kept``: ragged ones are padded."""
    width, found = max(state.kept.shape[1] for state in states), []
    for state in states:
        if state.kept.shape[1] < width:
            state, narrow = copy.copy(state), state.kept
            state.kept = widened(narrow, width, state.settings.teacher.num_patches)
        found.append(state)
    return found


def _of_each_image(state: InversionState) -> tuple[Tensor, Tensor]:
    """The tables of shift and flip, with a column for each image."""
    batch, alike = len(state.kept), 1 if state.settings.copies == 1 else 2
    if state.flip.dim() > alike:
        return state.shift, state.flip
    shift = state.shift.unsqueeze(-2).expand(*state.flip.shape, batch, 2)
    return shift, state.flip.unsqueeze(-1).expand(*state.flip.shape, batch)
