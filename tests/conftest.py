from __future__ import annotations

import pytest
import torch

from smi_fast import backends


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random_kept(batch: int, count: int, total: int) -> torch.Tensor:
    """Ascending distinct patches, another set for each image."""
    return torch.stack([torch.randperm(total)[:count].sort().values for _ in range(batch)])


@pytest.fixture(params=["cpp", "reference"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with each backend of the CPU as the automatic choice."""
    reason = backends.report(torch.device("cpu"))[request.param]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(backends, "DEFAULT", request.param)
    return request.param
