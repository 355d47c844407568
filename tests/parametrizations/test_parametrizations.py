"""Parametrizations in the loop: what moves, what stays frozen, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    Dense,
    Fourier,
    Parametrization,
    Pixels,
    Pyramid,
    Selection,
    TotalVariation,
)
from smi_fast.augmentations import GaussianNoise
from smi_fast.teacher.space import ImageSpace
from tests.helpers.host_guard import HostGuard
from tests.helpers.inversions import (
    EVERY_PIXEL_OBJECTIVE,
    TARGETS,
    denormalized,
    frames,
    make,
    pixels_of,
    run,
    start,
)
from tests.helpers.parametrizations import Linear, Sigmoid
from tests.helpers.teachers import tiny_vit

BOTH = pytest.mark.parametrize("kind", [Sigmoid, Linear])


@BOTH
def test_dense_run_is_adam_on_the_parameters(teacher: VisionTransformer, kind: Callable) -> None:
    objectives = [CrossEntropy(2.0), TotalVariation(0.1, per_image=False)]
    options = {"schedule": Dense(), "objectives": objectives, "parametrization": kind()}
    inverter = make(teacher, **options)
    jitter = torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    result = inverter.invert(TARGETS, jitter=jitter, generator=generator, progress=False)

    bound = inverter.settings.parametrization
    moved = bound.initial(2, torch.Generator().manual_seed(0)).requires_grad_()
    adam = torch.optim.Adam([moved], 0.25, (0.5, 0.99))
    low, high = (bound.reshape(-1, *[1] * (moved.dim() - 2)) for bound in bound.bounds())
    for iteration in range(10):
        images = bound.images(moved)
        entropy = torch.nn.functional.cross_entropy(teacher(images), torch.tensor(TARGETS))
        straight = (images.diff(dim=2), images.diff(dim=3))
        diagonals = (
            images[..., 1:, 1:] - images[..., :-1, :-1],
            images[..., 1:, :-1] - images[..., :-1, 1:],
        )
        variation = sum(map(torch.norm, straight + diagonals))
        expected = result.history["cross_entropy"][iteration]
        assert expected == pytest.approx(entropy.item(), rel=1e-9)
        adam.zero_grad()
        (2 * entropy + 0.1 * variation).backward()
        adam.step()
        with torch.no_grad():
            moved.copy_(torch.clamp(moved, low, high))
    images = denormalized(bound.images(moved.detach())).clamp(0, 1)
    torch.testing.assert_close(result.images, images)


@BOTH
def test_stopped_pixels_stay_as_they_were_at_their_stop(
    teacher: VisionTransformer, kind: Callable
) -> None:
    images, kept = frames(make(teacher, parametrization=kind()))
    assert [patches.shape[1] for patches in kept] == [24] * 3 + [12] * 3 + [6] * 4
    for number in range(1, 10):
        mask = pixels_of(kept[number])
        assert torch.equal(images[number][~mask], images[number - 1][~mask])
        assert (images[number][mask] != images[number - 1][mask]).double().mean() > 0.5
    stopped = ~pixels_of(kept[3])
    assert torch.equal(images[-1][stopped], images[2][stopped])


def test_images_may_be_memory_of_the_parameters(teacher: VisionTransformer) -> None:
    class Plain(Sigmoid):
        def images(self, parameters: Tensor) -> Tensor:
            return parameters

    images, kept = frames(make(teacher, parametrization=Plain()))
    stopped = ~pixels_of(kept[3])
    assert torch.equal(images[-1][stopped], images[2][stopped])
    assert not torch.equal(images[-1], images[2])


@BOTH
def test_regularized_background_follows_the_parameters(
    teacher: VisionTransformer, kind: Callable
) -> None:
    images, kept = frames(make(teacher, parametrization=kind(), background="regularized"))
    stopped = ~pixels_of(kept[9])
    assert (images[9][stopped] != images[8][stopped]).double().mean() > 0.5


@BOTH
def test_only_the_parameters_have_a_gradient(teacher: VisionTransformer, kind: Callable) -> None:
    state = start(make(teacher, parametrization=kind(), objectives=EVERY_PIXEL_OBJECTIVE))
    kept = torch.arange(6).expand(2, -1)
    state.step()
    state.keep(Selection(kept))
    gradient = state.evaluate().parameters
    assert gradient.shape == state.parameters.shape and gradient.any()
    if kind is Sigmoid:  # its parameter of a stopped pixel moves nothing that is seen
        assert not gradient[~pixels_of(kept)].any()
    assert state.background is not None and not state.background.requires_grad
    assert not state.parameters.requires_grad
    assert all(weight.grad is None for weight in state.settings.teacher.parameters())
    before, images = state.parameters.clone(), state.images().clone()
    state.update(gradient)
    assert not torch.equal(state.parameters, before)
    stopped = ~pixels_of(kept)
    assert torch.equal(state.images()[stopped], images[stopped])


@BOTH
@pytest.mark.usefixtures("each_backend")
def test_reads_nothing_on_the_host(teacher: VisionTransformer, kind: Callable) -> None:
    state = start(make(teacher, parametrization=kind(), objectives=EVERY_PIXEL_OBJECTIVE))
    with HostGuard():
        state.step()
    state.keep(Selection(state.kept[:, :12].contiguous()))
    with HostGuard():
        state.step()
        importance = state.step(score=True)
    assert importance is not None and importance.shape == (2, 12)
    assert state.done() == 3


@BOTH
def test_captured_loop_gives_the_same_bytes(
    teacher: VisionTransformer, kind: Callable, request: pytest.FixtureRequest
) -> None:
    options = {"parametrization": kind(), "objectives": EVERY_PIXEL_OBJECTIVE}
    checked = run(teacher, **options)
    replays = request.getfixturevalue("replays")
    captured = run(teacher, **options)
    assert len(replays) == 8  # of ten, for two are scored
    for name in ("images", "kept", "logits", "masks"):
        assert torch.equal(getattr(captured, name), getattr(checked, name))
    assert captured.history == checked.history


@BOTH
def test_given_images_are_refused(teacher: VisionTransformer, kind: Callable) -> None:
    images = torch.zeros(2, 3, 32, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^\w+ can't start from given images: leave init out$"):
        make(teacher, parametrization=kind()).invert(TARGETS, init=images, progress=False)


def test_parameters_may_have_strides_of_their_own(teacher: VisionTransformer) -> None:
    class Strided(Sigmoid):
        def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
            return super().initial(batch, generator).mT.contiguous().mT

    assert torch.equal(
        run(teacher, parametrization=Strided()).images,
        run(teacher, parametrization=Sigmoid()).images,
    )


def test_a_start_that_is_kept_is_not_moved(teacher: VisionTransformer) -> None:
    class Kept(Sigmoid):
        def bind(self, space: ImageSpace) -> Kept:
            bound = super().bind(space)
            bound.start = super(Kept, bound).initial(2, torch.Generator().manual_seed(0))
            return bound

        def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
            return self.start

    inverter = make(teacher, parametrization=Kept())
    jitter = torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10, dtype=torch.bool)
    one, other = (inverter.invert(TARGETS, jitter=jitter, progress=False) for _ in range(2))
    assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("kind", [Pixels, Fourier, Pyramid])
def test_options_are_fixed(kind: Callable) -> None:
    for name in ("decay", "start", "space"):
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(kind(), name, 2)


@pytest.mark.parametrize("kind", [Pixels, Fourier, Pyramid])
def test_a_teacher_in_half_precision(kind: Callable) -> None:
    inverter = make(tiny_vit().bfloat16(), parametrization=kind())
    state = start(inverter)
    # The moments of Adam have its data type.
    assert state.parameters.dtype == (torch.bfloat16 if kind is Pixels else torch.float32)
    images = torch.rand(2, 3, 32, 48)
    result = inverter.invert(TARGETS, init=images, progress=False)
    assert result.images.dtype == torch.bfloat16 and result.images.isfinite().all()


def test_no_image(teacher: VisionTransformer) -> None:
    inverter = make(teacher, parametrization=Fourier(), objectives=[TotalVariation()])
    assert inverter.invert(batch=0, progress=False).images.shape == (0, 3, 32, 48)


def test_binding_leaves_the_given_parametrization_as_it_was(teacher: VisionTransformer) -> None:
    given = Linear()
    inverter = make(teacher, parametrization=given)
    assert not hasattr(given, "space") and not hasattr(given, "basis")
    assert inverter.settings.parametrization.space is inverter.settings.space


def test_pixels_start_from_a_copy(teacher: VisionTransformer) -> None:
    images = torch.zeros(2, 3, 32, 48, dtype=torch.float64)
    state = make(teacher).start(TARGETS, init=images)
    state.step()
    assert not images.any() and state.parameters.any()


class Changed(Sigmoid):
    """Other parameters or images than the loop needs."""

    def __init__(
        self, images: Callable = lambda images: images, initial: Callable = lambda first: first
    ) -> None:
        self.change_images, self.change_initial = images, initial

    def initial(self, batch: int, generator: torch.Generator | None) -> Tensor:
        return self.change_initial(super().initial(batch, generator))

    def images(self, parameters: Tensor) -> Tensor:
        return self.change_images(super().images(parameters))


@pytest.mark.parametrize(
    ("parametrization", "message"),
    [
        (
            Changed(images=lambda images: images[:, :, 1:]),
            r"images of Changed as torch.float64 \[2, 3, 32, 48\] on cpu, got .* \[2, 3, 31, 48\]",
        ),
        (Changed(images=lambda images: images[:1]), r"got torch.float64 \[1, 3, 32, 48\] on cpu"),
        (
            Changed(images=lambda images: images.float()),
            r"got torch.float32 \[2, 3, 32, 48\] on cpu",
        ),
        (Changed(images=lambda images: images.to("meta")), r"got .* \[2, 3, 32, 48\] on meta"),
        (Changed(images=lambda images: None), "images of Changed as a tensor, got NoneType"),
        (Changed(images=torch.Tensor.detach), r"Changed to be differentiable, without .detach\(\)"),
        (
            Changed(initial=lambda first: first.new_zeros(3, 3, 4)),
            r"parameters of Changed as floating point \[2, 3, ...\] on cpu, got .* \[3, 3, 4\]",
        ),
        (
            Changed(initial=lambda first: first.new_zeros(2, 7, 4)),
            r"\[2, 3, ...\] on cpu, got .* \[2, 7, 4\] on",
        ),
        (
            Changed(initial=lambda first: first.new_zeros(2, 3)),
            r"got torch.float64 \[2, 3\] on cpu",
        ),
        (Changed(initial=lambda first: first.long()), r"got torch.int64 \[2, 3, 32, 48\] on cpu"),
        (Changed(initial=lambda first: first.to("meta")), "on cpu, got .* on meta"),
        (Changed(initial=lambda first: None), r"floating point \[2, 3, ...\], got NoneType"),
    ],
)
def test_what_the_loop_cannot_optimise_is_refused(
    teacher: VisionTransformer, parametrization: Parametrization, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, parametrization=parametrization).start(TARGETS)


def test_a_start_needs_no_gradients_around_it(teacher: VisionTransformer) -> None:
    inverter = make(teacher, parametrization=Fourier(), augment=GaussianNoise())
    with torch.no_grad():
        state = start(inverter)
    with torch.inference_mode():
        other = start(inverter)
    state.step()
    other.step()
    assert torch.equal(state.images(), other.images())


def test_a_parametrization_must_say_its_start_and_its_images() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Parametrization()
