"""Other tools read what is exported."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from smi_fast.pool import Pool, PoolError
from smi_fast.pool.export import export_imagenet, export_webdataset
from smi_fast.pool.page import write_page
from smi_fast.pool.shards import write_shards
from tests.helpers.pools import NAMES, SETTINGS, batch, fail_at_call, files, read


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    with Pool.create(tmp_path / "pool", SETTINGS, NAMES) as made:
        made.add(*batch(5))
    return tmp_path / "pool"


def test_imagenet_is_read_by_torchvision(pool: Path, tmp_path: Path) -> None:
    assert export_imagenet(pool, tmp_path / "out") == 5
    records = {record["index"]: record for record in Pool(pool).records}
    for split, key in (("train", "file_name"), ("train_masked", "masked_file_name")):
        images = ImageFolder(tmp_path / "out" / split)
        assert len(images) == 5
        for (path, target), (image, _) in zip(images.samples, images, strict=True):
            record = records[int(Path(path).stem)]
            assert int(images.classes[target]) == record["label"]
            np.testing.assert_array_equal(np.asarray(image), read(pool / record[key]))
    assert (tmp_path / "out/classes.txt").read_bytes() == (pool / "classes.txt").read_bytes()


@pytest.mark.parametrize(("most_bytes", "tars"), [(2**28, [1]), (16_000, [2, 3, 4]), (1, [5])])
def test_webdataset_has_every_file_and_record(
    pool: Path, tmp_path: Path, most_bytes: int, tars: list[int]
) -> None:
    assert export_webdataset(pool, tmp_path / "out", most_bytes=most_bytes) == 5
    paths = sorted((tmp_path / "out").iterdir())
    assert len(paths) in tars
    assert most_bytes == 1 or all(path.stat().st_size <= most_bytes for path in paths)
    found: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None and member.mtime == 0
                found[member.name] = content.read()
    records = Pool(pool).records
    assert len(found) == 5 * len(records)
    for record in records:
        stem = f"{record['index']:06}"
        assert json.loads(found[f"{stem}.json"]) == record
        assert int(found[f"{stem}.cls"]) == record["label"]
        for ending, key in (("", ""), (".masked", "masked_"), (".mask", "mask_")):
            content = (pool / record[f"{key}file_name"]).read_bytes()
            assert found[f"{stem}{ending}.png"] == content
    export_webdataset(pool, tmp_path / "again", most_bytes=most_bytes)
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize("export", [export_imagenet, export_webdataset])
def test_what_cannot_be_exported(pool: Path, tmp_path: Path, export: object) -> None:
    assert callable(export)
    with pytest.raises(PoolError, match="expected a missing or empty folder for --out, got files"):
        export(pool, pool)
    with pytest.raises(PoolError, match="expected a folder that this machine sees, got the URL"):
        export(pool, Path("s3://x"))
    with pytest.raises(PoolError, match=r"expected a pool in .*none, got an empty or missing"):
        export(tmp_path / "none", tmp_path / "out")
    (pool / "masked/0001/000001.png").unlink()
    with pytest.raises(PoolError, match=r"reading .*masked/0001/000001.png failed: No such file"):
        export(pool, tmp_path / "out")


@pytest.mark.parametrize("write", [export_imagenet, export_webdataset, write_shards, write_page])
def test_a_full_disk_is_named(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., object]
) -> None:
    before = files(pool)
    place = () if write is write_page else (tmp_path / "out",)
    fail_at_call(monkeypatch, os, "fsync", 1)
    with pytest.raises(PoolError, match=r"writing .* failed: No space left on device"):
        write(pool, *place)
    assert files(pool) == before and not any((tmp_path / "out").rglob("*.*"))
