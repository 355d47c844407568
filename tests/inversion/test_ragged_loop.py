"""Ragged keeping in a run: each image is as if it were inverted alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    Fourier,
    L2Norm,
    MassSchedule,
    Parametrization,
    Pixels,
    Selection,
    SparseViT,
    Stop,
    TotalVariation,
)
from smi_fast.importance import ScoreInputs
from smi_fast.inversion import InversionResult
from smi_fast.ops.grid import patch_mask
from smi_fast.teacher.ragged import RaggedRows
from tests.helpers.inversions import denormalized, frames, make, pixels_of, run

T = 10
TARGETS = [1, 4, 2]
SCHEDULE = MassSchedule(0.6, at=(3, 6))


@dataclass
class Given:
    """Keeps given sets of one image."""

    at: tuple[int, ...]
    sets: list[Tensor]

    def counts(self, patches: int) -> tuple[int, ...]:
        return tuple(len(kept) for kept in self.sets)

    def select(self, stop: Stop) -> Selection:
        return Selection(self.sets[self.at.index(stop.iteration)][None])


def peaked(inputs: ScoreInputs) -> Tensor:
    """Importance that lies in few patches, in some images in fewer."""
    exponents = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)
    return inputs.attention ** exponents[: len(inputs.kept), None]


def objectives(weight: float) -> tuple:
    """A mean over three images is a third of an image's own: weights make up for it."""
    terms = (TotalVariation(1e-3), TotalVariation(1e-3, "l1"), L2Norm(1e-3))
    for term in terms:
        object.__setattr__(term, "weight", weight * term.weight)
    return (CrossEntropy(weight), *terms)


def both(
    teacher: VisionTransformer, **options: object
) -> tuple[InversionResult, list[InversionResult], list[Tensor]]:
    """A ragged run, the runs of its images alone, and the patches kept after each iteration."""
    first = torch.rand(3, 3, 32, 48, dtype=torch.float64)
    shift, flip = torch.randint(-4, 5, (T, 3, 2)), torch.rand(T, 3) < 0.5
    kept: list[Tensor] = []
    options["importance"] = peaked
    inverter = make(teacher, schedule=SCHEDULE, objectives=objectives(3.0), **options)
    result = inverter.invert(
        TARGETS,
        init=first,
        jitter=(shift, flip),
        progress=False,
        callback=lambda _, images, patches: kept.append(patches),
    )
    lengths = [LENGTHS_AT[stop] for stop in SCHEDULE.at]
    alone = []
    for i, label in enumerate(TARGETS):
        sets = [kept[at][i, : found[i]] for at, found in zip(SCHEDULE.at, lengths, strict=True)]
        single = make(
            teacher, schedule=Given(SCHEDULE.at, sets), objectives=objectives(1.0), **options
        )
        own = {"init": first[i : i + 1], "jitter": (shift[:, i : i + 1], flip[:, i : i + 1])}
        alone.append(single.invert([label], progress=False, **own))
    return result, alone, kept


LENGTHS_AT: dict[int, Tensor] = {}


