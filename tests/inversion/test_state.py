"""One iteration without a read by the host: a guard refuses what a CUDA graph can't hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import CrossEntropy, Selection
from smi_fast.objectives import LossInputs, Objective
from tests.helpers.host_guard import HostAccessError, HostGuard
from tests.helpers.inversions import EVERY_PIXEL_OBJECTIVE, make, start


class Planted(Objective):
    """Does something, and then returns 0."""

    name, weight = "planted", 1.0

    def __init__(self, fault: Callable[[LossInputs], object]) -> None:
        self.fault = fault

    def __call__(self, inputs: LossInputs) -> Tensor:
        self.fault(inputs)
        return inputs.images.sum() * 0


@pytest.mark.parametrize("background", ["frozen", "regularized"])
@pytest.mark.parametrize("kept", [24, 12])
def test_reads_nothing_on_the_host(
    each_backend: str, teacher: VisionTransformer, background: str, kept: int
) -> None:
    state = start(make(teacher, objectives=EVERY_PIXEL_OBJECTIVE, background=background))
    state.keep(Selection(state.kept[:, :kept].contiguous()))
    before = state.images().clone()
    with HostGuard():
        state.step()
        importance = state.step(score=True)
    assert importance is not None and importance.shape == (2, kept)
    assert state.done() == 2 and not torch.equal(state.images(), before)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda inputs: inputs.logits.sum().item(), "_local_scalar_dense.default waits"),
        (lambda inputs: bool(inputs.images.any()), "waits for the device"),
        (lambda inputs: torch.equal(inputs.logits, inputs.logits), "equal.default waits"),
        (
            lambda inputs: inputs.logits[inputs.logits > 0],
            "with a mask has a shape that depends on data",
        ),
        (lambda inputs: inputs.targets.unique(), "waits for the device"),
        (lambda inputs: torch.tensor([1.0, 2.0]), "numbers of the host is copied"),
        (lambda inputs: inputs.logits.detach().to("meta"), "copies from"),
    ],
)
def test_guard_catches(
    teacher: VisionTransformer, fault: Callable[[LossInputs], object], message: str
) -> None:
    state = start(make(teacher, objectives=[CrossEntropy(), Planted(fault)]))
    with pytest.raises(HostAccessError, match=message), HostGuard():
        state.step()


def test_compiles_into_one_graph(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    plain, traced = (start(make(teacher, objectives=EVERY_PIXEL_OBJECTIVE)) for _ in range(2))
    compiled = torch.compile(lambda: traced.step(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        plain.step()
        compiled()
    torch.testing.assert_close(traced.images(), plain.images())
    torch.testing.assert_close(traced.record, plain.record)
