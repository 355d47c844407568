"""Results can be compared, pickled and saved."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import InversionResult
from tests.helpers.inversions import make, run, start
from tests.helpers.schedules import Rebirth


def saved_and_loaded(result: InversionResult) -> InversionResult:
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_result_equals_itself_only(teacher: VisionTransformer) -> None:
    first, again = run(teacher, schedule=Rebirth()), run(teacher, schedule=Rebirth())
    assert first == first and first != again
    assert first in [again, first]
    assert first.finished[0] == first.finished[0] != again.finished[0]
    stops = Rebirth()
    run(teacher, schedule=stops)
    assert stops.stops[0] != stops.stops[1]
    state = start(make(teacher))
    assert state == state and state.settings == state.settings


def test_a_result_can_be_pickled(teacher: VisionTransformer) -> None:
    result = run(teacher, schedule=Rebirth())
    for way in (lambda r: pickle.loads(pickle.dumps(r)), copy.deepcopy, saved_and_loaded):
        other = way(result)
        for name in ("images", "kept", "masks", "targets", "logits"):
            assert torch.equal(getattr(other, name), getattr(result, name))
        assert (other.history, other.timing) == (result.history, result.timing)
        assert torch.equal(other.finished[1].pixels, result.finished[1].pixels)
