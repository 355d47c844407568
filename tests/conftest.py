from __future__ import annotations

import pytest
import torch

from smi_fast.ops import backends
from smi_fast.verify.cases import random_kept

__all__ = ["random_kept"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpp", "reference"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with each backend of the CPU as the automatic choice."""
    reason = backends.report(torch.device("cpu"))[request.param]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(backends, "DEFAULT", request.param)
    return request.param
