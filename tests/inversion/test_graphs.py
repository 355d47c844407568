"""Graphs that are kept from batch to batch, with a stand-in that calls what it would replay.

What the stand-in calls reads and writes the memory of the batch that was captured, as a graph does.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    Dense,
    InversionResult,
    SparseInverter,
    SparseViT,
    TotalVariation,
)
from smi_fast.engine.weights import WeightCopy
from smi_fast.inversion import graphs
from smi_fast.inversion.cuda_graph import NotCapturable
from smi_fast.inversion.graphs import Graphs
from smi_fast.objectives import LossInputs, Objective
from tests.helpers.inversions import make, start
from tests.helpers.teachers import tiny_vit


class Made:
    """Counts graphs, and the iterations that they replay."""

    def __init__(self) -> None:
        self.graphs = self.replayed = 0
        self.memories: list[object] = []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> Made:
    found = Made()

    class Graph:
        def __init__(
            self, function: Any, device: object, generator: object, memory: object
        ) -> None:
            self._function, self.captured = function, False
            found.graphs += 1
            found.memories.append(memory)

        def __call__(self) -> None:
            self.captured = True
            found.replayed += 1
            self._function()

    monkeypatch.setattr(graphs, "CapturedCall", Graph)
    return found


@pytest.fixture
def own() -> VisionTransformer:
    """A teacher that a test may change."""
    torch.manual_seed(1)
    return tiny_vit().double()


def inverted(inverter: SparseInverter, seed: int, **options: Any) -> InversionResult:
    generator = torch.Generator().manual_seed(seed)
    targets = [seed % 5, (seed + 2) % 5]
    return inverter.invert(targets, generator=generator, progress=False, **options)


def same(one: InversionResult, other: InversionResult) -> bool:
    pairs = ((getattr(one, n), getattr(other, n)) for n in ("images", "kept", "masks", "logits"))
    return one.history == other.history and all(map(torch.equal, *zip(*pairs, strict=True)))


def test_graphs_of_one_batch_serve_the_next(teacher: VisionTransformer, made: Made) -> None:
    inverter, plain = make(teacher), make(teacher, graph=False)
    results = [inverted(inverter, seed) for seed in range(3)]
    assert made.graphs == 3 and made.replayed == 3 * 8  # a graph of each phase
    for seed, result in enumerate(results):
        with one_by_one():
            assert same(result, inverted(plain, seed))
    assert len(set(made.memories)) == 1


@contextmanager
def one_by_one() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smi_fast.inversion.loop.Loop._can_capture", lambda self: False)
        yield


def test_results_are_not_in_the_memory_of_graphs(teacher: VisionTransformer, made: Made) -> None:
    inverter = make(teacher)
    first = inverted(inverter, 0)
    kept, images = first.kept.clone(), first.images.clone()
    for tensor in inverter._graphs._tensors.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    assert torch.equal(first.kept, kept) and torch.equal(first.images, images)
    assert same(inverted(inverter, 0), first) and made.graphs == 3


def test_other_sizes_of_a_batch_have_graphs_of_their_own(
    teacher: VisionTransformer, made: Made
) -> None:
    inverter = make(teacher)
    for targets in ([1, 4], [1, 4, 2], [1, 4]):
        inverter.invert(targets, progress=False)
    assert made.graphs == 6


def test_number_of_kept_graphs_is_bounded(
    teacher: VisionTransformer, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST", 3)
    inverter = make(teacher)
    for targets in ([1, 4], [1, 4, 2], [1, 4]):
        inverter.invert(targets, progress=False)
        assert len(inverter._graphs._phases) <= 3
    assert made.graphs == 9


@pytest.mark.parametrize("how", ["data", "replaced"])
def test_other_weights_have_other_graphs(own: VisionTransformer, made: Made, how: str) -> None:
    """PyTorch doesn't count writes to ``weight.data`` as versions."""
    inverter = make(own)
    inverted(inverter, 0)
    weight = own.blocks[0].mlp.fc1.weight
    if how == "data":
        weight.data.mul_(1.5)
    else:
        own.blocks[0].mlp.fc1.weight = torch.nn.Parameter(1.5 * weight.detach())
    changed = inverted(inverter, 0)
    assert made.graphs == 6
    with one_by_one():
        assert same(changed, inverted(make(own), 0))


