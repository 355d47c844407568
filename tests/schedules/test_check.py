"""What a schedule answers is checked: each wrong answer is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from smi_fast import Selection, Stop, WrongSelection
from smi_fast.schedules import check

STOP = Stop(7, torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]]), torch.rand(2, 4), (2, 3))
GOOD = [[0, 3], [1, 4]]


def refused(selection: Selection, count: int = 2) -> str:
    """The sentence that refuses a selection."""
    with pytest.raises(WrongSelection) as caught:
        check(selection, STOP, count)
    assert isinstance(caught.value, ValueError)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.startswith("expected ")
    return sentence


def test_a_right_answer_is_given_back() -> None:
    for finished in (None, torch.tensor([[2], [5]]), torch.zeros(2, 0, dtype=torch.int64)):
        selection = Selection(torch.tensor(GOOD), finished)
        assert check(selection, STOP, 2) is selection
    everything = Selection(STOP.kept)
    assert check(everything, STOP, 4) is everything


WRONG_SETS = [
    ([[0, 3, 5], [1, 4, 5]], torch.int64, r"int64 \[2, \w\] from the schedule at 7, got .*2, 3\]"),
    ([[0, 3]], torch.int64, r"int64 \[2, \w\] from the schedule at 7, got torch.int64 \[1, 2\]"),
    ([0, 3], torch.int64, r"int64 \[2, \w\] from the schedule at 7, got torch.int64 \[2\]"),
    (GOOD, torch.int32, r"int64 \[2, \w\] from the schedule at 7, got torch.int32 \[2, 2\]"),
    (GOOD, torch.float32, r"int64 \[2, \w\] from the schedule at 7, got torch.float32"),
    ([[0, 0], [1, 4]], torch.int64, r"distinct and ascending from the schedule at 7, got \[\[0, 0"),
    ([[0, 3], [4, 1]], torch.int64, r"distinct and ascending .* at 7, got \[\[0, 3\], \[4, 1\]\]"),
    ([[0, 3], [1, 6]], torch.int64, r"among the patches kept so far .* at 7, got .*\[1, 6\]"),
    ([[-1, 3], [1, 4]], torch.int64, r"among the patches kept so far .* at 7, got \[\[-1, 3\]"),
    ([[0, 1], [1, 4]], torch.int64, r"among the patches kept so far .* at 7, got \[\[0, 1\]"),
]


@pytest.mark.parametrize(("patches", "dtype", "message"), WRONG_SETS)
def test_a_wrong_set_of_kept_patches_is_refused(
    patches: list, dtype: torch.dtype, message: str
) -> None:
    sentence = refused(Selection(torch.tensor(patches, dtype=dtype)))
    with pytest.raises(ValueError, match=f"expected kept {message}"):
        raise ValueError(sentence)


@pytest.mark.parametrize(("patches", "dtype", "message"), WRONG_SETS[1:])
def test_a_wrong_set_of_finished_patches_is_refused(
    patches: list, dtype: torch.dtype, message: str
) -> None:
    kept = torch.tensor([[2], [2]])
    sentence = refused(Selection(kept, torch.tensor(patches, dtype=dtype)), count=1)
    with pytest.raises(ValueError, match=f"expected finished {message}"):
        raise ValueError(sentence)


def test_another_count_than_promised_is_refused() -> None:
    sentence = refused(Selection(torch.tensor(GOOD)), count=3)
    assert "kept int64 [2, 3]" in sentence and "got torch.int64 [2, 2]" in sentence


def test_another_device_is_refused() -> None:
    elsewhere = torch.tensor(GOOD, device="meta")
    assert "expected kept on cpu from the schedule at 7, got meta" in refused(Selection(elsewhere))
    selection = Selection(torch.tensor(GOOD), elsewhere)
    assert "expected finished on cpu from the schedule at 7, got meta" in refused(selection)


def test_a_patch_that_stays_and_leaves_is_refused() -> None:
    selection = Selection(torch.tensor(GOOD), torch.tensor([[2, 5], [4, 5]]))
    assert "finished patches that don't stay, the schedule at 7" in refused(selection)
