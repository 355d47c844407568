"""Adaptive DeepInversion's term: images that a student and the teacher disagree about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.objectives.base import LossInputs, Objective

LEAST, GREATEST = 0.01, 0.99


class AdversarialJS(Objective):
    """1 - the Jensen-Shannon divergence of the student's and the teacher's probabilities.

    See :func:`clamped_js` for the divergence. Source: DeepInversion (arXiv 1912.08795), equation 8,
    with temperature, clamps and order of arguments of its code; its weight there is 0.2.

    The student sees the whole jittered image, background included, also when patches have stopped;
    the teacher's logits are those of kept patches. The student is read as it is in each step, so it
    may be trained between batches; its weights get no gradient here.

    Args:
        student: network that takes images as the teacher does, in eval mode.
        weight: factor.
        temperature: that both logits are divided by.
        bounded: DeepInversion's 1 - clamp(js, 0, 1); without it -js, as in SMI's code (arXiv
            2510.27186).
    """

    name = "adversarial"

    def __init__(
        self,
        student: nn.Module,
        weight: float = 0.2,
        *,
        temperature: float = 3.0,
        bounded: bool = True,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"expected temperature above 0, got {temperature}")
        self.student, self.weight = student, weight
        self.temperature, self.bounded = temperature, bounded

    def __repr__(self) -> str:
        return (
            f"AdversarialJS({type(self.student).__name__}, weight={self.weight}, "
            f"temperature={self.temperature}, bounded={self.bounded})"
        )

    def __call__(self, inputs: LossInputs) -> Tensor:
        if self.student.training:
            raise ValueError("expected the student in eval mode: call student.eval()")
        js = clamped_js(self.student(inputs.jittered), inputs.logits, self.temperature)
        return 1 - js.clamp(0, 1) if self.bounded else -js


def clamped_js(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence as published: of clamped probabilities, which then no longer sum to one.

    With ``p`` and ``q`` the two softmaxes at the temperature, ``m`` their mean, and all three
    clamped to [0.01, 0.99] afterwards, equal to the mean over images of::

        0.5 * (m * (m.log() - p.log())).sum(1) + 0.5 * (m * (m.log() - q.log())).sum(1)

    Args:
        student: logits [B, classes].
        teacher: logits [B, classes].
        temperature: that both are divided by.
    """
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    middle = (0.5 * (p + q)).clamp(LEAST, GREATEST)
    logs = [x.clamp(LEAST, GREATEST).log() for x in (p, q)]
    return torch.stack([F.kl_div(log, middle, reduction="batchmean") for log in logs]).mean()