def test_copy_of_weights_sees_every_change(own: VisionTransformer) -> None:
    weights = WeightCopy(own)
    assert not weights.changed()
    own.head.bias.data[-1] += 1e-12
    assert weights.changed()
    own.head.bias.data[-1] -= 1e-12
    weights = WeightCopy(own)
    own.norm.register_buffer("more", torch.zeros(1))
    assert weights.changed()
    weights = WeightCopy(own)
    own.head.weight.data = own.head.weight.data.clone()
    assert weights.changed(), "the same values elsewhere, where no graph reads"


def test_what_an_engine_folded_lives_as_long_as_the_graphs(
    teacher: VisionTransformer, made: Made
) -> None:
    """Another inverter of the same teacher lets the engine forget it."""
    inverter = make(teacher)

    class Folded:
        pass

    folded = Folded()
    reference = weakref.ref(folded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inverter.teacher), "derived", lambda self, f=folded: (f,))
        inverted(inverter, 0)
    del folded
    patch = None
    inverter.teacher.refresh()
    gc.collect()
    assert reference() is not None
    inverter._graphs._forget()
    gc.collect()
    assert reference() is None


def test_an_engine_lists_what_it_folded(own: VisionTransformer) -> None:
    state = start(make(own, graph=False))
    sparse = state.settings.teacher
    sparse.refresh()
    assert sparse.derived() == ()
    state.step()
    if sparse._blocks.engine_for(sparse.device, sparse.dtype) is not None:
        assert len(sparse.derived()) == 2, "the blocks, and the rows of the last one"


class Own(Objective):
    """An objective with a tensor of its own, which it may replace."""

    name, weight = "own", 1e-3

    def __init__(self) -> None:
        self.factor = torch.tensor(1.0, dtype=torch.float64)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.factor * inputs.images.square().sum()


class Loud(TotalVariation):
    """A subclass may read anything, too."""


@pytest.mark.parametrize("objective", [Own(), Loud()], ids=["own", "subclass"])
def test_other_objectives_are_captured_anew(
    teacher: VisionTransformer, made: Made, objective: Objective
) -> None:
    inverter = make(teacher, objectives=[CrossEntropy(), objective])
    for _ in range(2):
        inverted(inverter, 0)
    assert made.graphs == 6 and not inverter._graphs._phases
    assert len(set(made.memories)) == 1


def test_inversion_inside_of_another_has_graphs_of_its_own(
    teacher: VisionTransformer, made: Made
) -> None:
    inverter = make(teacher)
    with one_by_one():
        expected = [inverted(inverter, seed) for seed in (0, 1)]
    inner: list[InversionResult] = []

    def callback(number: int, images: Tensor, kept: Tensor) -> None:
        if number == 4:
            inner.append(inverted(inverter, 1))

    outer = inverted(inverter, 0, callback=callback)
    assert same(outer, expected[0]) and same(inner[0], expected[1])
    assert len(set(made.memories)) > 1


