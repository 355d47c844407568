"""Copies of an image, and batches in parts: each equals what it stands for, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import (
    AdversarialJS,
    AttentionPrior,
    BinaryCrossEntropy,
    CrossEntropy,
    Dense,
    GaussianSimilarity,
    HeadSimilarity,
    InversionResult,
    Jitter,
    L2Norm,
    NonFiniteLoss,
    Objective,
    PatchSeamTV,
    TotalVariation,
    UserTerm,
)
from smi_fast.augmentations import ColourShift, GaussianNoise, LowPass
from smi_fast.inversion import InversionState
from smi_fast.inversion.views import parts
from tests.helpers.host_guard import HostGuard
from tests.helpers.inversions import make

F64 = torch.float64
LABELS = [1, 4, 0, 2, 3]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inverted(teacher: VisionTransformer, **options: object) -> InversionResult:
    wanted = options.pop("targets", LABELS)
    return make(teacher, **options).invert(wanted, generator=seeded(), progress=False)


def separable() -> list[Objective]:
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 5, dtype=F64)).eval()
    return [
        CrossEntropy(),
        TotalVariation(0.1),
        TotalVariation(0.1, "l1"),
        L2Norm(0.1),
        GaussianSimilarity(rows=3),
        HeadSimilarity(),
        AttentionPrior(),
        AdversarialJS(student, bounded=False),
    ]


@pytest.mark.parametrize("background", ["frozen", "regularized"])
@pytest.mark.parametrize("augment", [None, GaussianNoise(0.3), LowPass(1.0)])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_split_batch_is_the_whole_one(
    teacher: VisionTransformer, background: str, augment: Callable | None, most: int
) -> None:
    torch.manual_seed(3)
    options = {
        "objectives": separable(),
        "background": background,
        "augment": augment,
        "jitter": Jitter(per_image=True),
        "final_mask": "reranked",
        "lr": 0.01,
    }
    whole, split = (inverted(teacher, **options, max_batch=m) for m in (None, most))
    assert torch.equal(whole.kept, split.kept) and torch.equal(whole.masks, split.masks)
    torch.testing.assert_close(split.images, whole.images, rtol=0, atol=1e-9)
    torch.testing.assert_close(split.logits, whole.logits, rtol=0, atol=1e-7)
    for name, values in whole.history.items():
        torch.testing.assert_close(
            torch.tensor(split.history[name]), torch.tensor(values), rtol=1e-6, atol=1e-9
        )


def test_probabilities_are_split_with_their_images(teacher: VisionTransformer) -> None:
    wanted = torch.rand(5, 5, generator=seeded(), dtype=F64)
    options = {"objectives": [BinaryCrossEntropy()], "targets": wanted, "lr": 0.01}
    whole, split = (inverted(teacher, **options, max_batch=m) for m in (None, 2))
    torch.testing.assert_close(split.images, whole.images, rtol=0, atol=1e-9)


def test_parts_are_few_and_of_equal_size() -> None:
    sizes = [[s.stop - s.start for s in parts(20, most)] for most in (None, 20, 8, 7, 1)]
    assert sizes == [[20], [20], [6, 7, 7], [6, 7, 7], [1] * 20]
    assert parts(0, 3) == [slice(0, 0)] and parts(5, 4) == [slice(0, 2), slice(2, 5)]


@pytest.mark.parametrize(
    "objective",
    [
        TotalVariation(per_image=False),
        L2Norm(per_image=False),
        PatchSeamTV(),
        AdversarialJS(nn.Identity()),
        UserTerm(lambda images, logits: logits.mean(), "own"),
    ],
)
def test_what_couples_images_is_not_split(teacher: VisionTransformer, objective: Objective) -> None:
    message = f"of each image alone with max_batch, got {objective.name}, which may couple"
    with pytest.raises(ValueError, match=message):
        make(teacher, objectives=[CrossEntropy(), objective], max_batch=4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("sparse", [False, True])
def test_variation_of_each_image_is_that_of_its_own_inversion(
    teacher: VisionTransformer, norm: str, sparse: bool
) -> None:
    init = torch.randn(3, 3, 32, 48, dtype=F64)
    inverter = make(teacher, objectives=[TotalVariation(1.0, norm)], schedule=Dense())

    def evaluated(images: Tensor) -> tuple[Tensor, float]:
        state = inverter.start(batch=len(images), init=images)
        if sparse:
            state.kept = state.kept[:, 4:11]
        gradient = state.evaluate().parameters
        return gradient, float(state.record[0, 0])

    gradient, value = evaluated(init)
    alone = [evaluated(init[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(gradient * 3, torch.cat([each[0] for each in alone]))
    assert value == pytest.approx(sum(each[1] for each in alone) / 3, rel=1e-9)


@pytest.mark.parametrize("per_image", [False, True])
def test_copies_are_the_mean_of_inversions_with_their_jitter(
    teacher: VisionTransformer, per_image: bool
) -> None:
    jitter = Jitter(share=0.5, per_image=per_image)
    shift, flip = jitter.draw(10, (32, 48), batch=5, copies=3, generator=seeded(1))
    assert shift.shape == ((10, 3, 5, 2) if per_image else (10, 3, 2))
    init = torch.randn(5, 3, 32, 48, dtype=F64)
    objectives = [CrossEntropy(2.0), TotalVariation(0.1)]

    def start(copies: int, table: tuple[Tensor, Tensor]) -> InversionState:
        inverter = make(teacher, objectives=objectives, copies=copies)
        return inverter.start(LABELS, init, table)

    state = start(3, (shift, flip))
    gradient, importance, _ = state.evaluate(score=True)
    alone = [start(1, (shift[:, i], flip[:, i])) for i in range(3)]
    found = [each.evaluate(score=True) for each in alone]
    torch.testing.assert_close(gradient, sum(each[0] for each in found) / 3)
    torch.testing.assert_close(importance, sum(each[1] for each in found) / 3)
    torch.testing.assert_close(state.record[0], sum(each.record[0] for each in alone) / 3)


def test_copies_have_draws_of_their_own(teacher: VisionTransformer) -> None:
    seen: list[Tensor] = []

    def augment(images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(GaussianNoise(0.5)(images, progress, generator).detach())
        return images * 1

    options = {"augment": augment, "copies": 2, "iterations": 7, "jitter": Jitter(per_image=True)}
    inverted(teacher, **options)
    assert len(seen) == 1 + 2 * 7  # and once at the start, as a trial
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    state = make(teacher, **options).start(LABELS, generator=seeded())
    assert not torch.equal(state.shift[:, 0], state.shift[:, 1])


def test_one_copy_of_an_augmentation_without_effect_changes_nothing(
    teacher: VisionTransformer,
) -> None:
    plain, still = (
        inverted(teacher, augment=augment) for augment in (None, GaussianNoise(0.0, 0.0))
    )
    assert torch.equal(plain.images, still.images) and plain.history == still.history


def test_augment_is_differentiated(teacher: VisionTransformer) -> None:
    def doubled(images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
        return 2 * images

    init = torch.randn(5, 3, 32, 48, dtype=F64)
    given = {"objectives": [CrossEntropy()], "schedule": Dense()}
    jitter = Jitter(share=0, flip=False)
    augmented, plain = (
        make(teacher, **given, jitter=jitter, augment=f).start(LABELS, x).evaluate().parameters
        for f, x in ((doubled, init), (None, 2 * init))
    )
    torch.testing.assert_close(augmented, 2 * plain)


@pytest.mark.parametrize("augment", [GaussianNoise(), ColourShift(), LowPass()])
def test_an_augmented_inversion_is_reproducible_and_reads_nothing_on_the_host(
    teacher: VisionTransformer, augment: Callable
) -> None:
    options = {"augment": augment, "copies": 2, "max_batch": 3, "objectives": [CrossEntropy()]}
    one, other = (inverted(teacher, **options) for _ in range(2))
    assert torch.equal(one.images, other.images)
    assert not torch.equal(one.images, inverted(teacher, objectives=[CrossEntropy()]).images)
    state = make(teacher, **options).start(LABELS, generator=seeded())
    before = state.images().clone()
    with HostGuard():
        state.step()
        state.step(score=True)
    assert not torch.equal(state.images(), before)


def test_captured_augmentation_gives_the_same_bytes(
    teacher: VisionTransformer, request: pytest.FixtureRequest
) -> None:
    checked = inverted(teacher, augment=GaussianNoise(), copies=2)
    request.getfixturevalue("replays")
    captured = inverted(teacher, augment=GaussianNoise(), copies=2)
    assert torch.equal(captured.images, checked.images) and captured.history == checked.history


def test_going_back_also_takes_back_what_was_drawn(teacher: VisionTransformer) -> None:
    state = make(teacher, augment=GaussianNoise()).start(LABELS, generator=seeded())
    saved = state.save()
    state.step()
    once = state.images().clone()
    state.restore(saved)
    state.step()
    assert torch.equal(state.images(), once)


def test_a_seed_without_augment_draws_what_it_drew_before(teacher: VisionTransformer) -> None:
    generator = seeded()
    make(teacher).start(LABELS, generator=generator)
    left = generator.get_state()
    generator.manual_seed(0)
    make(teacher, copies=1, max_batch=None).start(LABELS, generator=generator)
    assert torch.equal(generator.get_state(), left)


class Late:
    """Returns what isn't finite from an iteration on."""

    def __call__(self, images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.where(progress > 0.45, torch.nan, 0.0)


@pytest.mark.parametrize("captured", [False, True])
def test_an_augmentation_that_returns_nan_later_is_named(
    teacher: VisionTransformer, request: pytest.FixtureRequest, captured: bool
) -> None:
    if captured:
        request.getfixturevalue("replays")
    with pytest.raises(NonFiniteLoss, match="augment Late is not finite at iteration 5") as caught:
        inverted(teacher, augment=Late())
    assert caught.value.result.images.isfinite().all()
    assert list(caught.value.result.history) == ["cross_entropy", "total_variation"]


def no_gradient(images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
    return images.detach()


@torch.no_grad()
def hidden(images: Tensor, progress: Tensor, generator: torch.Generator) -> Tensor:
    return images.mul_(0.9)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda x, *_: x[:, :, 1:], r"<lambda> to keep the shape \[5, 3, 32, 48\] of images, got"),
        (lambda x, *_: x.float(), "keep the dtype torch.float64 of images, got torch.float32"),
        (lambda x, *_: x.to("meta"), "keep the device cpu of images, got meta"),
        (lambda x, *_: x * torch.nan, "augment <lambda> to return finite images, got NaN or inf"),
        (lambda x, *_: None, "augment <lambda> to return a tensor, got NoneType"),
        (lambda x, *_: x.mul_(0.9), "augment <lambda> to return new images, it changed the given"),
        (hidden, "augment hidden to return new images, it changed the given ones"),
        (no_gradient, "augment no_gradient to be differentiable, its gradient was cut off"),
    ],
)
def test_augmentations_that_cannot_work_are_refused_at_the_start(
    teacher: VisionTransformer, augment: Callable, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, augment=augment).start(LABELS)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"augment": 0.1}, TypeError, r"augment as a function .* GaussianNoise\(\), got 0.1"),
        ({"augment": GaussianNoise}, TypeError, "augment as a function .* got <class"),
        ({"copies": 0}, ValueError, "1 or more copies, got 0"),
        ({"copies": 1.5}, ValueError, "1 or more copies, got 1.5"),
        ({"max_batch": 0}, ValueError, "max_batch of 1 or more images, got 0"),
    ],
)
def test_bad_views_are_refused(
    teacher: VisionTransformer, options: dict, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(teacher, **{"objectives": [CrossEntropy()], **options})


def test_tables_of_copies_need_their_axis(teacher: VisionTransformer) -> None:
    inverter = make(teacher, copies=2)
    table = torch.zeros(10, 2).long(), torch.zeros(10) > 0
    with pytest.raises(ValueError, match=r"shift int64 \[10, 2, 2\] or \[10, 2, 5, 2\], got"):
        inverter.invert(LABELS, jitter=table, progress=False)
