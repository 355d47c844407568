"""The pool on disk: exact pixels, nothing half-written, nothing lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smi_fast import pool
from smi_fast.background import over
from smi_fast.pool import Pool, PoolError, metadata, pictures
from tests.helpers.pools import NAMES, SETTINGS, batch, files, read

ZERO = {"label": 0}
# What every pool has.
ALWAYS = {"settings.json", "classes.txt", "README.md"}


def hash_of_files(path: Path, record: dict[str, Any]) -> str:
    names = ("file_name", "masked_file_name", "mask_file_name")
    content = b"".join((path / record[name]).read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()


def fail_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    """Makes the call number ``count`` of a function find the disk full."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


def test_pixels_masks_and_records_come_back_exactly(tmp_path: Path) -> None:
    images, masks, records = batch(5)
    with Pool.create(tmp_path / "pool", SETTINGS, NAMES) as made:
        made.add(images[:3], masks[:3], records[:3])
        made.add(images[3:], masks[3:], records[3:])

    found = Pool(tmp_path / "pool").records
    assert len(found) == 5
    masked = over(images, masks, "mean")
    for i, record in enumerate(found):
        assert record == {
            **records[i],
            "index": i,
            "batch": i // 3,
            "batch_size": 3 if i < 3 else 2,
            "class_name": f"class {i % 3}",
            "kept": [k for k in range(6) if masks[i].flatten()[k]],
            "file_name": f"images/000{i % 3}/{i:06}.png",
            "masked_file_name": f"masked/000{i % 3}/{i:06}.png",
            "mask_file_name": f"masks/000{i % 3}/{i:06}.png",
            "sha256": hash_of_files(tmp_path / "pool", record),
        }
        for key, pixels in (("file_name", images), ("masked_file_name", masked)):
            expected = (pixels[i] * 255).round().permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(read(tmp_path / "pool" / record[key]), expected)
        mask = read(tmp_path / "pool" / record["mask_file_name"])
        np.testing.assert_array_equal(mask, np.where(masks[i].numpy(), 255, 0))


@pytest.mark.parametrize("background", ["blurred", "black", (0.0, 0.6, 1.0)])
def test_masked_images_are_over_the_background_of_the_pool(tmp_path: Path, background: Any) -> None:
    images, masks, records = batch(2)
    made = Pool.create(tmp_path, SETTINGS, NAMES, background=background)
    made.add(images, masks, records)
    expected = (over(images, masks, background) * 255).round().permute(0, 2, 3, 1).numpy()
    for record, pixels in zip(made.records, expected, strict=True):
        np.testing.assert_array_equal(read(tmp_path / record["masked_file_name"]), pixels)
    made.close()
    stored = background if isinstance(background, str) else list(background)
    assert Pool(tmp_path).settings["background"] == stored
    Pool.resume(tmp_path, SETTINGS, NAMES, background=background).close()
    with pytest.raises(PoolError, match=r'made with background = .*, now it is "mean"'):
        Pool.resume(tmp_path, SETTINGS, NAMES)


@pytest.mark.parametrize(
    ("classes", "folders"),
    [(1, ["0000"]), (10_000, ["0000", "9999"]), (10_001, ["00000", "10000"])],
)
def test_class_folders_sort_as_the_classes_do(
    tmp_path: Path, classes: int, folders: list[str]
) -> None:
    made = Pool.create(tmp_path, SETTINGS, [str(i) for i in range(classes)])
    images, masks, _ = batch(len(folders))
    made.add(images, masks, [{"label": int(folder)} for folder in folders])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == folders
    listed = (tmp_path / "classes.txt").read_text().split()
    assert listed == sorted(listed) and [int(folder) for folder in listed] == [*range(classes)]
    assert set(folders) <= set(listed)


def test_the_card_names_classes_and_background(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, ["t-shirt", "ankle\n  boot"], background="blurred")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\npretty_name: ") and "over a blur of each" in text
    assert "- `0000` t-shirt\n- `0001` ankle boot\n" in text
    assert "--class-map POOL/classes.txt --num-classes 2" in text


def test_resume_writes_a_missing_card_and_leaves_an_edited_one(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    before = files(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "README.md").write_text("mine")
    Pool.resume(tmp_path, SETTINGS, NAMES)
    assert files(tmp_path) == {**before, "README.md": b"mine"}


def test_values_are_rounded_to_the_nearest_of_256_and_clamped(tmp_path: Path) -> None:
    values = torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.1])
    images = values.expand(1, 3, 2, 6)
    Pool.create(tmp_path, SETTINGS, NAMES).add(images, torch.ones(1, 1, 1).bool(), [ZERO])
    assert read(tmp_path / "images/0000/000000.png")[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floats_and_layouts(tmp_path: Path, dtype: torch.dtype) -> None:
    images = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)[None, :, None, None].expand(2, 3, 4, 4)
    Pool.create(tmp_path, SETTINGS, NAMES).add(images, torch.ones(2, 1, 1).bool(), [ZERO] * 2)
    assert (read(tmp_path / "images/0000/000001.png") == [0, 128, 255]).all()


