"""Replays recordings of the published loop (Egg-Hu/SMI) in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines.recordings import NAMES, Recording, replay

pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.mark.parametrize("name", NAMES)
def test_replay(name: str) -> None:
    recording = Recording(name)
    made = replay(recording)
    assert made.worst("cross_entropy", recording["ce"]) < 1e-8
    assert made.worst("total_variation", recording["tv"]) < 1e-8
    for ours, theirs in zip(made.kept, recording.kept(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(made.kept) == (0 if name == "dense" else 4)
    assert (made.result.images - recording["synthetic"]).abs().max() < 1e-6
    assert torch.equal(made.result.masks, recording.masks())
