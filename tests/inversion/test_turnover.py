"""Images that leave a batch when they are finished, and others that take their places."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    Dense,
    EarlyFinish,
    Fourier,
    GaussianSimilarity,
    InversionResult,
    Jitter,
    L2Norm,
    MassSchedule,
    NonFiniteLoss,
    Objective,
    PatchRebirth,
    Pixels,
    ResolutionSchedule,
    SparseInverter,
    SparseViT,
    TotalVariation,
)
from smi_fast.augmentations import GaussianNoise
from smi_fast.objectives import LossInputs
from tests.helpers.inversions import STOPS, denormalized, make

T = 10
LABELS = [1, 4, 2, 0, 3]
NEVER = EarlyFinish(1.0, iterations=10**6)
TERMS = (CrossEntropy(), TotalVariation(1e-4), L2Norm(1e-3))
OWN_JITTER = Jitter(share=0.125, per_image=True)
RUNS = {
    "pixels": {"schedule": STOPS},
    "fourier": {"schedule": STOPS, "parametrization": Fourier()},
    "regularized": {"schedule": STOPS, "background": "regularized"},
    "dense": {"schedule": Dense(), "parametrization": Fourier()},
    "ragged": {"schedule": MassSchedule(0.6, at=(3,))},
    "ragged fourier": {"schedule": MassSchedule(0.6, at=(3,)), "parametrization": Fourier()},
    "copies": {"schedule": STOPS, "copies": 2},
    "jitter of the batch": {"schedule": STOPS, "jitter": Jitter(share=0.125)},
    "adamw": {
        "schedule": STOPS,
        "optimizer": "adamw",
        "lr": tuple(0.1 + 0.02 * t for t in range(T)),
    },
}


def made(teacher: VisionTransformer, **options: object) -> SparseInverter:
    return make(teacher, **{"objectives": TERMS, "jitter": OWN_JITTER, **options})


def inverted(inverter: SparseInverter, **options: object) -> InversionResult:
    generator = torch.Generator().manual_seed(0)
    return inverter.invert(LABELS, generator=generator, progress=False, **options)


class Watched:
    """A run without turnover: images, kept patches and probabilities after each iteration."""

    def __init__(self, teacher: VisionTransformer, **options: object) -> None:
        passes: list[Tensor] = []

        class Watch(Objective):
            name, weight, separable = "watch", 1.0, True

            def __call__(self, inputs: LossInputs) -> Tensor:
                labels = inputs.targets[:, None]
                passes.append(inputs.logits.detach().softmax(1).gather(1, labels)[:, 0])
                return inputs.logits.new_zeros(())

        self.images: list[Tensor] = []
        self.result = inverted(
            made(teacher, **{"objectives": (*TERMS, Watch()), **options}),
            callback=lambda _, images, kept: self.images.append(denormalized(images)),
        )
        copies = int(options.get("copies", 1))
        self.confidence = torch.stack(passes).unflatten(0, (T, copies)).mean(1)

    def ages(self, finish: EarlyFinish, last: int) -> list[int]:
        """When each image is finished, counted from the last stop."""
        found = []
        for column in (self.confidence[last:] >= finish.confidence).T.tolist():
            done, age = T, last
            for sure, run in groupby(column):
                length = len([*run])
                if sure and length >= finish.iterations:
                    done = age + finish.iterations
                    break
                age += length
            found.append(done)
        return found


@pytest.mark.parametrize("most", [None, 2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_images_that_never_finish_are_those_of_a_plain_run(
    teacher: VisionTransformer, name: str, most: int | None
) -> None:
    plain = inverted(made(teacher, **RUNS[name]))
    result = inverted(made(teacher, **RUNS[name], finish=NEVER, max_batch=most))
    torch.testing.assert_close(result.images, plain.images, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.logits, plain.logits, rtol=1e-8, atol=1e-8)
    assert torch.equal(result.masks, plain.masks)
    assert result.ages.tolist() == [T] * 5 and result.iterations == T
    assert not result.interrupted


@pytest.mark.parametrize("most", [None, 2, 3, 4])
@pytest.mark.parametrize("name", RUNS)
def test_a_finished_image_is_that_of_a_plain_run_at_its_age(
    teacher: VisionTransformer, name: str, most: int | None
) -> None:
    watched, last = Watched(teacher, **RUNS[name]), max(RUNS[name]["schedule"].at, default=0)
    # A bound that some images reach early, and some never do.
    twice = torch.minimum(watched.confidence[last:-1], watched.confidence[last + 1 :])
    bound = float(twice.amax(0).median()) * (1 - 1e-6)
    finish = EarlyFinish(bound, iterations=2)
    ages = watched.ages(finish, last)
    assert len(set(ages)) > 1, ages
    result = inverted(made(teacher, **RUNS[name], finish=finish, max_batch=most))
    assert result.ages.tolist() == ages
    for image, age in enumerate(ages):
        expected = watched.images[age - 1][image]
        torch.testing.assert_close(result.images[image], expected, rtol=0, atol=1e-9)
    assert torch.equal(result.masks, watched.result.masks)
    sparse, space = SparseViT(teacher), made(teacher).settings.space
    for i, length in enumerate(result.masks.sum((1, 2)).tolist()):
        row = slice(i, i + 1)
        alone = sparse(space.normalize(result.images[row]), result.kept[row, :length]).logits
        torch.testing.assert_close(result.logits[row], alone, rtol=1e-9, atol=1e-9)


class Sizes(Objective):
    """Notes the images of each pass of the teacher; presses Ctrl-C, or is NaN, at one of them."""

    name, weight, separable = "sizes", 1.0, True

    def __init__(self, stop: int | None = None, nan: int | None = None) -> None:
        self.seen: list[list[int]] = []
        self.stop, self.nan = stop, nan

    def __call__(self, inputs: LossInputs) -> Tensor:
        every = torch.arange(len(LABELS))
        self.seen.append(inputs.rows_of(every).tolist())
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        return inputs.logits.sum() * (float("nan") if len(self.seen) == self.nan else 0.0)


def test_places_are_taken_in_order(teacher: VisionTransformer) -> None:
    sizes = Sizes()
    inverter = made(
        teacher,
        schedule=STOPS,
        objectives=(*TERMS, sizes),
        finish=EarlyFinish(1e-9, 2),
        max_batch=3,
    )
    result = inverted(inverter)
    # All are finished two iterations behind the last stop: first three images, then two.
    assert result.ages.tolist() == [8] * 5
    assert sizes.seen == [[0, 1, 2]] * 8 + [[3, 4]] * 8
    assert [(phase.patches, phase.iterations) for phase in result.timing] == [
        (24, 6), (12, 6), (6, 4)
    ]  # fmt: skip
    assert all(phase.seconds > 0 for phase in result.timing)
    assert len(result.history["cross_entropy"]) == 8
    assert result.sparse_images().age.tolist() == [8] * 5


@pytest.mark.parametrize("places", [2, 3])
def test_images_begin_when_half_of_the_places_are_free(
    teacher: VisionTransformer, places: int
) -> None:
    watched, sizes = Watched(teacher, schedule=Dense()), Sizes()
    # One image is finished first, alone. Its place is half of two, and less than half of three.
    first = watched.confidence[:, :places].cummax(0).values
    at, image = next(
        (t, int(row.argmax())) for t, row in enumerate(first) if row.max() > first[0].max()
    )
    finish = EarlyFinish(float(first[at, image]) * (1 - 1e-6), 1)
    terms = (*TERMS, sizes)
    inverter = made(teacher, schedule=Dense(), objectives=terms, finish=finish, max_batch=places)
    inverted(inverter)
    assert sizes.seen[at] == list(range(places))
    stayed = [i for i in range(places) if i != image]
    assert sizes.seen[at + 1] == [*stayed, *([2] if places == 2 else [])]


def test_an_interrupted_batch_has_all_images(teacher: VisionTransformer) -> None:
    inverter = made(
        teacher,
        schedule=STOPS,
        objectives=(*TERMS, Sizes(stop=9)),
        finish=NEVER,
        max_batch=3,
    )
    generator = torch.Generator().manual_seed(0)
    first = inverter.start(LABELS, generator=generator).images()
    result = inverted(inverter)
    assert result.interrupted and result.ages.tolist() == [8, 8, 8, 0, 0]
    first = inverter.settings.space.denormalize(first)
    torch.testing.assert_close(result.images[3:], first[3:])
    assert result.masks.sum((1, 2)).tolist() == [6, 6, 6, 24, 24]
    assert result.lengths is not None and result.lengths.tolist() == [6, 6, 6, 24, 24]
    assert result.logits.isfinite().all() and result.over("mean").shape == result.images.shape


def test_an_image_that_begins_can_be_interrupted(teacher: VisionTransformer) -> None:
    sizes = Sizes(stop=10)
    inverter = made(
        teacher,
        schedule=STOPS,
        objectives=(*TERMS, sizes),
        finish=EarlyFinish(1e-9, 2),
        max_batch=3,
    )
    result = inverted(inverter)
    assert result.interrupted and result.ages.tolist() == [8, 8, 8, 1, 1]
    assert result.masks.sum((1, 2)).tolist() == [6, 6, 6, 24, 24]


@pytest.mark.parametrize("at", [2, 8, 9, 12, 15])
def test_a_value_that_is_not_finite_keeps_the_images(teacher: VisionTransformer, at: int) -> None:
    inverter = made(
        teacher,
        schedule=STOPS,
        objectives=(*TERMS, Sizes(nan=at)),
        finish=EarlyFinish(1e-9, 2),
        max_batch=3,
    )
    with pytest.raises(NonFiniteLoss, match="sizes is not finite at iteration") as caught:
        inverted(inverter)
    result = caught.value.result
    assert result.images.isfinite().all() and len(result.images) == 5
    assert caught.value.iteration == max(result.ages.tolist())


def test_an_empty_batch_stays_empty(teacher: VisionTransformer) -> None:
    result = made(teacher, finish=NEVER).invert(torch.zeros(0).long(), progress=False)
    assert result.images.shape == (0, 3, 32, 48) and result.ages.shape == (0,)


def test_probabilities_are_targets_too(teacher: VisionTransformer) -> None:
    classes = SparseViT(teacher).num_classes
    soft = torch.full((2, classes), 0.1 / (classes - 1)).double()
    soft[0, 3] = soft[1, 0] = 0.9
    result = made(teacher, finish=EarlyFinish(1e-9, 1)).invert(soft, progress=False)
    assert result.ages.tolist() == [7, 7]


class Every(CrossEntropy):
    every = 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schedule": PatchRebirth(2)}, "PatchRebirth"),
        ({"schedule": ResolutionSchedule((16, 32), at=(3,))}, "ResolutionSchedule"),
        ({"objectives": (CrossEntropy(), TotalVariation(per_image=False))}, "total_variation"),
        ({"objectives": (Every(),)}, "cross_entropy"),
        ({"objectives": (CrossEntropy(), GaussianSimilarity())}, "gaussian_similarity"),
        ({"objectives": (lambda images, logits: logits.sum(),)}, "<lambda>"),
        ({"augment": GaussianNoise(0.1)}, "augment GaussianNoise"),
    ],
)
def test_what_ties_images_together_is_refused(
    teacher: VisionTransformer, options: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=f"all iterations alike, with finish, got.*{named}"):
        made(teacher, **options, finish=NEVER)


def test_mistakes_are_named(teacher: VisionTransformer) -> None:
    for confidence in (0, 1.5, "high"):
        with pytest.raises(ValueError, match="expected a confidence in"):
            EarlyFinish(confidence)  # type: ignore[arg-type]
    for iterations in (0, 2.5):
        with pytest.raises(ValueError, match="expected 1 or more iterations in a row"):
            EarlyFinish(0.9, iterations)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected finish as EarlyFinish"):
        made(teacher, finish=0.9)
    inverter = made(teacher, finish=NEVER)
    with pytest.raises(ValueError, match="expected no callback with finish"):
        inverter.invert(LABELS, progress=False, callback=lambda *_: None)
    with pytest.raises(ValueError, match="expected targets that are classes or probabilities"):
        made(teacher, objectives=(L2Norm(1e-3),), finish=NEVER).invert(batch=2, progress=False)


def test_an_undeclared_read_of_the_iteration_is_named(teacher: VisionTransformer) -> None:
    class Reads(Objective):
        name, weight, separable = "reads", 1.0, True

        def __call__(self, inputs: LossInputs) -> Tensor:
            return inputs.logits.sum() * float(inputs.iteration_tensor)

    inverted(made(teacher, objectives=(Reads(),)))
    with pytest.raises(RuntimeError, match="an objective read the iteration"):
        inverted(made(teacher, objectives=(Reads(),), finish=NEVER))


def test_progress_counts_images(
    teacher: VisionTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    made(teacher, finish=NEVER).invert(LABELS)
    assert "finished 5 of 5 images in" in capsys.readouterr().err


def test_pixels_alone_move_where_patches_are_kept(teacher: VisionTransformer) -> None:
    """The background of an image stays as it was at its own last stop."""
    options = {"schedule": STOPS, "parametrization": Pixels()}
    watched = Watched(teacher, **options)
    result = inverted(made(teacher, **options, finish=EarlyFinish(1e-9, 1), max_batch=2))
    outside = ~result.masks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(
        -1, 3, -1, -1
    )
    torch.testing.assert_close(
        result.images[outside], watched.images[-1][outside], rtol=0, atol=1e-9
    )
