"""One step of an inversion, on tensors that stay in place and without a read by the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.objectives import Objective, Step
from smi_fast.teacher import SparseViT


@dataclass(kw_only=True)
class Iteration:
    """The state of an inversion; calling it takes one step.

    A step doesn't wait for the device, copies nothing to it, and no shape in it depends on data: so
    it can be captured in a CUDA graph and replayed. What differs from step to step is read from the
    row ``done`` of tables on the device.

    Attributes:
        teacher: that the images are inverted from.
        objectives: terms of the loss.
        targets: int64 [B] or probabilities [B, classes].
        images: [B, C, H, W] in normalised space, changed.
        kept: int64 [B, K], the kept patches; to be replaced between steps only.
        shift: int64 [T, 2], in pixels, of each step.
        flip: bool [T], of each step.
        mean: [C], of normalised space.
        std: [C], likewise.
        lr: learning rate of Adam.
        betas: decay rates of Adam.
        low: [C], least value of each channel.
        high: [C], greatest value of each channel.
        freezes: whether pixels outside of kept patches no longer change.
        backend: which implementation of the ops to use.
        exp_avg: [B, C, H, W], Adam's running mean of the gradient, changed.
        exp_avg_sq: [B, C, H, W], of its square, changed.
        done: int64 [1], steps taken, changed.
        record: float64 [T, terms + 1], the un-weighted terms and the gradient's sum before each
            step, changed.
    """

    teacher: SparseViT
    objectives: tuple[Objective, ...]
    targets: Tensor
    images: Tensor
    kept: Tensor
    shift: Tensor
    flip: Tensor
    mean: Tensor
    std: Tensor
    lr: float
    betas: tuple[float, float]
    low: Tensor
    high: Tensor
    freezes: bool
    backend: str
    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    done: Tensor = field(init=False)
    record: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.images) for _ in range(2))
        self.done = torch.zeros(1, dtype=torch.int64, device=self.images.device)
        columns = len(self.objectives) + 1
        self.record = self.images.new_zeros(len(self.shift), columns, dtype=torch.float64)

    def __call__(self, *, score: bool = False, number: int = 0) -> Tensor | None:
        """Takes one step; returns the importance [B, K] of kept patches when it is to be scored.

        A step is the same for all numbers that make the same terms due.
        """
        gradient, importance = self.evaluate(score=score, number=number)
        self.update(gradient)
        return importance

    def evaluate(self, *, score: bool = False, number: int = 0) -> tuple[Tensor, Tensor | None]:
        """Records the terms; returns the gradient [B, C, H, W], and importance when asked for."""
        teacher, images = self.teacher, self.images.detach().requires_grad_()
        shift, flip = (table.index_select(0, self.done)[0] for table in (self.shift, self.flip))
        output = teacher(images, self.kept, jitter=(shift, flip), importance=score, taps=self._taps)
        changing, size = self._changing, teacher.patch_size
        step = Step(
            images,
            output.logits,
            self.targets,
            changing,
            size,
            self.backend,
            iteration=number,
            done=self.done[0],
            jitter=(shift, flip),
            mean=self.mean,
            std=self.std,
            taps=output.taps,
            depth=teacher.depth,
            prefix=teacher.num_prefix_tokens,
            seen=self.kept,
        )
        values = [objective(step) for objective in self.objectives]
        terms = zip(self.objectives, values, strict=True)
        loss = torch.stack([objective.weight * value for objective, value in terms]).sum()
        (gradient,) = torch.autograd.grad(loss, images)
        with torch.no_grad():
            row = torch.stack([*values, gradient.sum()]).to(self.record.dtype)
            self.record.index_copy_(0, self.done, row[None])
        return gradient, output.importance

    def update(self, gradient: Tensor) -> None:
        """Moves the pixels along a gradient [B, C, H, W]."""
        self.done.add_(1)
        ops.adam_clamp_(
            self.images,
            gradient,
            self.exp_avg,
            self.exp_avg_sq,
            step=self.done[0],
            lr=self.lr,
            betas=self.betas,
            low=self.low,
            high=self.high,
            kept=self._changing,
            patch_size=self.teacher.patch_size,
            backend=self.backend,
        )

    @property
    def _changing(self) -> Tensor | None:
        """The kept patches where only their pixels change."""
        frozen = self.freezes and self.kept.shape[1] < self.teacher.num_patches
        return self.kept if frozen else None

    @property
    def _taps(self) -> set[str]:
        """What the terms ask the teacher for."""
        return {tap for term in self.objectives for tap in term.taps(self.teacher.depth)}

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.images, self.exp_avg, self.exp_avg_sq, self.done

    def saved(self) -> list[Tensor]:
        """A copy of everything that a step changes, but for the record."""
        return [tensor.clone() for tensor in self._state]

    def restore(self, saved: list[Tensor]) -> None:
        """Goes back to where a copy was made."""
        for tensor, copy in zip(self._state, saved, strict=True):
            tensor.copy_(copy)

    def non_finite(self, steps: slice) -> str | None:
        """The first of the terms, or "gradient", that is not finite in some of the steps.

        The host waits for the device here, as in the two methods below.
        """
        names = [*(objective.name for objective in self.objectives), "gradient"]
        for row in self.record[steps].tolist():
            for name, number in zip(names, row, strict=True):
                if not math.isfinite(number):
                    return name
        return None

    def taken(self) -> int:
        """Steps so far."""
        return int(self.done)

    def history(self) -> dict[str, list[float]]:
        """Of each term the un-weighted value before each step that was taken."""
        *columns, _ = self.record[: self.taken()].T.tolist()
        names = (objective.name for objective in self.objectives)
        return dict(zip(names, columns, strict=True))
