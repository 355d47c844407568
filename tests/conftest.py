from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random_kept(batch: int, count: int, total: int) -> torch.Tensor:
    """Ascending distinct patches, another set for each image."""
    return torch.stack([torch.randperm(total)[:count].sort().values for _ in range(batch)])