def test_an_error_gives_the_state_its_memory_back(teacher: VisionTransformer, made: Made) -> None:
    inverter = make(teacher)

    def interrupt(number: int, images: Tensor, kept: Tensor) -> None:
        if number == 4:
            raise KeyboardInterrupt

    early = inverted(inverter, 0, callback=interrupt)
    images = early.images.clone()
    inverted(inverter, 1)
    assert torch.equal(early.images, images) and early.iterations == 5
    with pytest.raises(ZeroDivisionError):
        inverted(inverter, 0, callback=lambda *_: 1 // 0)
    with one_by_one():
        expected = inverted(inverter, 2)
    assert same(inverted(inverter, 2), expected)


def test_a_graph_is_made_when_it_is_worth_it(
    teacher: VisionTransformer, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phases of 3, 3 and 4 iterations, of which the last one of the first two is scored."""
    monkeypatch.setattr(graphs, "WORTH", 6)
    inverter = make(teacher)
    counts = []
    for seed in range(3):
        inverted(inverter, seed)
        counts.append((made.graphs, made.replayed))
    # Iterations of earlier batches count: those of the last phase reach six in the second one.
    assert counts == [(0, 0), (1, 4), (3, 12)]


def test_settings_of_torch_that_choose_kernels_have_graphs_of_their_own(
    teacher: VisionTransformer, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverter = make(teacher)
    inverted(inverter, 0)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    inverted(inverter, 0)
    assert made.graphs == 6


def test_copies_of_an_inverter_have_no_graphs_yet(teacher: VisionTransformer, made: Made) -> None:
    inverter = make(teacher)
    expected = inverted(inverter, 0)
    other = copy.deepcopy(inverter)
    assert isinstance(other._graphs, Graphs) and not other._graphs._phases
    assert same(inverted(other, 0), expected) and made.graphs == 6
    inverted(other, 1)
    assert made.graphs == 6, "a copy keeps graphs, too"


def test_many_iterations_are_one_replay_where_nothing_comes_between(
    teacher: VisionTransformer, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has 22 iterations and no stop, and is looked at every 5; a graph has 2 or 1 of them."""
    for name, value in {"STEPS": 2, "WORTH": 0}.items():
        monkeypatch.setattr(graphs, name, value)
    monkeypatch.setattr("smi_fast.inversion.loop.CHECK_EVERY", 5)
    options = {"schedule": Dense(), "iterations": 22}
    inverter = make(teacher, **options)
    with one_by_one():
        expected = inverted(inverter, 0)
    assert same(inverted(inverter, 0), expected)
    # 1 2 2, then 2 2 1 three times, 2: the first single one makes its graph.
    assert made.graphs == 2 and made.replayed == 3 + 3 * 3 + 1
    seen: list[int] = []
    called = inverted(inverter, 0, callback=lambda number, *_: seen.append(number))
    assert same(called, expected) and seen == [*range(22)]


def test_large_graphs_are_made_when_they_are_worth_it_and_all_terms_are_always_due(
    teacher: VisionTransformer, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"STEPS": 2, "WORTH": 10}.items():
        monkeypatch.setattr(graphs, name, value)
    monkeypatch.setattr("smi_fast.inversion.loop.CHECK_EVERY", 50)
    options = {"schedule": Dense(), "iterations": 12}
    inverter = make(teacher, **options)
    inverted(inverter, 0)
    assert (made.graphs, made.replayed) == (1, 12)
    inverted(inverter, 1)
    assert (made.graphs, made.replayed) == (2, 12 + 6)
    seldom = Own()
    seldom.every = 2
    options = {**options, "iterations": 40, "objectives": [CrossEntropy(), seldom]}
    with one_by_one():
        expected = inverted(make(teacher, **options), 0)
    assert same(inverted(make(teacher, **options), 0), expected)
    assert made.graphs == 4, "one of each set of terms"


def test_iteration_that_scores_is_in_no_graph(
    teacher: VisionTransformer, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"STEPS": 2, "WORTH": 0}.items():
        monkeypatch.setattr(graphs, name, value)
    monkeypatch.setattr("smi_fast.inversion.loop.CHECK_EVERY", 50)
    inverter = make(teacher)
    with one_by_one():
        expected = inverted(inverter, 0)
    for _ in range(2):
        assert same(inverted(inverter, 0), expected)


class Reads(Objective):
    """Raises what CUDA raises where the host reads in a capture."""

    name, weight = "reads", 1.0

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self._value(inputs.images)

    def _value(self, images: Tensor) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("by", ["objective", "teacher"])
def test_objective_that_cannot_be_captured_is_named(
    teacher: VisionTransformer, made: Made, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    class Refused:
        captured = False

        def __init__(self, function: Any, *_: object) -> None:
            self._function = function

        def __call__(self) -> None:
            try:
                self._function()
            except RuntimeError as error:
                raise NotCapturable(f"an iteration can't be captured ({error})") from error

    monkeypatch.setattr(graphs, "CapturedCall", Refused)
    objectives = [CrossEntropy(), *([Reads()] if by == "objective" else [])]
    inverter = make(teacher, objectives=objectives)
    if by == "teacher":
        monkeypatch.setattr(SparseViT, "forward", refuse)
    with pytest.raises(NotCapturable) as caught:
        inverted(inverter, 0)
    said = "an iteration can't be captured (operation not permitted when stream is capturing)"
    named = "the objective reads failed: " if by == "objective" else ""
    assert str(caught.value) == named + said


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("operation not permitted when stream is capturing")
