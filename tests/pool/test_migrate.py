"""A pool of the first version becomes one of this version, with nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smi_fast.background import over
from smi_fast.pool import CONTACT_SHEET, LOSS_CURVES, Pool, PoolError
from smi_fast.pool.migrate import migrate
from tests.helpers.pools import batch, files, read
from tests.helpers.smi import Smi

LABELS = (2, 0, 4, 4, 2)
LOSS = {"stops": [2], "history": {"l": [1, 0.5, 0.25]}}
SETTINGS = {"teacher": "t", "batch_size": 2, "lr": 0.25}


def old_pool(path: Path, **settings: Any) -> list[dict[str, Any]]:
    """Writes a pool as the first version did; gives its records."""
    images, masks, _ = batch(len(LABELS))
    masked, records = over(images, masks, "black"), []
    content = {"format": "smi_fast pool 1", **SETTINGS, **settings}
    path.mkdir()
    (path / "settings.json").write_text(json.dumps(content, indent=2) + "\n")
    for i, label in enumerate(LABELS):
        record: dict[str, Any] = {"label": label, "class_name": f"class {label}", "seed": i}
        record |= {"kept_patches": int(masks[i].sum()), "index": i}
        pixels = [
            (each[i] * 255).round().byte().permute(1, 2, 0).numpy() for each in (images, masked)
        ]
        pixels.append(masks[i].byte().numpy() * 255)
        for key, folder, array in zip(
            ("image", "masked", "mask"), ("images", "masked", "masks"), pixels, strict=True
        ):
            record[key] = f"{folder}/{i:06}.png"
            (path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(path / record[key])
        records.append(record)
    (path / "manifest.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (path / "loss.json").write_text(json.dumps(LOSS) + "\n")
    return records


def test_nothing_is_lost(tmp_path: Path) -> None:
    records = old_pool(tmp_path / "old")
    before = files(tmp_path / "old")
    made = migrate(tmp_path / "old", tmp_path / "new")
    assert files(tmp_path / "old") == before
    assert made.loss == LOSS
    names = ["class 0", "1", "class 2", "3", "class 4"]
    own = {"format": "smi_fast pool 2", "background": "black", "class_names": names}
    assert made.settings == {**SETTINGS, **own}
    keys = {"image": "file_name", "masked": "masked_file_name", "mask": "mask_file_name"}
    assert len(made.records) == len(records)
    for old, new in zip(records, made.records, strict=True):
        for before_name, name in keys.items():
            pixels = read(tmp_path / "old" / old.pop(before_name))
            np.testing.assert_array_equal(read(tmp_path / "new" / new[name]), pixels)
        assert old.items() <= new.items()
        assert len(new["kept"]) == old["kept_patches"]
    assert [record["batch"] for record in made.records] == [0, 0, 1, 1, 2]


def test_by_one_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    old_pool(tmp_path / "old")
    smi = Smi(monkeypatch, capsys)
    code, out, err = smi("migrate", tmp_path / "old", "--out", tmp_path / "new")
    assert (code, err) == (0, "") and out.startswith(f"5 images in {tmp_path / 'new'}; look at ")
    assert len(Pool(tmp_path / "new").records) == 5
    assert (tmp_path / "new" / CONTACT_SHEET).exists() and (tmp_path / "new" / LOSS_CURVES).exists()
    code, _, err = smi("migrate", tmp_path / "old", "--out", tmp_path / "new")
    assert code == 2 and "not empty" in err
    code, _, err = smi("invert", "--out", tmp_path / "old", "--overwrite")
    sentence = f"{tmp_path / 'old'} is a pool of an older version: smi-fast migrate "
    assert (code, err.count("\n")) == (2, 1) and sentence in err
    assert len(list((tmp_path / "old/images").iterdir())) == 5


def test_an_empty_pool_and_odd_settings(tmp_path: Path) -> None:
    old_pool(tmp_path / "a", batch_size="many")
    assert {record["batch_size"] for record in migrate(tmp_path / "a", tmp_path / "b").records} == {
        1
    }
    (tmp_path / "a/manifest.jsonl").unlink()
    assert migrate(tmp_path / "a", tmp_path / "c").records == []


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("settings.json", b"{}", "old to be a smi_fast pool 1, got None in settings.json"),
        ("settings.json", b"[", "reading .*settings.json failed"),
        ("settings.json", None, "reading .*settings.json failed: No such file"),
        ("manifest.jsonl", b"{}\n", "manifest.jsonl failed: line 1 is not the record of image 0"),
        ("manifest.jsonl", b"[]\n", "manifest.jsonl failed: line 1 is not the record of image 0"),
        ("images/000003.png", None, "reading .*images/000003.png failed"),
        ("masks/000001.png", b"x", "reading .*masks/000001.png failed"),
        ("loss.json", b"{", "reading .*loss.json failed"),
    ],
)
def test_a_damaged_pool_is_named(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    old_pool(tmp_path / "old")
    path = tmp_path / "old" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(PoolError, match=sentence):
        migrate(tmp_path / "old", tmp_path / "new")
