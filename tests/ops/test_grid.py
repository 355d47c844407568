"""Geometry of the grid of patches."""

from __future__ import annotations

import torch

from smi_fast.ops.grid import widened


def test_widened_sets_keep_their_order() -> None:
    kept = torch.stack([torch.randperm(9)[:4] for _ in range(20)])
    for width in (4, 6, 9):
        found = widened(kept, width, 9)
        assert torch.equal(found[:, :4], kept)
        assert all(len(set(row)) == width for row in found.tolist())
        assert all(row == sorted(row) for row in found[:, 4:].tolist())
