"""Every objective in one sparse inversion, captured, and refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import smi_fast
from smi_fast.objectives import Objective
from tests.helpers.host_guard import HostGuard
from tests.helpers.loss_inputs import loss_inputs
from tests.helpers.teachers import make_teacher

SPARSE = {"schedule": smi_fast.StopSchedule((2, 4), (0.5, 0.5)), "iterations": 6}


def every_objective(teacher: smi_fast.SparseViT) -> list[Objective]:
    images = torch.randn(2, 3, *teacher.image_size, dtype=teacher.dtype)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()).to(teacher.dtype)
    student = nn.Sequential(nn.Flatten(), nn.LazyLinear(10, dtype=teacher.dtype)).eval()
    student(images)
    return [
        smi_fast.CrossEntropy(),
        smi_fast.TotalVariation(),
        smi_fast.BatchNormMatching(cnn),
        smi_fast.TokenStatistics(smi_fast.collect_statistics(teacher, [images])),
        smi_fast.PatchSimilarity(),
        smi_fast.GaussianSimilarity(rows=4),
        smi_fast.HeadSimilarity(),
        smi_fast.AttentionPrior(),
        smi_fast.AdversarialJS(student),
        smi_fast.PatchSeamTV(),
        smi_fast.VariationTarget(),
        smi_fast.EmbeddingTarget(torch.randn(10, dtype=teacher.dtype)),
        smi_fast.NeuronTarget(0, channel=[3, 4], where="mlp_hidden"),
    ]


def test_every_objective_takes_part_in_a_sparse_inversion() -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=64, depth=2))
    objectives = every_objective(teacher)
    options = {"objectives": objectives, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for background in ("frozen", "regularized"):
        inverter = smi_fast.SparseInverter(teacher, background=background, **SPARSE, **options)
        runs = [
            inverter.invert([1, 2], generator=torch.Generator().manual_seed(5), progress=False)
            for _ in range(2)
        ]
        assert torch.equal(runs[0].images, runs[1].images)
        assert len(runs[0].history) == len(objectives)
        assert all(len(set(values)) == 6 for values in runs[0].history.values())


@pytest.mark.parametrize("kept", [16, 6])
def test_an_iteration_with_every_objective_can_be_captured(kept: int) -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=64, depth=2))
    space = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    inverter = smi_fast.SparseInverter(
        teacher, objectives=every_objective(teacher), **SPARSE, **space
    )
    state = inverter.start([1, 2], None, None, torch.Generator().manual_seed(0))
    state.keep(smi_fast.Selection(state.kept[:, :kept].contiguous()))
    before = state.images().clone()
    with HostGuard():
        state.step()
    assert state.non_finite(slice(0, 1)) is None
    assert not torch.equal(state.images(), before)


@pytest.mark.parametrize("name", ["GaussianSimilarity", "AttentionPrior", "VariationTarget"])
def test_what_was_not_begun_is_refused(name: str) -> None:
    taps = {"attention.0.scores": torch.zeros(2, 1, 5, 5), "attention.0.row": torch.zeros(2, 1, 5)}
    with pytest.raises(RuntimeError, match=r"begin\(\) draws"):
        getattr(smi_fast, name)()(loss_inputs(taps=taps, depth=1, prefix=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: smi_fast.GaussianSimilarity(rows=1), "2 rows or more, got 1"),
        (lambda: smi_fast.AttentionPrior(components=0), "1 component or more, got 0"),
        (lambda: smi_fast.AdversarialJS(nn.Identity(), temperature=0), "above 0, got 0"),
        (lambda: smi_fast.VariationTarget(3, 2), "low <= high, got 3 and 2"),
        (lambda: smi_fast.TokenStatistics({}), "statistics of block.N.tokens"),
        (lambda: smi_fast.TokenStatistics({"attention.1": ()}), "block.N.tokens, got .'attention"),
    ],
)
def test_bad_options_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