def test_an_empty_batch_adds_nothing(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    made.add(*batch(0))
    assert made.records == []


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


def test_seconds_of_each_batch_are_kept_apart(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    made.add(*batch(1), seconds=1.5)
    with (tmp_path / "report/seconds.jsonl").open("a") as file:
        file.write('{"batch": 1, "sec')  # left by a kill
    made.add(*batch(1), seconds=2.25)
    lines = (tmp_path / "report/seconds.jsonl").read_text()
    assert lines == '{"batch": 0, "seconds": 1.5}\n{"batch": 1, "seconds": 2.25}\n'
    assert not any("seconds" in record for record in made.records)
    made.close()
    Pool.create(tmp_path, SETTINGS, NAMES, overwrite=True)
    assert not (tmp_path / "report").exists()


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


def test_a_writer_reads_the_metadata_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading it for each batch would take time that grows with the square of the pool's size.
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        made.add(*batch(3))
    sizes = []
    parse = metadata.parse

    def counted(lines: Any, class_names: Any) -> Any:
        found = parse(lines, class_names)
        sizes.append(found[1])
        return found

    monkeypatch.setattr(metadata, "parse", counted)
    with Pool.resume(tmp_path, SETTINGS, NAMES) as found:
        for seed in range(3):
            found.add(*batch(2, seed=seed), loss={"stops": [], "history": {"l": [1.0]}})
            pictures.draw_loss(found)
            assert len(found.records) == 5 + 2 * seed
        pictures.draw_sheet(found)
        held = found.records
    assert len(sizes) == 1
    assert held == Pool(tmp_path).records and len(sizes) == 2


def test_equal_texts_of_records_are_one_object(tmp_path: Path) -> None:
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        for _ in range(2):
            made.add(
                *batch(1)[:2], [{**ZERO, "schedule": "S" * 99, "versions": {"torch": "t" * 9}}]
            )
        for records in (made.records, Pool(tmp_path).records):
            assert len({id(record["schedule"]) for record in records}) == 1
            assert len({id(record["versions"]["torch"]) for record in records}) == 1
            assert len({id(key) for record in records for key in record}) == len(records[0])


def test_resume_minds_no_order_of_keys(tmp_path: Path) -> None:
    Pool.create(tmp_path, {"seed": 0, "weights": {"l1": 0.1, "l2": 0.2}}, NAMES)
    Pool.resume(tmp_path, {"weights": {"l2": 0.2, "l1": 0.1}, "seed": 0}, NAMES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "made with seed = 0, now it is 1"),
        ({"at": (50, 99), "seed": 1}, r"made with at = \[50, 100\], now it is \[50, 99\]"),
        ({"lr": 0.1}, "made with lr = nothing, now it is 0.1"),
    ],
)
def test_resume_refuses_other_settings(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES)
    with pytest.raises(PoolError, match=sentence):
        Pool.resume(tmp_path, {**SETTINGS, **change}, NAMES)


def test_create_and_resume_refuse_a_folder_with_something_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for attempt in (Pool.create, Pool.resume, partial(Pool.create, overwrite=True)):
        with pytest.raises(PoolError, match=r"not empty, and not a pool .* choose another folder"):
            attempt(tmp_path, SETTINGS, NAMES)
    assert files(tmp_path) == {"thesis.tex": b"precious"}
    assert len(list(tmp_path.iterdir())) == 1


