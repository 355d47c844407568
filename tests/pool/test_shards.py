"""Shards have the kept patches of a pool, exactly, and train and judge as whole images do."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from smi_fast import SparseViT, load_teacher
from smi_fast.background import over
from smi_fast.inversion.inputs import image_space
from smi_fast.pool import Pool, PoolError
from smi_fast.pool.shards import SparseImageDataset, normalized, write_shards
from tests.helpers.pools import NAMES, SETTINGS, batch, read
from tests.helpers.smi import Smi

BATCHES = (3, 4)
SMALL = 1024 + 1188  # bytes for the header and six patches


def a_pool(path: Path) -> Path:
    """Images of 16 x 24 pixels in patches of 8, of different numbers of patches."""
    with Pool.create(path, SETTINGS, NAMES) as pool:
        for seed, size in enumerate(BATCHES):
            pool.add(*batch(size, seed=seed))
    return path


@pytest.mark.parametrize(("most_bytes", "count"), [(2**28, 1), (SMALL, 5)])
def test_patches_come_back_exactly(tmp_path: Path, most_bytes: int, count: int) -> None:
    pool, out = a_pool(tmp_path / "pool"), tmp_path / "shards"
    shards = write_shards(pool, out, most_bytes=most_bytes)
    assert shards == len(list(out.iterdir())) == count
    assert all(path.stat().st_size <= most_bytes for path in out.iterdir())
    found, records = SparseImageDataset(out), Pool(pool).records
    assert len(found) == len(records) == sum(BATCHES)
    assert len({len(record["kept"]) for record in records}) > 1
    for i, record in enumerate(records):
        patches, kept, label = found[i]
        assert (kept.tolist(), label) == (record["kept"], record["label"])
        whole = read(pool / record["file_name"])
        for patch, place in zip(patches, record["kept"], strict=True):
            y, x = 8 * (place // 3), 8 * (place % 3)
            np.testing.assert_array_equal(patch, whole[y : y + 8, x : x + 8])
        assert found.logits(i) is None
    with pytest.raises(IndexError, match=r"expected an image in 0..6, got 7"):
        found[7]
    assert list(pickle.loads(pickle.dumps(found))[6][1]) == records[6]["kept"]


@pytest.mark.parametrize("background", ["mean", "blurred", "black", (1.0, 0.0, 0.5)])
def test_whole_images_are_over_a_background(tmp_path: Path, background: Any) -> None:
    write_shards(a_pool(tmp_path / "pool"), tmp_path / "shards")
    found = SparseImageDataset(tmp_path / "shards", background)
    parts = [batch(size, seed=seed) for seed, size in enumerate(BATCHES)]
    expected = torch.cat([over(images, masks, background) for images, masks, _ in parts])
    for i, (image, label) in enumerate(found):
        torch.testing.assert_close(image, expected[i], rtol=0, atol=1e-6)
        assert label == [0, 1, 2, 0, 1, 2, 0][i]


def test_logits_are_those_of_the_kept_patches(tmp_path: Path) -> None:
    model = load_teacher("fashion-canvas")
    teacher = SparseViT(model)
    space = image_space(teacher, None, None)
    pixels = torch.randint(256, (4, 3, 64, 64)) / 255
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    for mask, count in zip(masks, (5, 9, 9, 5), strict=True):
        mask.view(-1)[torch.randperm(64)[:count]] = True
    with Pool.create(tmp_path / "pool", SETTINGS, NAMES) as pool:
        pool.add(pixels, masks, [{"label": 0}] * 4)
    write_shards(tmp_path / "pool", tmp_path / "shards", model)
    found = SparseImageDataset(tmp_path / "shards")
    for i, (patches, kept, _) in enumerate(found):
        expected = teacher(space.normalize(pixels[i : i + 1]), kept[None]).logits
        given = normalized(patches[None], space)
        own = teacher.forward_patches(given, kept[None]).logits
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logits(i), own[0].half(), rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"expected a teacher of \[2, 3\] patches of 8"):
        write_shards(a_pool(tmp_path / "other"), tmp_path / "more", model)


def test_a_loader_of_equal_numbers(tmp_path: Path) -> None:
    images, _, records = batch(4)
    masks = torch.zeros(4, 2, 3, dtype=torch.bool)
    masks[:, 1, :2] = True
    with Pool.create(tmp_path / "pool", SETTINGS, NAMES) as pool:
        pool.add(images, masks, records)
    write_shards(tmp_path / "pool", tmp_path / "shards")
    patches, kept, labels = next(iter(DataLoader(SparseImageDataset(tmp_path / "shards"), 4)))
    assert patches.shape == (4, 2, 8, 8, 3) and kept.tolist() == [[3, 4]] * 4
    assert labels.tolist() == [0, 1, 2, 0]


def set_header(path: Path, **entries: str) -> None:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] |= entries
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda path: path.unlink(),
            r"file 0 of 5, got 4 files, of which this one is number 0",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"00001.safetensors failed"),
        (lambda path: path.write_bytes(b""), r"00001.safetensors failed"),
        (
            lambda path: set_header(path, format="smi_fast shard 2"),
            "the newer version 'smi_f",
        ),
        (lambda path: set_header(path, format="x"), "expected a smi_fast shard 1, got 'x'"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Any, sentence: str) -> None:
    out = tmp_path / "shards"
    assert write_shards(a_pool(tmp_path / "pool"), out, most_bytes=SMALL) == 5
    damage(out / "00001.safetensors")
    with pytest.raises(PoolError, match=sentence):
        SparseImageDataset(out)


def test_what_cannot_be_sharded(tmp_path: Path) -> None:
    pool = a_pool(tmp_path / "pool")
    with pytest.raises(PoolError, match=r"expected shards in .*, got none"):
        SparseImageDataset(tmp_path / "none")
    with pytest.raises(ValueError, match="expected a background mean"):
        SparseImageDataset(tmp_path / "none", "grey")
    with pytest.raises(PoolError, match="expected a missing or empty folder for --out"):
        write_shards(pool, pool)
    with pytest.raises(PoolError, match=r"expected shards of \d+ bytes or more for image"):
        write_shards(pool, tmp_path / "small", most_bytes=1024 + 500)
    Pool.create(tmp_path / "empty", SETTINGS, NAMES).close()
    with pytest.raises(PoolError, match="expected a pool of images, got an empty one"):
        write_shards(tmp_path / "empty", tmp_path / "out")
    (pool / "masks/0000/000000.png").write_bytes(b"x")
    with pytest.raises(PoolError, match=r"reading .*masks/0000/000000.png failed"):
        write_shards(pool, tmp_path / "damaged")


def test_the_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pool, smi = a_pool(tmp_path / "pool"), Smi(monkeypatch, capsys)
    out = tmp_path / "shards"
    assert smi("export", pool, "--layout", "shards", "--out", out) == (
        0,
        f"7 images in {out}\n",
        "",
    )
    assert len(SparseImageDataset(out)) == 7
    for arguments, sentence in (
        (("--layout", "coco"), "expected --layout shards, imagenet, webdataset, got 'coco'"),
        (("--layout", "imagenet", "--teacher", "x"), "expected --layout shards with --teacher"),
        (("--layout", "shards", "--checkpoint", "x"), "expected --teacher with --checkpoint"),
    ):
        code, _, err = smi("export", pool, *arguments, "--out", tmp_path / "more")
        assert code == 2 and err.count("\n") == 1 and sentence in err
