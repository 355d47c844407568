"""Pools: many images, shards against PNGs, and several processes.

Pictures are read from the system's cache. Memory is that of a new process, and what it adds to the
import of torch, which alone takes more.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness.environment import record
from benchmarks.pools import on_paper, processes, records, shards

GPUS, BATCH = 64, 32


def main(quick: bool = False) -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        record("pools", measure(Path(folder), quick), quick=quick)


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    for name in ("records", "added", "shards", "processes"):
        (folder / name).mkdir()
    images, rounds = (2_000, 1) if quick else (100_000, 3)
    measured: dict[str, Any] = {
        "many_images": records.many_images(folder / "records", images, [10, 100, 1000]),
        "added_batches": records.added_batches(folder / "added", [10, 100, 1000], 10),
        "shards": shards.reading(folder / "shards", 10 if quick else 40, 100, 5 * rounds),
        "training": shards.training(4 if quick else 16, 2 * rounds),
        "store": processes.store([1, 8], 500),
        "writer": processes.writer(folder / "writer", 40, 224, 16),
        "coordination": processes.coordination(
            folder / "processes", 20 if quick else 60, 30, rounds
        ),
    }
    measured["predicted"] = on_paper.predict(measured, GPUS, BATCH)
    return measured