def test_create_refuses_a_pool_and_overwrites_it_when_told(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).add(*batch(2))
    (tmp_path / "report").mkdir()
    (tmp_path / pool.CONTACT_SHEET).write_bytes(b"of the old images")
    (tmp_path / "notes.txt").write_text("not the pool's")
    with pytest.raises(PoolError, match=r"not empty.*--resume.*--overwrite"):
        Pool.create(tmp_path, SETTINGS, NAMES)
    assert len(Pool(tmp_path).records) == 2

    made = Pool.create(tmp_path, {"seed": 1}, NAMES, overwrite=True)
    assert made.records == []
    assert set(files(tmp_path)) == {*ALWAYS, "notes.txt"}
    settings = json.loads((tmp_path / "settings.json").read_text())
    own = {"format": "smi_fast pool 2", "background": "mean", "class_names": NAMES}
    assert settings == made.settings == {**own, "seed": 1}


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


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (Pool.create, Pool.resume):
        with pytest.raises(PoolError, match="Not a directory"):
            attempt(tmp_path / "file" / "pool", SETTINGS, NAMES)
    with pytest.raises(PoolError, match="File exists"):
        Pool.create(tmp_path / "file", SETTINGS, NAMES)
    fail_at_call(monkeypatch, os, "replace", 1)
    with pytest.raises(PoolError, match=r"settings.json failed: No space left"):
        Pool.create(tmp_path / "pool", SETTINGS, NAMES)
    Pool.create(tmp_path / "pool", SETTINGS, NAMES)


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        made.add(*batch(2))
    good = (tmp_path / "metadata.jsonl").read_text()
    wrong = "line 1 is not the record of image 0"
    for damaged, sentence in (
        ('{"index": 0\n', "Expecting"),
        ("{}\n", wrong),
        ("[]\n", wrong),
        (good.replace("images/0000/000000", "../../000000"), wrong),
        (good.replace("images/0000/000000", "/etc/000000"), wrong),
        (good.splitlines(keepends=True)[1], wrong),
        (good.replace('"label": 0', '"label": 10'), wrong),
        (good.replace('"label": 0', '"label": -1'), wrong),
        (good.replace('"label": 0', '"label": "0"'), wrong),
        (good.replace('"label": 0', '"label": false'), wrong),
        (good.replace('"label": 1', '"label": 2'), "line 2 is not the record of image 1"),
        (good.replace("class 0", "class 1"), wrong),
        (good.replace('"batch_size": 2', '"batch_size": 0'), wrong),
        (good.replace('"batch_size": 2', '"batch_size": 1'), "line 2 is not the record"),
        (good.replace('"seed": 0', '"confidence": NaN'), "NaN is no value of JSON"),
        ("[" * 10**5 + "\n", "nested too deep"),
    ):
        (tmp_path / "metadata.jsonl").write_text(damaged)
        with pytest.raises(PoolError, match=f"reading .*metadata.jsonl failed: .*{sentence}"):
            Pool.resume(tmp_path, SETTINGS, NAMES)
    (tmp_path / "metadata.jsonl").write_text(good)
    assert len(Pool.resume(tmp_path, SETTINGS, NAMES).records) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"editor.tabSize": 4}', "not a pool of this version"),
        ('{"teacher": "fashion-canvas", "seed": 0}', "not a pool of this version"),
        ("[]", "not a pool of this version"),
        ('// comment\n{"a": 1}', "Expecting value"),
        ('{"format": "smi_fast pool 1"}', "an older version: smi-fast migrate .* --out makes one"),
        ('{"format": "smi_fast pool 3"}', "to be a smi_fast pool 2, got the newer version .* 3"),
        ('{"format": "smi_fast pool 2"}', "settings.json failed: expected a background .*, got N"),
        ('{"format": "smi_fast pool 2", "background": "mean"}', "names of classes"),
        ("[" * 10**5, "nested too deep"),
    ],
)
def test_settings_of_something_else_make_no_pool(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.png").write_bytes(b"holiday")
    before = files(tmp_path)
    for attempt in (Pool.create, Pool.resume, partial(Pool.create, overwrite=True)):
        with pytest.raises(PoolError, match=sentence):
            attempt(tmp_path, SETTINGS, NAMES)
    assert files(tmp_path) == before


def test_overwrite_deletes_only_what_a_pool_wrote(tmp_path: Path) -> None:
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        made.add(*batch(2), loss={"stops": [], "history": {"l": [1.0]}}, seconds=1.0)
        made.add_unfinished(batch(1)[0])
    foreign = ["notes.txt", "images/holiday.jpg", "images/0000/1.png", "images/0000/0000001.png"]
    foreign += ["masks/0000/000000.png.bak", "unfinished/mine.png", "masked/sub/000000.png"]
    foreign += ["masked/0001/sub/000000.png", "report/mine.png"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"precious")
    for name in ("report/.loss.png.part", ".README.md.part", "images/0000/.000007.png.part"):
        (tmp_path / name).write_bytes(b"left by a kill")
    Pool.create(tmp_path, SETTINGS, NAMES, overwrite=True)
    assert set(files(tmp_path)) == {*ALWAYS, *foreign}


@pytest.mark.parametrize("folder", ["images", "masks/0000", "unfinished", "report"])
def test_overwrite_follows_no_link(tmp_path: Path, folder: str) -> None:
    with Pool.create(tmp_path / "pool", SETTINGS, NAMES) as made:
        made.add(*batch(1), seconds=1.0)
        made.add_unfinished(batch(1)[0])
    (tmp_path / "pool" / folder).rename(tmp_path / "elsewhere")
    (tmp_path / "pool" / folder).symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path)
    with pytest.raises(PoolError, match=f"{folder} is a symbolic link, which is not followed"):
        Pool.create(tmp_path / "pool", SETTINGS, NAMES, overwrite=True)
    assert files(tmp_path) == before


