"""Replayed iterations against those taken one by one: here both are the latter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smi_fast import recipes
from smi_fast.inversion.graphs import Graphs
from smi_fast.inversion.state import InversionState
from smi_fast.verify import captured
from smi_fast.zoo import load_cnn, load_teacher

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "ITERATIONS", 3)


def test_every_recipe_is_checked_and_one_term_is_not_always_due() -> None:
    found = list(captured.every_recipe(load_cnn("fashion-canvas")))
    assert {recipe.name for recipe in found} > set(recipes.NAMES)
    assert [objective.every for objective in found[-1].objectives] == [1, 1, 3]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_equal_runs_have_no_failure(share: float) -> None:
    teacher, recipe = load_teacher("fashion-canvas"), recipes.mimiq()
    line = captured.check(teacher, recipe, share, CPU)
    assert line["failures"] == [] and line["recipe"] == "mimiq"


def test_one_bit_of_one_tensor_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    finished, calls = captured.finished, []

    def changed(state: InversionState, graphs: Graphs) -> dict[str, torch.Tensor]:
        found = finished(state, graphs)
        calls.append(graphs)
        if len(calls) == 4:
            moments = found["exp_avg_sq"]
            moments.flatten()[-1] = moments.flatten()[-1].nextafter(torch.tensor(torch.inf))
        return found

    monkeypatch.setattr(captured, "finished", changed)
    line = captured.check(load_teacher("fashion-canvas"), recipes.smi(), 0.5, CPU)
    assert line["failures"] == ["exp_avg_sq of batch 1 differs"]
    assert calls[0] is calls[2] and calls[1] is calls[3], "graphs are kept from batch to batch"


def test_zeros_of_other_signs_differ_and_equal_nan_does_not() -> None:
    one = {"a": torch.tensor([0.0]), "b": torch.tensor([torch.nan])}
    other = {"a": torch.tensor([-0.0]), "b": torch.tensor([torch.nan])}
    assert captured.different(one, other) == ["a"]


def test_an_error_is_a_line_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(InversionState, "step", raises)
    line = captured.check(load_teacher("fashion-canvas"), recipes.smi(), 0.5, CPU)
    assert len(line["failures"]) == 2
    assert line["failures"][0].startswith("an iteration waits for the device: RuntimeError: called")
