"""Which folders are opened as a pool, and what is refused in one sentence."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from smi_fast import pool
from smi_fast.pool import Pool, PoolError
from tests.helpers.pools import ALWAYS, NAMES, SETTINGS, batch, fail_at_call, files


def test_resume_writes_a_missing_card_and_leaves_an_edited_one(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS, NAMES).close()
    before = files(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "README.md").write_text("mine")
    Pool.resume(tmp_path, SETTINGS, NAMES)
    assert files(tmp_path) == {**before, "README.md": b"mine"}


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


def test_a_url_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/pool", "sftp://host/pool", Path("s3://bucket/pool")):
        for attempt in (Pool, partial(Pool.create, settings=SETTINGS, class_names=NAMES)):
            with pytest.raises(PoolError, match=r"a folder that this machine sees, got the URL s"):
                attempt(url)
    assert not list(tmp_path.iterdir())
    Pool.create(tmp_path / "s3:pool", SETTINGS, NAMES).close()


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
