"""What a pool stores: exact pixels, masks, records and cards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from smi_fast.background import over
from smi_fast.pool import Pool, PoolError, metadata, pictures
from smi_fast.pool import batch as encoding
from tests.helpers.pools import ALWAYS, NAMES, SETTINGS, ZERO, batch, files, read


def hash_of_files(path: Path, record: dict[str, Any]) -> str:
    names = ("file_name", "masked_file_name", "mask_file_name")
    content = b"".join((path / record[name]).read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()


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


def test_images_are_encoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, png = Barrier(2), encoding.png

    def waiting(pixels: Any) -> bytes:
        together.wait(timeout=20)
        return png(pixels)

    monkeypatch.setattr(encoding, "png", waiting)
    images, masks, records = batch(2)
    Pool.create(tmp_path, SETTINGS, NAMES).add(images, masks, records)
    for image, record in zip(images, Pool(tmp_path).records, strict=True):
        expected = (image * 255).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(read(tmp_path / record["file_name"]), expected)


def test_an_empty_batch_adds_nothing(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    made.add(*batch(0))
    assert made.records == []


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
