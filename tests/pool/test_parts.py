"""Parts of the metadata, which the processes of a group write, become the metadata."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from smi_fast.pool import Pool, PoolError, metadata
from smi_fast.pool.check import find_faults
from smi_fast.pool.parts import Part
from tests.helpers.pools import NAMES, SETTINGS, batch, files


def add(pool: Path, rank: int, *numbers: int) -> None:
    """Adds batches of two images each, as process ``rank``."""
    part = Part(pool, Pool(pool).settings, rank)
    for number in numbers:
        part.add(*batch(2, seed=number), batch=number, start=2 * number, seconds=number + 0.5)
    part.close()


def in_order(path: Path, count: int) -> dict[str, bytes]:
    """The files of a pool that one process made."""
    with Pool.create(path, SETTINGS, NAMES) as pool:
        for number in range(count):
            pool.add(*batch(2, seed=number))
    return files(path)


def test_batches_wait_until_their_turn_has_come(tmp_path: Path) -> None:
    expected = in_order(tmp_path / "whole", 4)
    pool = tmp_path / "pool"
    Pool.create(pool, SETTINGS, NAMES).close()
    add(pool, 0, 0, 3)
    add(pool, 1, 2)
    assert Pool(pool).records == []
    with Pool.resume(pool, SETTINGS, NAMES) as found:
        assert (len(found.records), found.batches) == (2, 1)
        assert found.ahead == {2: range(4, 6), 3: range(6, 8)}
        assert [path.name for path in (pool / "parts").iterdir()] == ["ahead.jsonl"]
    with Pool.resume(pool, SETTINGS, NAMES) as found:
        assert found.ahead == {2: range(4, 6), 3: range(6, 8)}
        found.add(*batch(2, seed=1))
        assert (len(found.records), found.batches, found.ahead) == (8, 4, {})
        assert found.records == Pool(pool).records
    assert files(pool) == expected
    lines = (pool / "report/seconds.jsonl").read_text().splitlines()
    assert sorted(lines) == [f'{{"batch": {i}, "seconds": {i}.5}}' for i in (0, 2, 3)]


def test_a_part_that_was_cut_off_loses_its_last_batch(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    add(tmp_path, 0, 0, 1)
    part = tmp_path / "parts/0000.jsonl"
    whole = part.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    part.write_bytes(whole[: ends[2] + 7])
    with Pool.resume(tmp_path, SETTINGS, NAMES) as found:
        assert len(found.records) == 2
        assert len(list((tmp_path / "images").glob("*/*.png"))) == 2
    assert not (tmp_path / "parts").exists()


def test_a_part_that_is_gone_is_made_again(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    add(tmp_path, 0, 0)
    add(tmp_path, 1, 1)
    (tmp_path / "parts/0000.jsonl").unlink()
    with Pool.resume(tmp_path, SETTINGS, NAMES) as found:
        assert (len(found.records), found.ahead) == (0, {1: range(2, 4)})


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"index": 2', '"index": 7', "line 1 is not the record of an image of its batch"),
        ('"index": 3', '"index": 2', "line 2 is not the record of an image of its batch"),
        ('"label": 1', '"label": 11', "line 2 is not the record of an image of its batch"),
        ('"batch": 1', '"batch": 0', "expected image 0 first in batch 0 of parts/, got image 2"),
        ("{", "[", "Expecting"),
    ],
)
def test_a_damaged_part_is_named(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    add(tmp_path, 0, 1)
    part = tmp_path / "parts/0000.jsonl"
    part.write_text(part.read_text().replace(old, new))
    before = files(tmp_path)
    with pytest.raises(PoolError, match=sentence):
        Pool.resume(tmp_path, SETTINGS, NAMES)
    assert files(tmp_path) == before


def test_a_picture_that_a_part_names_is_missing(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    add(tmp_path, 0, 1)
    (tmp_path / "masked/0001/000003.png").unlink()
    with pytest.raises(PoolError, match=r"masked/0001/000003.png is missing: put it back"):
        Pool.resume(tmp_path, SETTINGS, NAMES)


def test_no_second_writer_while_a_process_adds(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    part = Part(tmp_path, Pool(tmp_path).settings, 1)
    attempts = [partial(make, tmp_path, SETTINGS, NAMES) for make in (Pool.create, Pool.resume)]
    attempts.append(partial(Part, tmp_path, {}, 1))
    for attempt in attempts:
        with pytest.raises(PoolError, match=f"another process adds images to {tmp_path}"):
            attempt()
    part.close()
    Pool.resume(tmp_path, SETTINGS, NAMES).close()


def test_a_batch_that_cannot_be_written_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    part = Part(tmp_path, Pool(tmp_path).settings, 0)
    part.add(*batch(2, seed=0), batch=0, start=0)
    append = metadata.append

    def full(*arguments: Any) -> int:
        append(*arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "append", full)
        with pytest.raises(PoolError, match=r"0000.jsonl failed: No space left on device; the ima"):
            part.add(*batch(2, seed=1), batch=1, start=2)
    part.add(*batch(2, seed=2), batch=2, start=4)
    part.close()
    with Pool.resume(tmp_path, SETTINGS, NAMES) as found:
        assert (len(found.records), found.ahead) == (2, {2: range(4, 6)})


def test_overwrite_and_check_know_parts(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    add(tmp_path, 0, 1)
    assert list(find_faults(tmp_path)) == [
        f"{tmp_path / 'parts'} has 2 images of an unfinished run: --resume takes them"
    ]
    (tmp_path / "parts/notes.txt").write_text("mine")
    Pool.create(tmp_path, SETTINGS, NAMES, overwrite=True).close()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["notes.txt"]
    assert set(files(tmp_path)) == {"settings.json", "classes.txt", "README.md", "parts/notes.txt"}
