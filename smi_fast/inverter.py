"""The loop: from noise to images that a frozen teacher takes for given classes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smi_fast import ops
from smi_fast.backends import AUTO
from smi_fast.objectives import Objective, Step, as_objectives, published_objectives
from smi_fast.reference import patch_mask, pixel_mask
from smi_fast.result import InversionResult, NonFiniteLoss, Phase
from smi_fast.schedules import Schedule, StopSchedule, still_iterations
from smi_fast.teacher import SparseViT

BACKGROUNDS = ("frozen", "regularized")
FINAL_MASKS = ("kept", "reranked")
# Side of the image over the largest shift, as published.
JITTER_SHARE = 8


@dataclass
class _State:
    """What changes from iteration to iteration."""

    images: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    kept: Tensor
    history: dict[str, list[float]]
    phases: list[Phase] = field(default_factory=list)
    step: int = 0


class SparseInverter:
    """Sparse model inversion of a frozen Vision Transformer.

    Args:
        teacher: a timm ``VisionTransformer``, or a :class:`SparseViT` that wraps one.
        objectives: terms of the loss, or functions ``(images, logits) -> scalar``; by default the
            published ones, cross-entropy + 1e-4 total variation.
        schedule: when patches stop; by default the published stops.
        mean: of each channel, for normalised space; by default from the teacher's
            ``pretrained_cfg``.
        std: likewise.
        iterations: steps of the optimiser.
        lr: learning rate of Adam.
        betas: decay rates of Adam.
        background: "frozen", a stopped patch no longer changes, as the paper says; or
            "regularized", it goes on receiving the image terms' gradient and Adam's momentum, as
            the published code does.
        final_mask: "kept", the patches inverted to the end; or "reranked", as published: the most
            important ones of the final image in a dense forward pass, which that code takes of the
            de-normalised image, and one more of them for the class token.
        backend: which implementation of the ops to use, see :mod:`smi_fast.backends`.

    Raises:
        ValueError: any of these out of range, with what was expected and what came.
        UnsupportedTeacher: the teacher can't be computed exactly on kept patches.
        BackendUnavailable: there is no such backend.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        objectives: Iterable[Objective | Callable[[Tensor, Tensor], Tensor]] | None = None,
        schedule: Schedule | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        iterations: int = 4000,
        lr: float = 0.25,
        betas: tuple[float, float] = (0.5, 0.99),
        background: str = "frozen",
        final_mask: str = "kept",
        backend: str = AUTO,
    ) -> None:
        self.teacher = (
            teacher if isinstance(teacher, SparseViT) else SparseViT(teacher, backend=backend)
        )
        self.objectives = as_objectives(
            published_objectives() if objectives is None else objectives
        )
        self.schedule = StopSchedule() if schedule is None else schedule
        self.mean, self.std = (
            self._channels(name, given) for name, given in (("mean", mean), ("std", std))
        )
        self.iterations, self.lr, self.betas = iterations, lr, betas
        self.background, self.final_mask, self.backend = background, final_mask, backend
        self._check_options()
        self._counts = dict(
            zip(self.schedule.at, self.schedule.counts(self.teacher.num_patches), strict=True)
        )
        self._low, self._high = -self.mean / self.std, (1 - self.mean) / self.std

    def _channels(self, name: str, given: Sequence[float] | None) -> Tensor:
        if given is None:
            given = (getattr(self.teacher.vit, "pretrained_cfg", None) or {}).get(name)
        if given is None:
            raise ValueError(f"the teacher's pretrained_cfg has no {name}: pass {name}=(r, g, b)")
        values = torch.tensor(tuple(given), dtype=torch.float64)
        channels = self.teacher.channels
        if values.shape != (channels,):
            raise ValueError(f"expected {name} of {channels} channels, got {tuple(given)}")
        if name == "std" and (values <= 0).any():
            raise ValueError(f"expected std above 0, got {tuple(given)}")
        return values.to(self.teacher.device, self.teacher.dtype)

    def _check_options(self) -> None:
        choices = (("background", BACKGROUNDS), ("final_mask", FINAL_MASKS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"expected {name} {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.iterations < 1:
            raise ValueError(f"expected 1 or more iterations, got {self.iterations}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"expected lr above 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas in [0, 1), got {self.betas}")
        if self.schedule.at and self.schedule.at[-1] >= self.iterations:
            raise ValueError(
                f"the stop at {self.schedule.at[-1]} is past the end of {self.iterations} "
                "iterations: run more of them, or take StopSchedule.scaled(iterations)"
            )

    def invert(
        self,
        targets: Tensor | Sequence[int],
        *,
        init: Tensor | None = None,
        jitter: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> InversionResult:
        """Inverts one batch; Ctrl-C ends it early and gives back what is done.

        Args:
            targets: class indices [B], or probabilities [B, classes].
            init: first pixels [B, 3, H, W] in normalised space; by default standard normal noise.
            jitter: shift int64 [T, 2] in pixels and flip bool [T] of each iteration; by default
                uniform in an eighth of each side, and every other one mirrored. Around stops there
                is none, whatever is given.
            generator: draws the default ``init`` and then ``jitter``, on the CPU; by default
                torch's own.
            progress: show a progress bar.
            callback: called after each step with the iteration, the images in normalised space and
                the kept patches; both are the loop's own, to be copied when they are to be held on
                to.

        Raises:
            ValueError: targets, init or jitter of the wrong shape, type, range or device.
            NonFiniteLoss: a term or the gradient is infinite or not a number.
        """
        targets = self._check_targets(targets)
        images = self._first_images(init, len(targets), generator)
        shift, flip = self._jitter_table(jitter, generator)
        state = _State(
            images.requires_grad_(),
            torch.zeros_like(images, requires_grad=False),
            torch.zeros_like(images, requires_grad=False),
            self.teacher.every_patch(len(targets)),
            {objective.name: [] for objective in self.objectives},
        )
        still, importance, interrupted = still_iterations(self.schedule), None, False
        bar = tqdm(total=self.iterations, disable=not progress, unit="it", dynamic_ncols=True)
        start, first = time.perf_counter(), 0
        try:
            for iteration in range(self.iterations):
                if iteration in self._counts:
                    assert importance is not None
                    state.phases.append(_phase(state, iteration - first, start))
                    start, first = time.perf_counter(), iteration
                    count = self._counts[iteration]
                    state.kept = self.schedule.select(state.kept, importance, count)
                moved = None if iteration in still else (shift[iteration], flip[iteration])
                importance = self._step(state, targets, moved, iteration + 1 in self._counts)
                self._show(bar, state)
                if callback is not None:
                    callback(iteration, state.images.detach(), state.kept)
        except KeyboardInterrupt:
            interrupted = True
        except _NonFinite as error:
            state.phases.append(_phase(state, state.step - first, start))
            result = self._result(state, targets, interrupted=True)
            raise NonFiniteLoss(state.step, str(error), result) from None
        finally:
            bar.close()
        state.phases.append(_phase(state, state.step - first, start))
        return self._result(state, targets, interrupted)

    def _step(
        self, state: _State, targets: Tensor, jitter: tuple[Tensor, Tensor] | None, score: bool
    ) -> Tensor | None:
        """One iteration; returns the importance of kept patches when it is to be scored."""
        images, teacher = state.images, self.teacher
        frozen = self.background == "frozen" and state.kept.shape[1] < teacher.num_patches
        changing = state.kept if frozen else None
        output = teacher(images, state.kept, jitter=jitter, importance=score)
        step = Step(images, output.logits, targets, changing, teacher.patch_size, self.backend)
        values = [objective(step) for objective in self.objectives]
        terms = zip(self.objectives, values, strict=True)
        loss = torch.stack([objective.weight * value for objective, value in terms]).sum()
        (gradient,) = torch.autograd.grad(loss, images)
        numbers = dict(zip(state.history, torch.stack(values).tolist(), strict=True))
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise _NonFinite(name)
        if not torch.isfinite(gradient.sum()):
            raise _NonFinite("gradient")
        for name, number in numbers.items():
            state.history[name].append(number)
        ops.adam_clamp_(
            images,
            gradient,
            state.exp_avg,
            state.exp_avg_sq,
            step=state.step + 1,
            lr=self.lr,
            betas=self.betas,
            low=self._low,
            high=self._high,
            kept=changing,
            patch_size=teacher.patch_size,
            backend=self.backend,
        )
        state.step += 1
        row: Tensor | None = output.importance
        return row

    def _show(self, bar: tqdm[None], state: _State) -> None:
        name = self.objectives[0].name
        rate = (bar.format_dict["rate"] or 0) * len(state.images) / self.iterations
        bar.set_postfix_str(
            f"{name} {state.history[name][-1]:.3f}, kept {state.kept.shape[1]}, "
            f"{rate:.3g} images/s",
            refresh=False,
        )
        bar.update()

    @torch.no_grad()
    def _result(self, state: _State, targets: Tensor, interrupted: bool) -> InversionResult:
        teacher, pixels = self.teacher, state.images.detach()
        logits = teacher(pixels, state.kept).logits
        images = (pixels * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)
        shown = state.kept
        if self.final_mask == "reranked":
            tokens = teacher.num_patches + teacher.num_prefix_tokens
            count = min(int(tokens * self.schedule.remaining), teacher.num_patches)
            importance = teacher(images, importance=True).importance
            assert importance is not None
            shown = importance.topk(count, dim=1).indices
        visible = pixel_mask(shown, teacher.patch_size, *teacher.image_size)
        return InversionResult(
            images,
            state.kept,
            patch_mask(shown, *teacher.grid),
            images * visible,
            targets,
            logits,
            state.history,
            tuple(state.phases),
            state.step,
            interrupted,
        )

    def _check_targets(self, targets: Tensor | Sequence[int]) -> Tensor:
        given, classes = torch.as_tensor(targets), self.teacher.num_classes
        if isinstance(targets, Tensor) and targets.device != self.teacher.device:
            raise ValueError(
                f"expected targets on {self.teacher.device}, as the teacher, got {targets.device}"
            )
        if given.dim() == 1 and not given.is_floating_point() and given.dtype != torch.bool:
            if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < classes:
                raise ValueError(
                    f"expected targets in 0..{classes - 1}, "
                    f"got {int(given.min())}..{int(given.max())}"
                )
            return given.to(self.teacher.device, torch.int64)
        if given.dim() == 2 and given.is_floating_point() and given.shape[1] == classes:
            return given.to(self.teacher.device, self.teacher.dtype)
        raise ValueError(
            f"expected targets as whole numbers [B] or probabilities [B, {classes}], "
            f"got {given.dtype} {list(given.shape)}"
        )

    def _first_images(
        self, init: Tensor | None, batch: int, generator: torch.Generator | None
    ) -> Tensor:
        teacher = self.teacher
        shape = (batch, teacher.channels, *teacher.image_size)
        if init is None:
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            return noise.to(teacher.device, teacher.dtype)
        if init.shape != shape or not init.is_floating_point() or init.device != teacher.device:
            raise ValueError(
                f"expected init as floating point {list(shape)} on {teacher.device}, "
                f"got {init.dtype} {list(init.shape)} on {init.device}"
            )
        return init.detach().to(teacher.dtype, copy=True).contiguous()

    def _jitter_table(
        self, jitter: tuple[Tensor, Tensor] | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        count, device = self.iterations, self.teacher.device
        if jitter is None:
            shift, flip = random_jitter(count, self.teacher.image_size, generator)
            return shift.to(device), flip.to(device)
        shift, flip = jitter
        if shift.shape != (count, 2) or shift.dtype != torch.int64:
            raise ValueError(
                f"expected shift int64 [{count}, 2], got {shift.dtype} {list(shift.shape)}"
            )
        if flip.shape != (count,) or flip.dtype != torch.bool:
            raise ValueError(f"expected flip bool [{count}], got {flip.dtype} {list(flip.shape)}")
        return shift.to(device), flip.to(device)


def random_jitter(
    iterations: int, image_size: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Shift int64 [iterations, 2], up to an eighth of each side, and flip bool [iterations]."""
    limits = [side // JITTER_SHARE for side in image_size]
    shift = torch.stack(
        [torch.randint(-m, m + 1, (iterations,), generator=generator) for m in limits], dim=1
    )
    return shift, torch.rand(iterations, generator=generator) < 0.5


def invert(
    teacher: nn.Module,
    targets: Tensor | Sequence[int],
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
    **options: object,
) -> InversionResult:
    """Inverts one batch: ``SparseInverter(teacher, **options).invert(targets)``.

    Args:
        teacher: a timm ``VisionTransformer``.
        targets: class indices [B], or probabilities [B, classes].
        generator: draws the noise and the jitter.
        progress: show a progress bar.
        **options: of :class:`SparseInverter`.
    """
    inverter = SparseInverter(teacher, **options)  # type: ignore[arg-type]
    return inverter.invert(targets, generator=generator, progress=progress)


class _NonFinite(Exception):
    """Leaves the loop with the name of what is not finite."""


def _phase(state: _State, iterations: int, start: float) -> Phase:
    return Phase(state.kept.shape[1], iterations, time.perf_counter() - start)
