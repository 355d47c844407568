"""The options of an inversion, decided once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smi_fast.augmentations import Augment
from smi_fast.early_finish import EarlyFinish
from smi_fast.importance import Importance
from smi_fast.jitter import Jitter
from smi_fast.objectives import Objective
from smi_fast.parametrizations import Parametrization
from smi_fast.teacher import SparseViT
from smi_fast.teacher.space import ImageSpace


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """What an inversion is decided by, apart from its targets, its start and its schedule.

    Attributes:
        teacher: the network that is inverted.
        objectives: terms of the loss.
        parametrization: what the optimiser moves, bound to ``space``.
        space: the space that images are normalised in.
        importance: scores kept patches in the iteration before a stop.
        iterations: T, iterations of a run.
        jitter: draws the shift and the mirroring of each iteration.
        augment: changes the images before the teacher sees them; None for no change.
        copies: R, views of each image in an iteration.
        max_batch: the most images that the teacher computes at once; None for all.
        finish: when an image is finished before the last iteration; None for no such image.
        lr: float64 [T], learning rate of each iteration, on the teacher's device.
        betas: decay rates of Adam.
        weight_decay: decoupled weight decay, as of AdamW; 0 for Adam.
        freeze_background: whether the pixels of stopped patches no longer change.
        backend: which implementation of the ops to use.
        graph: whether iterations on CUDA are replayed from a CUDA graph.
    """

    teacher: SparseViT
    objectives: tuple[Objective, ...]
    parametrization: Parametrization
    space: ImageSpace
    importance: Importance
    iterations: int
    jitter: Jitter
    augment: Augment | None
    copies: int
    max_batch: int | None
    finish: EarlyFinish | None
    lr: Tensor
    betas: tuple[float, float]
    weight_decay: float
    freeze_background: bool
    backend: str
    graph: bool

    def due(self, number: int) -> tuple[bool, ...]:
        """Which objectives are evaluated in an iteration."""
        return tuple(number % objective.every == 0 for objective in self.objectives)
