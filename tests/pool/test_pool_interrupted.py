"""Nothing half-written and nothing lost when a write or a deletion ends early."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smi_fast import pool
from smi_fast.pool import Pool, PoolError, metadata
from tests.helpers.pools import ALWAYS, NAMES, SETTINGS, batch, fail_at_call, files, read


@pytest.mark.parametrize(("owner", "name", "calls"), [(os, "replace", 6), (os, "fsync", 7)])
def test_a_full_disk_leaves_the_pool_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    # Two images are three files each, and then their lines.
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    made.add(*batch(3, seed=1))
    before = files(tmp_path)
    for count in range(1, calls + 1):
        with monkeypatch.context() as patch:
            fail_at_call(patch, owner, name, count)
            with pytest.raises(PoolError) as caught:
                made.add(*batch(2, seed=2))
        written = "metadata.jsonl" if count == 7 else f"00000{3 + (count - 1) // 3}.png"
        assert written in str(caught.value)
        assert "No space left on device; images safe in the pool: 3" in str(caught.value)
        assert files(tmp_path) == before

    made.add(*batch(2, seed=2))
    assert [record["seed"] for record in Pool(tmp_path).records] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("count", range(1, 8))
def test_an_interrupt_leaves_only_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    # The interrupt comes right after a file is in its place, the metadata included.
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    made.add(*batch(1, seed=1))
    replace, append, calls = os.replace, metadata.append, iter(range(1, 1000))

    def interrupted(function: Any, *args: Any) -> Any:
        result = function(*args)
        if next(calls) == count:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", partial(interrupted, replace))
        patch.setattr(metadata, "append", partial(interrupted, append))
        with pytest.raises(KeyboardInterrupt):
            made.add(*batch(2, seed=2))
    assert [record["seed"] for record in made.records] == ([1, 2, 2] if count == 7 else [1])
    assert len(list((tmp_path / "images").glob("*/*.png"))) == len(made.records)

    made.add(*batch(2, seed=3))
    images = {1: batch(1, seed=1)[0], 2: batch(2, seed=2)[0], 3: batch(2, seed=3)[0]}
    for record in made.records:
        pixels = images[record["seed"]][record["label"]].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(read(tmp_path / record["file_name"]), (pixels * 255).round())


def test_left_overs_do_not_count_and_are_replaced(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    (tmp_path / "images/0000").mkdir(parents=True)
    (tmp_path / "images/0000/000000.png").write_bytes(b"half a picture")
    assert made.records == []
    made.add(*batch(1))
    assert read(tmp_path / "images/0000/000000.png").shape == (16, 24, 3)


@pytest.mark.parametrize("attempt", [Pool.create, Pool.resume])
def test_images_without_a_line_are_deleted(tmp_path: Path, attempt: Any) -> None:
    held = 0 if attempt == Pool.create else 2
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        made.add(*batch(held))
    before = files(tmp_path)
    strays = ["images/0002/000002.png", "masks/0007/000007.png", "images/0000/.000003.png.part"]
    foreign = ["images/0002/holiday.jpg", "images/mine/000009.png"]
    for name in strays + foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"left by a kill")
    attempt(tmp_path, SETTINGS, NAMES)
    assert files(tmp_path) == {**before, **dict.fromkeys(foreign, b"left by a kill")}
    assert not (tmp_path / "masks/0007").exists()


def test_a_torn_batch_is_ignored_and_cut_off(tmp_path: Path) -> None:
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        made.add(*batch(2, seed=1))
        made.add(*batch(3, seed=2))
    path = tmp_path / "metadata.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in (len(whole) - 1, ends[3] + 7, ends[2], ends[1] + 1, ends[1]):
        path.write_bytes(whole[:size])
        assert [record["seed"] for record in Pool(tmp_path).records] == [1, 1]
        assert path.read_bytes() == whole[:size]  # a reader writes nothing
        with Pool.resume(tmp_path, SETTINGS, NAMES) as found:
            assert path.read_bytes() == whole[: ends[1]]
            found.add(*batch(3, seed=2))
        assert path.read_bytes() == whole
    for size in (0, ends[0], ends[1] - 1):
        path.write_bytes(whole[:size])
        assert Pool(tmp_path).records == []
    Pool.resume(tmp_path, SETTINGS, NAMES).close()
    assert set(files(tmp_path)) == ALWAYS


def test_unfinished_images_are_kept_until_the_next_batch(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    made.add(*batch(1))
    images, *_ = batch(2, seed=1)
    made.add_unfinished(images)
    assert len(made.records) == 1
    for i in range(2):
        expected = (images[i] * 255).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(read(tmp_path / f"unfinished/{i + 1:06}.png"), expected)
    made.add(*batch(1))
    assert len(made.records) == 2
    assert not (tmp_path / "unfinished").exists()

    made.add_unfinished(images)
    made.close()
    Pool.create(tmp_path, SETTINGS, NAMES, overwrite=True)
    assert set(files(tmp_path)) == ALWAYS


def test_resume_continues_the_numbers(tmp_path: Path) -> None:
    Pool.resume(tmp_path / "pool", SETTINGS, NAMES).add(*batch(2, seed=1))
    Pool.resume(tmp_path / "pool", SETTINGS, NAMES).add(*batch(3, seed=2))
    found = Pool(tmp_path / "pool").records
    assert [record["index"] for record in found] == [0, 1, 2, 3, 4]
    assert [record["seed"] for record in found] == [1, 1, 2, 2, 2]


def test_a_failed_overwrite_leaves_a_pool_that_can_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven files and what is left of each, then three pictures of each image.
    for count in range(1, 21):
        folder = tmp_path / str(count)
        with Pool.create(folder, SETTINGS, NAMES) as made:
            made.add(*batch(2))
        with monkeypatch.context() as patch:
            fail_at_call(patch, Path, "unlink", count)
            with pytest.raises(PoolError, match=r"deleting .* failed: No space left"):
                Pool.create(folder, SETTINGS, NAMES, overwrite=True)
        with Pool.resume(folder, SETTINGS, NAMES) as found:
            assert len(found.records) == (2 if count == 1 else 0)
        Pool.create(folder, SETTINGS, NAMES, overwrite=True).add(*batch(1))
        assert len(Pool(folder).records) == 1


def test_traces_of_a_killed_start_are_no_obstacle(tmp_path: Path) -> None:
    for name in (".lock", ".settings.json.part"):
        (tmp_path / name).write_bytes(b"")
    Pool.create(tmp_path, SETTINGS, NAMES)
    assert set(files(tmp_path)) == ALWAYS


def test_resume_deletes_unfinished_images_that_are_complete_by_now(tmp_path: Path) -> None:
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        made.add(*batch(1))
        made.add_unfinished(batch(2)[0])
    (tmp_path / "unfinished" / "000000.png").write_bytes(b"left by a kill")
    Pool.resume(tmp_path, SETTINGS, NAMES)
    assert {name for name in files(tmp_path) if "unfinished" in name} == {
        "unfinished/000001.png",
        "unfinished/000002.png",
    }


def test_write_atomically_keeps_the_old_file(tmp_path: Path) -> None:
    pool.write_atomically(tmp_path / "new" / "plot.png", lambda file: file.write(b"old"))

    def half(file: Any) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.write_atomically(tmp_path / "new" / "plot.png", half)
    assert files(tmp_path) == {"new/plot.png": b"old"}
