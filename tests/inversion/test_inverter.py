"""The loop: what it computes, what it promises about the background, and how it ends."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import smi_fast
from smi_fast import (
    CrossEntropy,
    Dense,
    Jitter,
    L2Norm,
    NonFiniteLoss,
    SparseInverter,
    SparseViT,
    TotalVariation,
)
from smi_fast.schedules import still_iterations
from tests.helpers.inversions import (
    PUBLISHED,
    SPACE,
    STOPS,
    TARGETS,
    denormalized,
    frames,
    make,
    pixels_of,
    run,
    start,
)


def test_dense_run_is_the_plain_loop(teacher: VisionTransformer) -> None:
    inverter = make(
        teacher,
        schedule=Dense(),
        objectives=[CrossEntropy(2.0), TotalVariation(0.1, per_image=False)],
    )
    init = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    shift, flip = torch.randint(-9, 10, (10, 2)), torch.rand(10) < 0.5
    result = inverter.invert(TARGETS, init=init, jitter=(shift, flip), progress=False)

    mean, std = (torch.tensor(SPACE[k], dtype=torch.float64)[:, None, None] for k in SPACE)
    pixels = init.clone().requires_grad_()
    adam = torch.optim.Adam([pixels], 0.25, (0.5, 0.99))
    for t in range(10):
        jittered = pixels.roll(tuple(shift[t].tolist()), (2, 3))
        jittered = jittered.flip(3) if flip[t] else jittered
        entropy = F.cross_entropy(teacher(jittered), torch.tensor(TARGETS))
        rows, columns = pixels.diff(dim=2), pixels.diff(dim=3)
        diagonals = (
            pixels[..., 1:, 1:] - pixels[..., :-1, :-1],
            pixels[..., 1:, :-1] - pixels[..., :-1, 1:],
        )
        variation = sum(map(torch.norm, (rows, columns, *diagonals)))
        assert result.history["cross_entropy"][t] == pytest.approx(entropy.item(), abs=1e-10)
        assert result.history["total_variation"][t] == pytest.approx(variation.item(), abs=1e-9)
        adam.zero_grad()
        (2 * entropy + 0.1 * variation).backward()
        adam.step()
        with torch.no_grad():
            pixels.clamp_(-mean / std, (1 - mean) / std)
    torch.testing.assert_close(result.images, pixels.detach() * std + mean)


def test_stops_keep_the_most_important_patches(teacher: VisionTransformer) -> None:
    pixels, kept = frames(make(teacher))
    assert [k.shape[1] for k in kept] == [24] * 3 + [12] * 3 + [6] * 4
    sparse = SparseViT(teacher)
    for stop in (3, 6):
        # The pixels before iteration t - 1 are those after iteration t - 2.
        before = sparse(pixels[stop - 2], kept[stop - 1], importance=True).importance
        top = before.topk(kept[stop].shape[1]).indices
        assert torch.equal(kept[stop], kept[stop - 1].gather(1, top).sort().values)


def test_frozen_background_does_not_change(teacher: VisionTransformer) -> None:
    pixels, kept = frames(make(teacher))
    for t in range(1, 10):
        mask = pixels_of(kept[t])
        assert torch.equal(pixels[t][~mask], pixels[t - 1][~mask])
        assert (pixels[t][mask] != pixels[t - 1][mask]).double().mean() > 0.5


def test_regularized_background_goes_on_changing(teacher: VisionTransformer) -> None:
    pixels, kept = frames(make(teacher, background="regularized"))
    mask = pixels_of(kept[9])
    assert (pixels[9][~mask] != pixels[8][~mask]).double().mean() > 0.5


def test_result_shows_kept_patches_and_is_in_range(teacher: VisionTransformer) -> None:
    result = run(teacher)
    mask = pixels_of(result.kept)
    assert torch.equal(result.masks, mask[:, 0, ::8, ::8])
    assert torch.equal(result.over("black")[mask], result.images[mask])
    assert not result.over("black")[~mask].any()
    assert 0 <= result.images.min() < result.images.max() <= 1
    normalised = (result.images - torch.tensor(SPACE["mean"])[:, None, None].double()) / (
        torch.tensor(SPACE["std"])[:, None, None].double()
    )
    torch.testing.assert_close(result.logits, SparseViT(teacher)(normalised, result.kept).logits)
    assert [(p.patches, p.iterations) for p in result.timing] == [(24, 3), (12, 3), (6, 4)]
    assert (result.iterations, result.interrupted) == (10, False)
    assert {name: len(values) for name, values in result.history.items()} == {
        "cross_entropy": 10,
        "total_variation": 10,
    }


def test_same_seed_same_bytes(teacher: VisionTransformer) -> None:
    first, again, other = run(teacher), run(teacher), run(teacher, seed=1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.kept, again.kept)
    assert not torch.equal(first.images, other.images)


def test_jitter_of_each_image_is_that_of_each_image_alone(teacher: VisionTransformer) -> None:
    jitter = Jitter(share=0.5, per_image=True).draw(10, (32, 48), batch=2)
    init = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    inverter = make(teacher, objectives=[CrossEntropy()], schedule=Dense())
    together = inverter.start(TARGETS, init, jitter).evaluate().parameters
    for i, target in enumerate(TARGETS):
        own = tuple(table[:, i] for table in jitter)
        alone = inverter.start([target], init[i : i + 1], own).evaluate().parameters
        torch.testing.assert_close(together[i] * 2, alone[0], rtol=1e-9, atol=1e-12)


def test_the_option_jitter_draws_the_table(teacher: VisionTransformer) -> None:
    jitter = Jitter(share=(0.5, 0.25, 0.0), flip=False, per_image=True)
    state = start(make(teacher, jitter=jitter))
    assert state.shift.shape == (10, 2, 2) and state.flip.shape == (10, 2)
    assert not state.shift[[2, 3, 5, 6]].any() and not state.flip.any()  # around stops
    assert not state.shift[6:].any() and state.shift[:2].abs().max() > 8
    each = start(make(teacher, jitter=Jitter(per_image=True)))
    assert torch.equal(each.shift, start(make(teacher)).shift)
    assert start(make(teacher, jitter=Jitter())).shift.shape == (10, 2)


def test_no_jitter_around_stops(teacher: VisionTransformer) -> None:
    assert still_iterations(STOPS) == {2, 3, 5, 6}
    still = torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10, dtype=torch.bool)
    around = tuple(table.clone() for table in still)
    for table in around:
        table[[2, 3, 5, 6]] = 1
    before = tuple(table.clone() for table in around)
    last = [frames(make(teacher), jitter=jitter)[0][-1] for jitter in (still, around)]
    assert torch.equal(*last)
    assert all(map(torch.equal, around, before))
    for table in range(2):
        moved = tuple(rows.clone() for rows in still)
        moved[table][4] = 1
        assert not torch.equal(frames(make(teacher), jitter=moved)[0][-1], last[0])


def test_functions_are_terms(teacher: VisionTransformer) -> None:
    def redness(images: Tensor, logits: Tensor) -> Tensor:
        assert images.shape == (2, 3, 32, 48) and logits.shape == (2, 5)
        return -images[:, 0].mean()

    plain = run(teacher, objectives=[CrossEntropy(0.01)], iterations=20)
    red = run(teacher, objectives=[CrossEntropy(0.01), redness], iterations=20)
    assert red.images[:, 0].mean() > plain.images[:, 0].mean() + 0.1
    assert red.history["redness"][-1] < red.history["redness"][0]


def test_soft_targets(teacher: VisionTransformer) -> None:
    inverter = make(teacher)
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    hard = inverter.invert(TARGETS, generator=draw[0], progress=False)
    one_hot = F.one_hot(torch.tensor(TARGETS), 5).double()
    soft = inverter.invert(one_hot, generator=draw[1], progress=False)
    torch.testing.assert_close(soft.images, hard.images)
    torch.testing.assert_close(soft.confidence, hard.confidence)


def test_l2_norm_and_l1_variation_are_recorded(teacher: VisionTransformer) -> None:
    init = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    objectives = [
        CrossEntropy(),
        L2Norm(per_image=False),
        TotalVariation(0.1, "l1", per_image=False),
    ]
    inverter = make(teacher, objectives=objectives, iterations=7)
    history = inverter.invert(TARGETS, init=init, progress=False).history
    assert history["l2_norm"][0] == pytest.approx(init.norm().item())
    l1 = sum(
        d.abs().mean().item()
        for d in (
            init.diff(dim=2),
            init.diff(dim=3),
            init[..., 1:, 1:] - init[..., :-1, :-1],
            init[..., 1:, :-1] - init[..., :-1, 1:],
        )
    )
    assert history["total_variation_l1"][0] == pytest.approx(l1)
    # After a stop the norm is that of kept patches only.
    assert history["l2_norm"][6] < 0.75 * history["l2_norm"][5]


def test_interrupt_gives_back_what_is_done(teacher: VisionTransformer) -> None:
    def interrupt(iteration: int, images: Tensor, kept: Tensor) -> None:
        if iteration == 4:
            raise KeyboardInterrupt

    generator = torch.Generator().manual_seed(0)
    result = make(teacher).invert(TARGETS, generator=generator, progress=False, callback=interrupt)
    pixels, kept = frames(make(teacher))
    assert result.interrupted
    assert result.iterations == len(result.history["cross_entropy"]) == 5
    assert torch.equal(result.kept, kept[4])
    torch.testing.assert_close(result.images, denormalized(pixels[4]))


@pytest.mark.parametrize("broken", ["value", "gradient"])
def test_non_finite_loss_stops_with_the_last_finite_images(
    teacher: VisionTransformer, broken: str
) -> None:
    calls = []

    def spoilt(images: Tensor, logits: Tensor) -> Tensor:
        calls.append(images.detach().clone())
        if len(calls) <= 4:
            return images.sum() * 0
        return images.sum() * torch.nan if broken == "value" else (images * 0).sqrt().sum()

    name = "spoilt" if broken == "value" else "gradient"
    with pytest.raises(NonFiniteLoss, match=f"{name} is not finite at iteration 4") as caught:
        run(teacher, objectives=[CrossEntropy(), spoilt])
    assert (caught.value.iteration, caught.value.objective) == (4, name)
    result = caught.value.result
    assert result.iterations == 4
    assert all(len(values) == 4 for values in result.history.values())
    torch.testing.assert_close(result.images, denormalized(calls[-1]))
    assert result.images.isfinite().all()


def test_invert_is_the_one_liner(teacher: VisionTransformer) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"schedule": STOPS, "iterations": 10, **PUBLISHED, **SPACE}
    result = smi_fast.invert(teacher, TARGETS, generator=generator, progress=False, **options)
    assert torch.equal(result.images, run(teacher).images)


def test_invert_has_every_option_with_its_default() -> None:
    parts = (SparseInverter.__init__, SparseInverter.invert)
    of_parts = [inspect.signature(part).parameters for part in parts]
    expected = {name: each for part in of_parts for name, each in part.items() if name != "self"}
    # Only self, and jitter, which replaces the inverter's for one inversion, are in both.
    assert len(expected) == sum(map(len, of_parts)) - 3, "no name means two things"
    given = inspect.signature(smi_fast.invert).parameters
    assert given == expected
    assert list(given)[:2] == ["teacher", "targets"]
    assert typing.get_type_hints(smi_fast.invert) == {
        **typing.get_type_hints(SparseInverter.__init__),
        **typing.get_type_hints(SparseInverter.invert),
    }


def test_invert_forwards_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, object] = {}

    class Recorder:
        def __init__(self, teacher: object, **options: object) -> None:
            got.update(teacher=teacher, **options)

        def invert(self, targets: object, **options: object) -> str:
            got.update(targets=targets, **options)
            return "result"

    monkeypatch.setattr("smi_fast.inversion.functional.SparseInverter", Recorder)
    marks = {name: object() for name in inspect.signature(smi_fast.invert).parameters}
    teacher, targets = marks["teacher"], marks["targets"]
    options = {name: mark for name, mark in marks.items() if name not in ("teacher", "targets")}
    assert smi_fast.invert(teacher, targets, **options) == "result"
    assert got == marks


def test_empty_batch(teacher: VisionTransformer) -> None:
    result = make(teacher, objectives=[TotalVariation()]).invert(
        torch.zeros(0, dtype=torch.int64), progress=False
    )
    assert result.images.shape == (0, 3, 32, 48)
