"""torch.set_default_dtype changes nothing that a seed decides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import smi_fast
from smi_fast.jitter import Jitter
from smi_fast.objectives.targets import multi_targets, soft_targets
from tests.helpers.teachers import make_teacher


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_restored")
def test_the_default_data_type_does_not_change_a_seed() -> None:
    teacher = smi_fast.SparseViT(make_teacher("deit_tiny_patch16_224", img_size=64, depth=2))

    def results() -> list[torch.Tensor]:
        objectives = [
            smi_fast.CrossEntropy(),
            smi_fast.GaussianSimilarity(rows=4),
            smi_fast.AttentionPrior(),
            smi_fast.VariationTarget(),
        ]
        inverter = smi_fast.SparseInverter(
            teacher,
            objectives=objectives,
            parametrization=smi_fast.Pixels(),
            schedule=smi_fast.StopSchedule((2, 4), (0.5, 0.5)),
            iterations=6,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        result = inverter.invert([1, 2], generator=torch.Generator().manual_seed(0), progress=False)
        seeded = torch.Generator().manual_seed(1)
        labels = torch.tensor([1, 2])
        return [
            result.images,
            result.kept,
            *Jitter().draw(50, (64, 64), generator=seeded),
            soft_targets(labels, 10, generator=seeded),
            multi_targets(labels[:, None], 10),
        ]

    expected = results()
    torch.set_default_dtype(torch.float64)
    for one, other in zip(results(), expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