def test_a_pool_without_images_can_be_created_again(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).add_unfinished(batch(1)[0])
    Pool.create(tmp_path, {"seed": 1}, NAMES).add(*batch(1))
    assert Pool.resume(tmp_path, {"seed": 1}, NAMES).records[0]["index"] == 0


def test_traces_of_a_killed_start_are_no_obstacle(tmp_path: Path) -> None:
    for name in (".lock", ".settings.json.part"):
        (tmp_path / name).write_bytes(b"")
    Pool.create(tmp_path, SETTINGS, NAMES)
    assert set(files(tmp_path)) == ALWAYS


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = Pool.create(tmp_path, SETTINGS, NAMES)
    first.add(*batch(1))
    for attempt in (Pool.create, Pool.resume, partial(Pool.create, overwrite=True)):
        with pytest.raises(PoolError, match=f"another process adds images to {tmp_path}"):
            attempt(tmp_path, SETTINGS, NAMES)
    assert len(Pool(tmp_path).records) == 1  # reading needs no lock
    first.close()
    with Pool.resume(tmp_path, SETTINGS, NAMES) as second:
        second.add(*batch(1))
    assert len(Pool.resume(tmp_path, SETTINGS, NAMES).records) == 2


@pytest.mark.parametrize("folder", ["images", "masked", "masks"])
def test_resume_misses_a_file(tmp_path: Path, folder: str) -> None:
    with Pool.create(tmp_path, SETTINGS, NAMES) as made:
        made.add(*batch(2))
    (tmp_path / folder / "0001/000001.png").unlink()
    with pytest.raises(PoolError, match=f"{folder}/0001/000001.png is missing: put it back"):
        Pool.resume(tmp_path, SETTINGS, NAMES)


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


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"stops": [], "history": {"l": ["x"]}}', '{"stops": 3, "history": {}}', "{"],
)
def test_a_damaged_loss_is_named(tmp_path: Path, text: str) -> None:
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    made.add(*batch(1), loss={"stops": [2], "history": {"l": [1, 0.5]}})
    assert made.loss == {"stops": [2], "history": {"l": [1, 0.5]}}
    (tmp_path / "report/loss.json").write_text(text)
    with pytest.raises(PoolError, match=r"reading .*loss.json failed"):
        made.loss  # noqa: B018


def test_add_says_what_it_expected(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    images, masks, records = batch(2)
    for arguments, sentence in (
        ((images[:1], masks, records), r"images as floats \[2, 3, H, W\].*\[1, 3, 16, 24\]"),
        (((images * 255).byte(), masks, records), r"images as floats .* got torch.uint8"),
        ((images[..., :8], masks, records), r"divide images of \[16, 8\] pixels, got \[2, 3\]"),
        ((images, masks[:, :0], records), r"divide images of \[16, 24\] pixels, got \[0, 3\]"),
        ((images, masks.float(), records), r"masks as bool .* got torch.float32"),
        ((images, masks, records[:1]), r"for 1 records, got .*\[2, 3, 16, 24\]"),
        ((images, masks, [{**ZERO, "confidence": float("nan")}] * 2), "JSON compliant"),
        ((images, masks, [ZERO, {"label": 10}]), r"a label in 0..9, got 10"),
        ((images, masks, [ZERO, {"label": -1}]), r"a label in 0..9, got -1"),
        ((images, masks, [ZERO, {"label": True}]), r"a label in 0..9, got True"),
        ((images, masks, [ZERO, {}]), r"a label in 0..9, got None"),
    ):
        with pytest.raises(ValueError, match=sentence):
            made.add(*arguments)
    with pytest.raises(ValueError, match="only reads"):
        Pool(tmp_path).add(*batch(1))
    assert set(files(tmp_path)) == ALWAYS


def test_create_says_what_it_expected(tmp_path: Path) -> None:
    for names, background, sentence in (
        ([], "mean", r"the names of one class or more, got \[\]"),
        ("cat", "mean", "the names of one class or more, got 'cat'"),
        ([1], "mean", r"the names of one class or more, got \[1\]"),
        (NAMES, "grey", "expected a background mean"),
        (NAMES, (0.5, 0.5), "a background colour of 3 channels"),
    ):
        for attempt in (Pool.create, Pool.resume):
            with pytest.raises(ValueError, match=sentence):
                attempt(tmp_path / "pool", SETTINGS, names, background=background)
    assert not (tmp_path / "pool").exists()
    with pytest.raises(PoolError, match=r"expected a pool in .*, got an empty or missing folder"):
        Pool(tmp_path / "pool").settings  # noqa: B018


def test_write_atomically_keeps_the_old_file(tmp_path: Path) -> None:
    pool.write_atomically(tmp_path / "new" / "plot.png", lambda file: file.write(b"old"))

    def half(file: Any) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.write_atomically(tmp_path / "new" / "plot.png", half)
    assert files(tmp_path) == {"new/plot.png": b"old"}
