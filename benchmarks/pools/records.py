"""A pool of many images: the time and memory to open, resume and report it, and to add batches."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.timing import rounded
from benchmarks.pools.uses import USES
from smi_fast import Dense, SparseInverter, load_teacher, recipes
from smi_fast.fill import fill
from smi_fast.pool import METADATA, Pool
from smi_fast.pool.batch import Encoded, png
from smi_fast.pool.layout import files_of
from smi_fast.pool.metadata import Record, to_line

CLASSES = 1000
NAMES = [f"class {label}" for label in range(CLASSES)]
SETTINGS = {"teacher": "made for this measurement"}
SIDE, KEPT = 64, 46


def model_record(folder: Path) -> Record:
    """The record of an image that :func:`smi_fast.fill.fill` made."""
    recipe = recipes.clear()
    options = recipe.options(schedule=Dense()) | {"iterations": 2}
    inverter = SparseInverter(load_teacher("fashion-canvas"), **options)
    with Pool.create(folder, SETTINGS, NAMES) as pool:
        fill(pool, inverter, [0], recipe=recipe, progress=False)
        record: Record = pool.records[0]
    return {**record, "kept": list(range(KEPT))}


def lines(model: Record, count: int, batch_size: int, start: int = 0) -> Iterator[bytes]:
    """Lines of metadata, as images of this record have them."""
    for index in range(start, start + count):
        label = index % CLASSES
        own: Record = {**files_of(index, label, CLASSES), "index": index, "label": label}
        own |= {"batch": index // batch_size, "batch_size": batch_size}
        own |= {"class_name": NAMES[label], "prediction": label}
        yield to_line({**model, **own})


def make_files(folder: Path, count: int) -> None:
    """Three small pictures for each image."""
    content = png(torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).numpy())
    for label in range(min(count, CLASSES)):
        for name in files_of(label, label, CLASSES).values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        for name in files_of(index, index % CLASSES, CLASSES).values():
            (folder / name).write_bytes(content)


def use(name: str, folder: Path) -> dict[str, float]:
    """Seconds of a use, those of processors, and megabytes that it adds and its process has."""
    command = [sys.executable, "-m", "benchmarks.pools.uses", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {key: rounded(value) for key, value in json.loads(done.stdout).items()}


def many_images(folder: Path, count: int, batch_sizes: list[int]) -> dict[str, Any]:
    """Opening and reporting ``count`` images, and resuming them in batches of several sizes."""
    model = model_record(folder / "model")
    pool = folder / "many"
    Pool.create(pool, SETTINGS, NAMES).close()
    make_files(pool, count)
    found: dict[str, Any] = {}
    for batch_size in batch_sizes:
        with (pool / METADATA).open("wb") as file:
            file.writelines(lines(model, count, batch_size))
        names = USES if batch_size == batch_sizes[0] else ("resume",)
        found[f"batches of {batch_size}"] = {name: use(name, pool) for name in names}
    size = (pool / METADATA).stat().st_size
    return {"images": count, "bytes_of_a_record": rounded(size / count), "uses": found}


def added_batches(folder: Path, counts: list[int], batch_size: int) -> dict[str, Any]:
    """Seconds to add the batches of pools of several sizes, pictures left out.

    A batch takes the same time in a large pool unless the metadata is read or written as a whole.
    """
    model = model_record(folder / "record")
    found = {}
    for count in counts:
        batches = [
            list(lines(model, batch_size, batch_size, start))
            for start in range(0, count * batch_size, batch_size)
        ]
        with Pool.create(folder / str(count), SETTINGS, NAMES) as pool:
            start = time.perf_counter()
            for batch in batches:
                pool.add_encoded(Encoded({}, batch))
            seconds = time.perf_counter() - start
        found[f"{count} batches"] = {
            "seconds": rounded(seconds),
            "ms_of_a_batch": rounded(1000 * seconds / count),
        }
    return {"batch_size": batch_size, **found}
