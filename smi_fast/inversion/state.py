"""The state of an inversion, and one iteration on tensors that stay in place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.inversion.result import FinishedGroup
from smi_fast.jitter import Jitter
from smi_fast.objectives import LossInputs, Objective, value_of
from smi_fast.parametrizations import Parametrization
from smi_fast.schedules import Selection
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
        iterations: T, iterations of a run.
        jitter: draws the shift and the mirroring of each iteration.
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
    iterations: int
    jitter: Jitter
    lr: Tensor
    betas: tuple[float, float]
    weight_decay: float
    freeze_background: bool
    backend: str
    graph: bool

    def due(self, number: int) -> tuple[bool, ...]:
        """Which objectives are evaluated in an iteration."""
        return tuple(number % objective.every == 0 for objective in self.objectives)


@dataclass(kw_only=True, eq=False)
class InversionState:
    """The state of an inversion; :meth:`step` takes one iteration.

    An iteration doesn't wait for the device, copies nothing to it, and no shape in it depends on
    data: it can be captured in a CUDA graph and replayed. What differs from one iteration to the
    next is read from row ``iteration`` of tables on the device.

    Attributes:
        settings: what decides the inversion.
        targets: [B, ...], or None where no objective reads them.
        parameters: [B, C, ...], moved by the optimiser.
        kept: int64 [B, K], the patches that the teacher computes; :meth:`keep` replaces them.
        shift: int64 [T, 2], in pixels, of each iteration; [T, B, 2] for each image.
        flip: bool [T], of each iteration; [T, B] for each image.
        background: images [B, C, H, W] as they were at the last stop, where the parametrization
            can't freeze them itself.
        finished: groups of patches that a schedule took out, in the order of their stops.
        exp_avg: [B, C, ...], Adam's running mean of the gradient.
        exp_avg_sq: [B, C, ...], Adam's running mean of its square.
        iteration: int64 [1], iterations done.
        record: float64 [T, objectives + 1], in each iteration the un-weighted objectives and the
            sum of the gradient.
    """

    settings: Settings
    targets: Tensor | None
    parameters: Tensor
    kept: Tensor
    shift: Tensor
    flip: Tensor
    background: Tensor | None = field(init=False, default=None)
    finished: list[FinishedGroup] = field(init=False, default_factory=list)
    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    iteration: Tensor = field(init=False)
    record: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.parameters) for _ in range(2))
        self.iteration = torch.zeros(1, dtype=torch.int64, device=self.parameters.device)
        columns = len(self.settings.objectives) + 1
        self.record = self.parameters.new_zeros(len(self.shift), columns, dtype=torch.float64)
        self._bounds = self.settings.parametrization.bounds()

    @property
    def active(self) -> Tensor | None:
        """int64 [B, K], the patches whose pixels change; None when all pixels change."""
        sparse = self.kept.shape[1] < self.settings.teacher.num_patches
        return self.kept if self.settings.freeze_background and sparse else None

    @torch.no_grad()
    def images(self) -> Tensor:
        """[B, C, H, W] in normalised space; of ``Pixels`` the parameters themselves."""
        return self._images(self.parameters)

    def _images(self, parameters: Tensor) -> Tensor:
        images = self.settings.parametrization.images(parameters)
        if self.background is None:
            return images
        return torch.where(self.settings.teacher.pixel_mask(self.kept), images, self.background)

    @torch.no_grad()
    def keep(self, selection: Selection) -> None:
        """Take a stop: from now on the teacher computes ``selection.kept`` only."""
        settings = self.settings
        if selection.finished is not None:
            self.finished.append(self._finish(selection.finished))
        if settings.freeze_background and not settings.parametrization.pixelwise:
            self.background = self.images().clone()
        self.kept = selection.kept

    def _finish(self, patches: Tensor) -> FinishedGroup:
        pixels, _ = ops.gather_patches(
            self.settings.space.denormalize(self.images()),
            patches,
            patch_size=self.settings.teacher.patch_size,
            backend=self.settings.backend,
        )
        return FinishedGroup(self.done(), patches, pixels)

    def step(self, *, score: bool = False, number: int = 0) -> Tensor | None:
        """Take one iteration.

        Args:
            score: whether to score the importance of kept patches.
            number: of the iteration. It only decides which objectives with ``every > 1`` are
                evaluated, so one captured graph serves all iterations that evaluate the same ones.

        Returns:
            importance [B, K] with ``score``, else None.
        """
        gradient, importance = self.evaluate(score=score, number=number)
        self.update(gradient)
        return importance

    def evaluate(self, *, score: bool = False, number: int = 0) -> tuple[Tensor, Tensor | None]:
        """Record the objectives; return the parameters' gradient, and importance or None.

        Raises:
            ValueError: no objective depends on the images, or one isn't a scalar.
        """
        settings, teacher = self.settings, self.settings.teacher
        pairs = [*zip(settings.objectives, settings.due(number), strict=True)]
        parameters = self.parameters.detach().requires_grad_()
        images = self._images(parameters)
        shift, flip = (
            table.index_select(0, self.iteration)[0] for table in (self.shift, self.flip)
        )
        taps = {tap for objective, due in pairs if due for tap in objective.taps(teacher.depth)}
        output = teacher(images, self.kept, jitter=(shift, flip), importance=score, taps=taps)
        inputs = LossInputs(
            images=images,
            logits=output.logits,
            targets=self.targets,
            kept=self.kept,
            active=self.active,
            teacher=teacher,
            space=settings.space,
            backend=settings.backend,
            iteration=number,
            iteration_tensor=self.iteration[0],
            jitter=(shift, flip),
            taps=output.taps,
        )
        values = [
            value_of(objective, inputs) if due else images.new_zeros(()) for objective, due in pairs
        ]
        # A weight of 1 is left out: it would cost a kernel forward and another backward.
        loss = torch.stack(
            [
                value if objective.weight == 1 else objective.weight * value
                for objective, value in zip(settings.objectives, values, strict=True)
            ]
        ).sum()
        gradient = _gradient(loss, parameters)
        if gradient is None:
            # In an iteration without an evaluated objective the pixels only follow their momentum.
            if all(due for _, due in pairs):
                names = ", ".join(objective.name for objective in settings.objectives)
                raise ValueError(
                    f"no objective depends on the images: the gradient of {names} was cut off, as "
                    "by .detach(), .item() or torch.no_grad()"
                )
            gradient = torch.zeros_like(parameters)
        with torch.no_grad():
            row = torch.stack([*values, gradient.sum()]).to(self.record.dtype)
            self.record.index_copy_(0, self.iteration, row[None])
        return gradient, output.importance

    def update(self, gradient: Tensor) -> None:
        """Move the parameters along their gradient."""
        settings = self.settings
        lr = settings.lr.index_select(0, self.iteration)[0]
        self.iteration.add_(1)
        tensors = (self.parameters, gradient, self.exp_avg, self.exp_avg_sq)
        pixelwise = settings.parametrization.pixelwise
        if not pixelwise:
            tensors = tuple(tensor.flatten(2)[:, :, None] for tensor in tensors)  # type: ignore[assignment]
        low, high = self._bounds
        ops.adam_clamp_(
            *tensors,
            step=self.iteration[0],
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            low=low,
            high=high,
            active=self.active if pixelwise else None,
            patch_size=settings.teacher.patch_size if pixelwise else 1,
            backend=settings.backend,
        )

    @property
    def _moving(self) -> tuple[Tensor, ...]:
        return self.parameters, self.exp_avg, self.exp_avg_sq, self.iteration

    def save(self) -> list[Tensor]:
        """A copy of everything that an iteration changes, apart from the record."""
        return [tensor.clone() for tensor in self._moving]

    def restore(self, saved: list[Tensor]) -> None:
        """Go back to the state that :meth:`save` copied."""
        for tensor, copy in zip(self._moving, saved, strict=True):
            tensor.copy_(copy)

    def non_finite(self, iterations: slice) -> str | None:
        """The first objective, or "gradient", that is not finite in one of the iterations.

        The host waits for the device here, as in :meth:`done` and :meth:`history`.
        """
        names = [*(objective.name for objective in self.settings.objectives), "gradient"]
        for row in self.record[iterations].tolist():
            for name, number in zip(names, row, strict=True):
                if not math.isfinite(number):
                    return name
        return None

    def done(self) -> int:
        """Iterations done."""
        return int(self.iteration)

    def history(self) -> dict[str, list[float]]:
        """The un-weighted value of each objective in each iteration done."""
        *columns, _ = self.record[: self.done()].T.tolist()
        names = (objective.name for objective in self.settings.objectives)
        return dict(zip(names, columns, strict=True))


def _gradient(loss: Tensor, parameters: Tensor) -> Tensor | None:
    """Gradient of the loss, or None when it doesn't depend on the parameters."""
    if not loss.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, parameters, allow_unused=True)
    return gradient
