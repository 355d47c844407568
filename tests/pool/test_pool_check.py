"""A check finds each file that is missing, damaged or without a record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smi_fast.pool import Pool, PoolError
from smi_fast.pool.check import find_faults
from tests.helpers.pools import NAMES, SETTINGS, batch
from tests.helpers.smi import Smi


def a_pool(path: Path) -> Path:
    with Pool.create(path, SETTINGS, NAMES) as pool:
        pool.add(*batch(2))
        pool.add(*batch(3, seed=1))
    return path


def without_hashes(path: Path) -> None:
    """Makes the pool one whose records have no hash, so that the pixels must tell."""
    records = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    for record in records:
        del record["sha256"]
    (path / "metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def overwrite(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(content)


def picture(name: str, *shape: int) -> Callable[[Path], Any]:
    return lambda path: Image.fromarray(np.zeros(shape, np.uint8)).save(path / name)


def test_a_whole_pool_has_no_fault(tmp_path: Path) -> None:
    assert list(find_faults(a_pool(tmp_path))) == []
    without_hashes(tmp_path)
    assert list(find_faults(tmp_path)) == []


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / "masked/0001/000001.png").unlink(), "image 1: .* can't be read: No"),
        (overwrite("images/0002/000004.png", b""), "image 4: its files are not those that were"),
        (picture("images/0000/000002.png", 16, 24, 3), "image 2: its files are not those"),
        (overwrite("masks/0007/000003.png", b""), "masks/0007/000003.png has no record"),
        (overwrite("images/0000/000009.png", b""), "images/0000/000009.png has no record"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, damage: Any, sentence: str) -> None:
    a_pool(tmp_path)
    (tmp_path / "masks/0007").mkdir()
    damage(tmp_path)
    faults = list(find_faults(tmp_path))
    assert len(faults) == 1
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(faults[0])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (overwrite("images/0002/000004.png", b"x"), "image 4: a file is no picture: cannot"),
        (picture("images/0002/000004.png", 8, 24, 3), r"image 4: expected a whole image of \[16"),
        (picture("masked/0000/000000.png", 16, 24), r"image 0: expected a masked image of \[16"),
        (picture("masks/0001/000001.png", 3, 3), r"image 1: expected a mask that divides \[16, 24"),
        (picture("masks/0001/000001.png", 2, 3), "image 1: its mask is not that of its kept"),
    ],
)
def test_pixels_tell_where_there_is_no_hash(tmp_path: Path, damage: Any, sentence: str) -> None:
    without_hashes(a_pool(tmp_path))
    damage(tmp_path)
    faults = list(find_faults(tmp_path))
    assert len(faults) == 1
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(faults[0])


def test_labels_and_other_folders(tmp_path: Path) -> None:
    a_pool(tmp_path / "pool")
    path = tmp_path / "pool/metadata.jsonl"
    path.write_text(path.read_text().replace('"label": 1', '"label": 2'))
    with pytest.raises(PoolError, match="line 2 is not the record of image 1"):
        list(find_faults(tmp_path / "pool"))
    with pytest.raises(PoolError, match=r"expected a pool in .*, got an empty or missing folder"):
        list(find_faults(tmp_path / "none"))


def test_the_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    smi = Smi(monkeypatch, capsys)
    a_pool(tmp_path)
    assert smi("pool", "check", tmp_path) == (0, f"5 images in {tmp_path}: nothing wrong\n", "")
    (tmp_path / "images/0000/000000.png").unlink()
    code, out, err = smi("pool", "check", tmp_path)
    assert (code, err) == (1, "") and out.endswith(f"5 images in {tmp_path}: 1 wrong\n")
    assert "images/0000/000000.png can't be read: No such file or directory\n" in out
