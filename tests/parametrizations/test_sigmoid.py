"""Parametrizations whose pixels are the sigmoid of a field: the teacher reads the field itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    Dense,
    Fourier,
    InversionResult,
    Jitter,
    Objective,
    Selection,
    SigmoidParametrization,
    SparseViT,
    StopSchedule,
    TotalVariation,
    UserTerm,
)
from smi_fast.augmentations import GaussianNoise
from smi_fast.inversion import InversionState
from smi_fast.objectives import LossInputs
from smi_fast.teacher import SigmoidImages
from smi_fast.teacher.space import ImageSpace
from tests.helpers.host_guard import HostGuard
from tests.helpers.inversions import make, start
from tests.helpers.parametrizations import space
from tests.helpers.teachers import random_images

ENTROPY = (CrossEntropy(),)
WITH_PIXELS = (CrossEntropy(), TotalVariation(0.1))
ONE_STOP = StopSchedule((3,), (0.5,))


class Whole(Fourier):
    """The same images, which the loop makes as a whole in each iteration."""

    def images(self, parameters: Tensor) -> Tensor:
        return self.space.normalize(torch.sigmoid(self.field(parameters)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever whole images are made."""
    count: list[int] = []
    tensor = SigmoidImages.tensor

    def counted(images: SigmoidImages) -> Tensor:
        count.append(len(images))
        return tensor(images)

    monkeypatch.setattr(SigmoidImages, "tensor", counted)
    return count


def inverted(teacher: VisionTransformer, kind: type[Fourier], **options: object) -> InversionResult:
    options = {"objectives": ENTROPY, "iterations": 6, **options}
    inverter = make(teacher, parametrization=kind(start=0.5), **options)
    return inverter.invert([1, 4, 0], progress=False, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("objectives", [ENTROPY, WITH_PIXELS], ids=["entropy", "pixels"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("schedule", [Dense(), ONE_STOP], ids=["dense", "sparse"])
@pytest.mark.usefixtures("each_backend")
def test_a_run_is_that_on_whole_images(
    teacher: VisionTransformer,
    objectives: tuple[Objective, ...],
    per_image: bool,
    schedule: Dense | StopSchedule,
) -> None:
    jitter = Jitter(per_image=per_image)
    options = {"objectives": objectives, "schedule": schedule, "jitter": jitter}
    ours, whole = (inverted(teacher, kind, **options) for kind in (Fourier, Whole))
    assert torch.equal(ours.kept, whole.kept)
    for name, values in whole.history.items():
        assert ours.history[name] == pytest.approx(values, rel=1e-10)
    torch.testing.assert_close(ours.images, whole.images, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"copies": 2}, {"max_batch": 2}, {"augment": GaussianNoise()}, {"background": "regularized"}],
    ids=str,
)
def test_options_that_change_the_views_do_too(
    teacher: VisionTransformer, options: dict[str, object]
) -> None:
    options = {"objectives": WITH_PIXELS, "schedule": ONE_STOP, **options}
    ours, whole = (inverted(teacher, kind, **options) for kind in (Fourier, Whole))
    torch.testing.assert_close(ours.images, whole.images, rtol=0, atol=1e-9)


def stopped(teacher: VisionTransformer, **options: object) -> InversionState:
    state = start(make(teacher, parametrization=Fourier(start=0.5), **options))
    state.step()
    state.keep(Selection(torch.tensor([[0, 1, 9], [7, 8, 20]])))
    return state


@pytest.mark.usefixtures("each_backend")
def test_gradient_after_a_stop_is_that_through_whole_images(teacher: VisionTransformer) -> None:
    state = stopped(teacher, objectives=WITH_PIXELS)
    state.shift, state.flip = state.shift.clone(), state.flip.clone()
    state.shift[1], state.flip[1] = torch.tensor([3, -5]), True
    gradient = state.evaluate().parameters
    assert gradient.any()
    whole = replace(state.settings, parametrization=Whole().bind(state.settings.space))
    state.settings = whole
    torch.testing.assert_close(gradient, state.evaluate().parameters, rtol=1e-9, atol=1e-12)


def test_whole_images_are_made_only_where_an_objective_reads_them(
    teacher: VisionTransformer, made: list[int]
) -> None:
    state = stopped(teacher, objectives=ENTROPY)
    made.clear()
    with HostGuard():
        state.step()
    assert not made
    state = stopped(teacher, objectives=(*WITH_PIXELS, TotalVariation(1e-3, "l1")))
    made.clear()
    state.step()
    assert made == [2]  # once, for two objectives


def test_who_reads_images_without_a_gradient_leaves_them_theirs(
    teacher: VisionTransformer,
) -> None:
    class Watched(Objective):
        name, weight = "watched", 0.0

        def __call__(self, inputs: LossInputs) -> Tensor:
            with torch.no_grad():
                return inputs.jittered.mean() + inputs.images.mean()

    brightness = UserTerm(lambda images, logits: images.mean(), "brightness")
    both, alone = (
        stopped(teacher, objectives=objectives).evaluate().parameters
        for objectives in ([Watched(), brightness], [brightness])
    )
    assert alone.any() and torch.equal(both, alone)


def test_the_teacher_sees_the_images_of_a_subclass(teacher: VisionTransformer) -> None:
    class Dark(Fourier):
        def images(self, parameters: Tensor) -> Tensor:
            return super().images(parameters) - 1

    state = start(make(teacher, parametrization=Dark(), objectives=ENTROPY, schedule=Dense()))
    logits = teacher(state.images())
    state.shift, state.flip = torch.zeros_like(state.shift), torch.zeros_like(state.flip)
    state.step()
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 4]))
    assert state.history(1)["cross_entropy"] == pytest.approx([entropy.item()], rel=1e-9)


