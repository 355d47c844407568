"""Adaptive DeepInversion's objective: images on which a student and the teacher disagree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.objectives.base import LossInputs, Objective

# Bounds of the probabilities.
SMALLEST, LARGEST = 0.01, 0.99


class AdversarialJS(Objective):
    """1 - the Jensen-Shannon divergence of the student's and the teacher's probabilities.

    The divergence is :func:`clamped_js`. Source: DeepInversion (arXiv 1912.08795), equation 8, with
    the temperature, clamps, order of arguments and weight of its code.

    The student sees the whole jittered image, with its background, also after patches have stopped.
    The teacher's logits are those of the kept patches. Each iteration reads the student as it is
    then, so it may be trained between batches. Its weights get no gradient here.

    >>> objective = AdversarialJS(load_cnn("fashion-canvas"), temperature=2.0)
    >>> options = {"iterations": 3, "schedule": Dense(), "progress": False}
    >>> list(invert(teacher, [7], objectives=[CrossEntropy(), objective], **options).history)
    ['cross_entropy', 'adversarial']

    Args:
        student: network with as many classes as the teacher, that takes the teacher's images; in
            eval mode.
        weight: factor.
        temperature: divides the logits of the student and of the teacher; above 0.
        bounded: True for 1 - clamp(js, 0, 1), as in DeepInversion's code; False for -js, as in
            SMI's code (arXiv 2510.27186).

    Raises:
        ValueError: temperature out of range; during an inversion, a student in training mode.
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
        self.separable = not bounded  # the mean over images is what is clamped

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
    """The Jensen-Shannon divergence as published, of probabilities that are clamped.

    The clamped probabilities no longer sum to one. ``p`` and ``q`` are the softmaxes of the logits
    over the temperature, and ``m`` is their mean; then all three are clamped to [0.01, 0.99]. Equal
    to the mean over images of::

        0.5 * (m * (m.log() - p.log())).sum(1) + 0.5 * (m * (m.log() - q.log())).sum(1)

    Args:
        student: logits [B, classes].
        teacher: logits [B, classes].
        temperature: divides the logits.
    """
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    middle = (0.5 * (p + q)).clamp(SMALLEST, LARGEST)
    logs = [x.clamp(SMALLEST, LARGEST).log() for x in (p, q)]
    return torch.stack([F.kl_div(log, middle, reduction="batchmean") for log in logs]).mean()
