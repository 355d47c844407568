"""``invert``: one batch in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smi_fast.augmentations import Augment
from smi_fast.early_finish import EarlyFinish
from smi_fast.importance import Scores
from smi_fast.inversion.inverter import SparseInverter, Terms
from smi_fast.inversion.loop import Callback
from smi_fast.inversion.result import InversionResult
from smi_fast.jitter import Jitter
from smi_fast.learning_rate import Rates
from smi_fast.ops.backends import AUTO
from smi_fast.parametrizations import Parametrization
from smi_fast.schedules import Schedule


def invert(
    teacher: nn.Module,
    targets: Tensor | Sequence[int] | None = None,
    *,
    objectives: Terms | None = None,
    schedule: Schedule | None = None,
    importance: Scores = "attention",
    parametrization: Parametrization | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    iterations: int = 100,
    lr: Rates = 0.12,
    betas: tuple[float, float] = (0.5, 0.99),
    optimizer: str = "adam",
    weight_decay: float | None = None,
    jitter: Jitter | tuple[Tensor, Tensor] | None = None,
    augment: Augment | None = None,
    copies: int = 1,
    max_batch: int | None = None,
    finish: EarlyFinish | None = None,
    background: str = "frozen",
    final_mask: str = "kept",
    backend: str = AUTO,
    precision: str | None = None,
    graph: bool = True,
    batch: int | None = None,
    init: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> InversionResult:
    """Invert one batch: ``SparseInverter(teacher, ...).invert(targets, ...)``.

    >>> result = invert(teacher, [7], iterations=10, schedule=Dense(), progress=False)
    >>> result.confidence.shape
    torch.Size([1])

    The arguments up to ``graph`` are those of :class:`SparseInverter`, the others those of
    :meth:`SparseInverter.invert`.
    """
    inverter = SparseInverter(
        teacher,
        objectives=objectives,
        schedule=schedule,
        importance=importance,
        parametrization=parametrization,
        mean=mean,
        std=std,
        iterations=iterations,
        lr=lr,
        betas=betas,
        optimizer=optimizer,
        weight_decay=weight_decay,
        augment=augment,
        copies=copies,
        max_batch=max_batch,
        finish=finish,
        background=background,
        final_mask=final_mask,
        backend=backend,
        precision=precision,
        graph=graph,
    )
    return inverter.invert(
        targets,
        batch=batch,
        init=init,
        jitter=jitter,
        generator=generator,
        progress=progress,
        callback=callback,
    )