def test_a_field_of_the_wrong_size_is_refused(teacher: VisionTransformer) -> None:
    class Small(Fourier):
        def field(self, parameters: Tensor) -> Tensor:
            return super().field(parameters)[..., :-8]

    with pytest.raises(ValueError, match=r"expected images of Small .* got .* \[2, 3, 32, 40\]"):
        start(make(teacher, parametrization=Small()))


def test_a_class_of_ones_own_has_a_start_and_a_field() -> None:
    class Startless(SigmoidParametrization):
        def field(self, parameters: Tensor) -> Tensor:
            return parameters

    with pytest.raises(TypeError, match="abstract"):
        Startless()


@pytest.mark.usefixtures("each_backend")
def test_a_teacher_sees_a_field_as_its_images(teacher: VisionTransformer) -> None:
    sparse, kept = SparseViT(teacher), torch.tensor([[0, 5, 9], [23, 2, 8]])
    frozen = torch.rand(2, *sparse.grid) < 0.5
    field, background = 3 * random_images(teacher).double(), random_images(teacher).double()
    images = SigmoidImages(field=field, space=space(32, 48)).over(background, frozen)
    options = {"jitter": ((3, -5), True), "importance": True, "taps": ("block.0.tokens",)}
    ours, theirs = (sparse(shown, kept, **options) for shown in (images, images.tensor()))
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.importance, theirs.importance)
    torch.testing.assert_close(ours.taps, theirs.taps)
    whole = sparse(images)
    torch.testing.assert_close(whole.logits, teacher(images.tensor()))


def test_frozen_patches_of_whole_images_show_the_background() -> None:
    one = torch.ones(3, dtype=torch.float64)
    field = torch.zeros(1, 3, 4, 8, dtype=torch.float64)
    images = SigmoidImages(field=field, space=ImageSpace(3, 4, 8, 0.25 * one, one))
    assert torch.equal(images.tensor(), torch.full_like(field, 0.25))
    background, frozen = torch.full_like(field, 7), torch.tensor([[[True, False]]])
    shown = images.over(background, frozen).tensor()
    assert (shown[..., :4] == 7).all() and (shown[..., 4:] == 0.25).all()
