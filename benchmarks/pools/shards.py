"""Shards against PNGs: bytes of an image, images read in a second, and a step of training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness.timing import alternate, clocked, ratios, rounded, spread
from smi_fast import SparseInverter, SparseStudent, StopSchedule, load_teacher, recipes
from smi_fast.fill import fill
from smi_fast.pool import Pool
from smi_fast.pool.shards import SparseImageDataset, write_shards

STUDENT, CLASSES, PATCHES, KEPT = "deit_tiny_patch16_224", 1000, 196, 50


def make_pool(folder: Path, images: int, iterations: int) -> Path:
    """A pool of the embedded teacher, with one stop."""
    recipe = recipes.clear()
    options = recipe.options(schedule=StopSchedule.once(iterations))
    inverter = SparseInverter(
        load_teacher("fashion-canvas"), **options | {"iterations": iterations}
    )
    with Pool.create(folder, {}, [str(i) for i in range(10)]) as pool:
        labels = [i * 10 // images for i in range(images)]
        fill(pool, inverter, labels, recipe=recipe, progress=False)
    return folder


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def whole_png(pool: Path, record: dict[str, Any]) -> Tensor:
    """The image, uint8 [H, W, 3]."""
    return torch.from_numpy(pixels(pool / record["file_name"]).copy())


def kept_png(pool: Path, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The kept patches uint8 [K, P, P, 3] and their places, from the image and its mask."""
    image, mask = (pixels(pool / record[key]) for key in ("file_name", "mask_file_name"))
    rows, columns = mask.shape
    grid = image.reshape(rows, image.shape[0] // rows, columns, image.shape[1] // columns, 3)
    kept = np.flatnonzero(mask)
    return torch.from_numpy(grid.swapaxes(1, 2)[mask > 0]), torch.from_numpy(kept)


def reading(folder: Path, images: int, iterations: int, rounds: int) -> dict[str, Any]:
    """Sizes and reading speed of one pool as PNGs and as shards, from the system's cache."""
    pool = make_pool(folder / "pool", images, iterations)
    write_shards(pool, folder / "shards")
    records, dataset = Pool(pool).records, SparseImageDataset(folder / "shards")
    for record, (patches, kept, _) in zip(records, dataset, strict=True):
        for ours, theirs in zip((patches, kept), kept_png(pool, record), strict=True):
            assert torch.equal(ours, theirs)
    ways: dict[str, Callable[[], object]] = {
        "whole PNG": lambda: [whole_png(pool, record) for record in records],
        "kept patches of PNGs": lambda: [kept_png(pool, record) for record in records],
        "shard": lambda: [dataset[i] for i in range(len(dataset))],
    }
    seconds = alternate({name: clocked(way) for name, way in ways.items()}, rounds)
    size = {
        "whole PNG": [pool / record["file_name"] for record in records],
        "kept patches of PNGs": [
            pool / record[key] for record in records for key in ("file_name", "mask_file_name")
        ],
        "shard": list((folder / "shards").iterdir()),
    }
    return {
        "images": images,
        "side": 64,
        "kept": len(records[0]["kept"]),
        "bytes_of_an_image": {
            name: rounded(sum(path.stat().st_size for path in paths) / images)
            for name, paths in size.items()
        },
        "images_a_second": {
            name: spread([images / each for each in found]) for name, found in seconds.items()
        },
        "shards_read_faster_than": {
            name: spread(ratios(seconds[name], seconds["shard"]), 3)
            for name in ways
            if name != "shard"
        },
    }


def training(batch: int, rounds: int) -> dict[str, Any]:
    """A step of training on kept patches against one on whole images."""
    torch.manual_seed(0)
    model = timm.create_model(STUDENT).train()
    kept = torch.rand(batch, PATCHES).argsort(1)[:, :KEPT]
    patches, images = torch.randn(batch, KEPT, 768), torch.randn(batch, 3, 224, 224)
    labels = torch.arange(batch) % CLASSES
    steps = {
        "whole images": partial(step, model, labels, images),
        "kept patches": partial(step, SparseStudent(model), labels, patches, kept),
    }
    for each in steps.values():
        each()
    seconds = alternate({name: clocked(each) for name, each in steps.items()}, rounds)
    return {
        "student": STUDENT,
        "batch": batch,
        "patches": PATCHES,
        "kept": KEPT,
        "seconds": {name: spread(found) for name, found in seconds.items()},
        "times_faster": spread(ratios(seconds["whole images"], seconds["kept patches"]), 3),
    }


def step(model: nn.Module, labels: Tensor, *inputs: Tensor) -> None:
    """Forward and backward pass."""
    model.zero_grad()
    nn.functional.cross_entropy(model(*inputs), labels).backward()
