"""Pools become one, with the same files under other numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smi_fast.pool import CONTACT_SHEET, Pool, PoolError
from smi_fast.pool.check import find_faults
from smi_fast.pool.merge import merge
from tests.helpers.pools import NAMES, SETTINGS, batch, files
from tests.helpers.smi import Smi

KEYS = ("file_name", "masked_file_name", "mask_file_name")
NUMBERS = {*KEYS, "index", "batch", "trajectory"}


def make(path: Path, seed: int, sizes: tuple[int, ...], **settings: Any) -> Path:
    with Pool.create(path, {**SETTINGS, "seed": seed, **settings}, NAMES) as pool:
        for number, size in enumerate(sizes):
            images, masks, records = batch(size, seed=10 * seed + number)
            records = [{**record, "trajectory": i // 2} for i, record in enumerate(records)]
            loss = {"stops": [], "history": {"l": [float(seed), number]}}
            pool.add(images, masks, records, loss=loss, seconds=seed + 0.5, moments=[images] * 2)
    return path


def test_nothing_is_lost(tmp_path: Path) -> None:
    paths = [make(tmp_path / "a", 1, (2, 3)), make(tmp_path / "b", 2, (4,), lr=0.1)]
    before = [files(path) for path in paths]
    made = merge(paths, tmp_path / "c")
    assert [files(path) for path in paths] == before
    assert list(find_faults(tmp_path / "c")) == []
    old = [(path, record) for path in paths for record in Pool(path).records]
    assert len(made.records) == len(old) == 9
    for index, ((path, before_it), after) in enumerate(zip(old, made.records, strict=True)):
        assert after["index"] == index
        same = {key: value for key, value in before_it.items() if key not in NUMBERS}
        assert same == {key: value for key, value in after.items() if key not in NUMBERS}
        pairs = [(before_it[key], after[key]) for key in KEYS]
        strip = "report/progress/{:06}.png".format
        pairs.append((strip(before_it["index"]), strip(index)))
        for source, target in pairs:
            assert (path / source).read_bytes() == (tmp_path / "c" / target).read_bytes()
    assert [record["batch"] for record in made.records] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [record["trajectory"] for record in made.records] == [0, 0, 0, 0, 1, 2, 2, 3, 3]
    assert made.loss == Pool(paths[1]).loss
    lines = (tmp_path / "c/report/seconds.jsonl").read_text().splitlines()
    assert lines == [f'{{"batch": {i}, "seconds": {s}}}' for i, s in enumerate((1.5, 1.5, 2.5))]
    settings = made.settings
    assert settings["merged"] == [{"seed": 1}, {"seed": 2, "lr": 0.1}]
    assert settings["teacher"] == "fashion-canvas" and "seed" not in settings


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [make(tmp_path / "a", 1, (2, 3)), make(tmp_path / "b", 2, (4,))]
    merge(paths, tmp_path / "whole")
    add, calls = Pool.add_encoded, iter(range(9))

    def interrupted(self: Pool, *arguments: Any, **options: Any) -> None:
        add(self, *arguments, **options)
        if next(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "add_encoded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(paths, tmp_path / "parts")
    assert len(Pool(tmp_path / "parts").records) == 5
    merge(paths, tmp_path / "parts")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    with pytest.raises(PoolError, match=r"made with merged = .*, now it is"):
        merge(paths[::-1], tmp_path / "parts")
    make(tmp_path / "d", 1, (1,))
    with pytest.raises(PoolError, match=r"metadata.jsonl has images of other pools: choose anoth"):
        merge([tmp_path / "d", paths[1]], tmp_path / "parts")


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", 1, (2,)), make(tmp_path / "b", 2, (2,))
    for paths, out in (([a], "c"), ([a, a], "c"), ([a, b], "b"), ([], "c")):
        with pytest.raises(PoolError, match="expected two pools or more and another folder"):
            merge(paths, tmp_path / out)
    Pool.create(tmp_path / "names", SETTINGS, NAMES[1:]).close()
    Pool.create(tmp_path / "black", SETTINGS, NAMES, background="black").close()
    for other, key in (("names", "class_names"), ("black", "background")):
        with pytest.raises(PoolError, match=rf"the same {key}, got others in .*a and .*{other}"):
            merge([a, tmp_path / other], tmp_path / "c")
    with pytest.raises(PoolError, match=r"expected a pool in .*none, got an empty or missing"):
        merge([a, tmp_path / "none"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (b / "images/0000/000000.png").write_bytes(b"damaged")
    with pytest.raises(PoolError, match=r"image 0 of .*b are not those that were written, by the"):
        merge([a, b], tmp_path / "c")
    assert len(Pool(tmp_path / "c").records) == 2


def test_the_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    a, b = make(tmp_path / "a", 1, (2,)), make(tmp_path / "b", 2, (1,))
    smi, out = Smi(monkeypatch, capsys), tmp_path / "c"
    sentence = f"3 images in {out}; look at {out / CONTACT_SHEET}\n"
    assert smi("pool", "merge", a, b, "--out", out) == (0, sentence, "")
    assert (out / CONTACT_SHEET).exists() and (out / "report/loss.png").exists()
