"""Batches of exact pixels for pools, and what lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smi_fast.pool import LOCK, SECONDS

SETTINGS = {"teacher": "fashion-canvas", "at": (50, 100), "seed": 0}
NAMES = [f"class {i}" for i in range(10)]


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """What ``Pool.add`` takes: images [B, 3, 16, 24] of exact 8-bit values, masks [B, 2, 3]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 3, 16, 24), generator=generator) / 255
    masks = torch.rand(size, 2, 3, generator=generator) < 0.5
    records = [{"label": i % 3, "seed": seed} for i in range(size)]
    return images, masks, records


def files(path: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name, but the lock and the times."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and str(file.relative_to(path)) not in (LOCK, SECONDS)
    }


def read(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)
