"""From what images have become to the result of an inversion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smi_fast.engine.precision import described
from smi_fast.inversion.result import InversionResult, Phase
from smi_fast.inversion.state import InversionState
from smi_fast.inversion.views import parts
from smi_fast.ops.grid import patch_mask


class Ending(NamedTuple):
    """What the images of a batch have become.

    Attributes:
        images: [B, C, H, W] in normalised space.
        kept: int64 [B, K].
        lengths: int64 [B], how many of ``kept`` count in each image; None where all do.
        ages: int64 [B], iterations that each image received.
    """

    images: Tensor
    kept: Tensor
    lengths: Tensor | None
    ages: Tensor


@torch.no_grad()
def result_of(
    state: InversionState,
    ending: Ending,
    timing: tuple[Phase, ...],
    iterations: int,
    remaining: float | None,
    interrupted: bool,
) -> InversionResult:
    """The result of a batch.

    Args:
        state: of all its images, with their targets, their record and finished groups.
        ending: what they have become.
        timing: the phases between stops.
        iterations: the most that an image received.
        remaining: share of the patches that the published re-ranked mask shows; None for the mask
            of the kept patches.
        interrupted: whether Ctrl-C ended the run early.
    """
    settings, teacher = state.settings, state.settings.teacher
    normalised, kept, lengths, ages = ending
    logits = state.logits(normalised, kept, lengths)
    images = settings.space.denormalize(normalised)
    shown = kept if remaining is None else _reranked(state, images, remaining)
    return InversionResult(
        images,
        kept,
        patch_mask(shown, *teacher.grid, lengths if shown is kept else None),
        state.targets,
        logits,
        state.history(iterations),
        timing,
        iterations,
        ages,
        interrupted,
        tuple(state.finished),
        lengths,
        described(teacher.precision, teacher.dtype),
    )


def _reranked(state: InversionState, images: Tensor, remaining: float) -> Tensor:
    """The most important patches of whole images [B, 3, H, W] in [0, 1], as published."""
    teacher = state.settings.teacher
    tokens = teacher.num_patches + teacher.num_prefix_tokens
    count = min(int(tokens * remaining), teacher.num_patches)
    found = []
    for row in parts(len(images), state.settings.max_batch):
        importance = teacher(images[row], importance=True).importance
        assert importance is not None
        found.append(importance.topk(count, dim=1).indices)
    return torch.cat(found)
