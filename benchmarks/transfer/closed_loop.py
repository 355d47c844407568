"""A closed loop: further images are made where the student and its teacher still differ."""

from __future__ import annotations

import torch

from benchmarks.schedules.timed import labels
from benchmarks.transfer.sources import Pictures
from benchmarks.transfer.students import STUDENTS, Training
from smi_fast import AdversarialJS, CrossEntropy, SparseInverter, SparseViT, recipes

ROUNDS = 4
ITERATIONS = 100
WEIGHT = 1.0


def trained(
    student: str, teacher: SparseViT, count: int, steps: int, seed: int
) -> tuple[Training, Pictures]:
    """A student that learned in four rounds, each with a quarter of the images more.

    The first round's images are those of the default. The later ones' are also to be told apart by
    the student and the teacher, as it is then.
    """
    training = Training(STUDENTS[student], teacher, steps, seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, masks = [], []
    for number in range(ROUNDS):
        objectives = [CrossEntropy()]
        if number:
            objectives.append(AdversarialJS(training.student, WEIGHT))
        options = recipes.clear().options(iterations=ITERATIONS, objectives=objectives)
        result = SparseInverter(teacher, **options).invert(
            labels(count // ROUNDS), generator=generator, progress=False
        )
        pixels.append(result.images)
        masks.append(result.masks)
        pictures = Pictures(torch.cat(pixels), torch.cat(masks))
        training.learn(pictures, None, steps // ROUNDS)
    return training, pictures
