"""A schedule whose patches leave as finished sparse images, in the loop."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import Parametrization, Pixels, Selection, Stop, WrongSelection
from smi_fast.ops import gather_patches
from tests.helpers.inversions import TARGETS, denormalized, frames, make, pixels_of, run
from tests.helpers.parametrizations import Sigmoid
from tests.helpers.schedules import Rebirth


@pytest.mark.parametrize("parametrization", [Pixels(), Sigmoid()])
def test_finished_patches_are_those_of_the_images_at_their_stop(
    teacher: VisionTransformer, parametrization: Parametrization
) -> None:
    schedule = Rebirth()
    result = run(teacher, schedule=schedule, parametrization=parametrization)
    images, kept = frames(make(teacher, schedule=Rebirth(), parametrization=parametrization))
    assert [group.iteration for group in result.finished] == [3, 6]
    for group, stop in zip(result.finished, schedule.stops, strict=True):
        best = stop.importance.topk(2, dim=1).indices
        assert torch.equal(group.patches, stop.kept.gather(1, best).sort(dim=1).values)
        at_stop = denormalized(images[group.iteration - 1]).clamp(0, 1)
        pixels, _ = gather_patches(at_stop, group.patches, patch_size=8)
        assert group.pixels.shape == (2, 2, 192)
        torch.testing.assert_close(group.pixels, pixels, rtol=0, atol=1e-12)
        # The loop doesn't touch them again.
        mask = pixels_of(group.patches)
        assert torch.equal(images[-1][mask], images[group.iteration - 1][mask])
        for later in kept[group.iteration :]:
            assert not (later[:, :, None] == group.patches[:, None]).any()
    assert [patches.shape[1] for patches in kept] == [24] * 3 + [21] * 3 + [18] * 4
    assert torch.equal(result.kept, kept[-1])


def test_what_a_schedule_is_told_at_a_stop(teacher: VisionTransformer) -> None:
    schedule = Rebirth()
    run(teacher, schedule=schedule)
    assert [stop.iteration for stop in schedule.stops] == [3, 6]
    assert [stop.kept.shape for stop in schedule.stops] == [(2, 24), (2, 21)]
    for stop in schedule.stops:
        assert stop.importance.shape == stop.kept.shape and stop.grid == (4, 6)


def test_without_a_finished_group_the_result_has_none(teacher: VisionTransformer) -> None:
    assert run(teacher).finished == ()


@pytest.mark.usefixtures("replays")
def test_captured_loop_finishes_the_same_groups(teacher: VisionTransformer) -> None:
    captured = run(teacher, schedule=Rebirth())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smi_fast.inversion.loop.Loop._can_capture", lambda self: False)
        plain = run(teacher, schedule=Rebirth())
    for ours, theirs in zip(captured.finished, plain.finished, strict=True):
        assert torch.equal(ours.patches, theirs.patches)
        assert torch.equal(ours.pixels, theirs.pixels)


def test_a_broken_promise_ends_the_inversion(teacher: VisionTransformer) -> None:
    class Broken(Rebirth):
        def select(self, stop: Stop) -> Selection:
            return Selection(stop.kept)

    inverter = make(teacher, schedule=Broken())
    with pytest.raises(WrongSelection, match=r"kept int64 \[2, 21\] .* at 3, got .*\[2, 24\]"):
        inverter.invert(TARGETS, progress=False)


def test_a_reranked_mask_needs_a_share_that_remains(teacher: VisionTransformer) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole sentence follows)
        make(teacher, schedule=Rebirth(), final_mask="reranked")
    assert str(caught.value) == (
        "final_mask='reranked' needs a schedule that says which share of the patches is "
        "remaining, Rebirth doesn't"
    )