@pytest.fixture(autouse=True)
def _lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes the lengths of each stop."""
    LENGTHS_AT.clear()
    select = MassSchedule.select

    def noted(self: MassSchedule, stop: Stop) -> Selection:
        found = select(self, stop)
        LENGTHS_AT[stop.iteration] = found.lengths
        return found

    monkeypatch.setattr(MassSchedule, "select", noted)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("parametrization", [Pixels(), Fourier()])
def test_each_image_is_as_if_it_were_alone(
    teacher: VisionTransformer, parametrization: Parametrization
) -> None:
    result, alone, _ = both(teacher, parametrization=parametrization)
    assert len(set(result.lengths.tolist())) > 1 and result.lengths.max() < 16
    for i, own in enumerate(alone):
        length = int(result.lengths[i])
        assert torch.equal(result.kept[i, :length], own.kept[0])
        torch.testing.assert_close(result.images[i], own.images[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(result.logits[i], own.logits[0], rtol=0, atol=1e-9)
        assert torch.equal(result.masks[i], own.masks[0])
    for name, values in result.history.items():
        means = torch.tensor([own.history[name] for own in alone]).mean(0)
        torch.testing.assert_close(torch.tensor(values), means, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("parametrization", [Pixels(), Fourier()])
def test_only_the_patches_that_count_move(
    teacher: VisionTransformer, parametrization: Parametrization
) -> None:
    options = {
        "schedule": MassSchedule(0.4, at=(3,)),
        "parametrization": parametrization,
        "importance": peaked,
    }
    images, kept = frames(make(teacher, **options))
    result = run(teacher, **options)
    assert torch.equal(result.kept, kept[-1]) and kept[-1].shape[1] == result.lengths.max()
    assert result.lengths[0] != result.lengths[1]
    for i, length in enumerate(result.lengths.tolist()):
        moved = (images[-1][i] - images[2][i]).abs() > 1e-9
        inside = pixels_of(kept[-1][i : i + 1, :length])[0]
        assert not moved[~inside].any() and moved[inside].double().mean() > 0.9
    assert torch.equal(result.masks, patch_mask(result.kept, 4, 6, result.lengths))
    assert (result.masks.sum((1, 2)) == result.lengths).all()
    torch.testing.assert_close(result.images, denormalized(images[-1]).clamp(0, 1))
    # The patches that hold 40 % of the importance before the last update in front of the stop.
    attention = SparseViT(teacher)(images[1], importance=True).importance
    scored = attention ** torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    for row, mask in zip(scored, result.masks, strict=True):
        share = row[mask.flatten()].sum() / row.sum()
        assert share >= 0.4 > share - row[mask.flatten()].min() / row.sum()


def test_parts_give_the_images_of_the_whole_batch(teacher: VisionTransformer) -> None:
    options = {"schedule": SCHEDULE, "objectives": (CrossEntropy(), TotalVariation())}
    whole, parts = run(teacher, **options), run(teacher, **options, max_batch=1)
    assert torch.equal(whole.lengths, parts.lengths)
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=1e-9)


def test_a_captured_loop_with_padded_rows_is_the_same(
    teacher: VisionTransformer, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where rows are padded and lengths are not read by the host."""
    of = RaggedRows.of

    def padded(lengths: Tensor, tokens: int, *, packed: bool) -> RaggedRows:
        return of(lengths, tokens, packed=False)

    with monkeypatch.context() as patch:
        patch.setattr(RaggedRows, "of", padded)
        patch.setattr("smi_fast.teacher.sparse_vit.check_lengths", lambda *_: None)
        captured = run(teacher, schedule=SCHEDULE, objectives=objectives(1.0))
    assert replays
    monkeypatch.setattr("smi_fast.inversion.loop.Loop._can_capture", lambda self: False)
    whole = run(teacher, schedule=SCHEDULE, objectives=objectives(1.0))
    assert torch.equal(captured.lengths, whole.lengths)
    torch.testing.assert_close(captured.images, whole.images, rtol=0, atol=1e-9)
    torch.testing.assert_close(captured.logits, whole.logits, rtol=0, atol=1e-9)


def test_an_iteration_without_logits(teacher: VisionTransformer) -> None:
    every = CrossEntropy()
    object.__setattr__(every, "every", 3)
    result = run(teacher, schedule=SCHEDULE, objectives=[every, TotalVariation()])
    assert result.lengths is not None and result.images.isfinite().all()


def test_an_empty_batch(teacher: VisionTransformer) -> None:
    inverter = make(teacher, schedule=SCHEDULE, objectives=[TotalVariation(per_image=False)])
    result = inverter.invert(batch=0, progress=False)
    assert len(result.images) == len(result.lengths) == 0


def test_the_background_may_go_on(teacher: VisionTransformer) -> None:
    options = {"schedule": MassSchedule(0.4, at=(3,)), "background": "regularized"}
    images, _ = frames(make(teacher, **options))
    result = run(teacher, **options)
    assert (
        result.lengths.max() < 24 and ((images[-1] - images[2]).abs() > 1e-9).double().mean() > 0.9
    )


def test_sparse_images_of_one_size_are_refused(teacher: VisionTransformer) -> None:
    result = run(teacher, schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"expected as many patches in each image, got \[\d+, \d"):
        result.sparse_images()
    assert result.over("mean").shape == result.images.shape
