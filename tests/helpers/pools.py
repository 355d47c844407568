"""Batches of exact pixels for pools, and what lies on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from smi_fast.pool import LOCK, SECONDS

SETTINGS = {"teacher": "fashion-canvas", "at": (50, 100), "seed": 0}
NAMES = [f"class {i}" for i in range(10)]
ZERO = {"label": 0}
# What every pool has.
ALWAYS = {"settings.json", "classes.txt", "README.md"}


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


def fail_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    """Makes the call number ``count`` of a function find the disk full."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)
