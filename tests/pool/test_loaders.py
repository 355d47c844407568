"""Loaders of folders read a pool without code of ours, also when most classes have no image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_dataset
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from smi_fast.background import over
from smi_fast.pool import Pool
from tests.helpers.pools import NAMES, SETTINGS, batch

LABELS = (7, 3, 7, 9)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pool of three of ten classes, with all that lies beside its images."""
    path = tmp_path_factory.mktemp("pools") / "test"  # a name from which a split may be guessed
    images, masks, _ = batch(4)
    with Pool.create(path, SETTINGS, NAMES) as pool:
        for start in (0, 2):
            part = slice(start, start + 2)
            records = [{"label": label, "seed": 0} for label in LABELS[part]]
            loss = {"stops": [], "history": {"l": [1.0]}}
            pool.add(images[part], masks[part], records, loss=loss, seconds=1.5)
    (path / "report/contact_sheet.png").write_bytes((path / "images/0003/000001.png").read_bytes())
    return path


def expected(folder: str) -> dict[int, list[bytes]]:
    """The pixels [H, W, 3] of all images of each class."""
    images, masks, _ = batch(4)
    pixels = images if folder == "images" else over(images, masks, "mean")
    found: dict[int, list[bytes]] = {}
    for label, image in zip(LABELS, (pixels * 255).round().byte(), strict=True):
        found.setdefault(label, []).append(image.permute(1, 2, 0).contiguous().numpy().tobytes())
    return {label: sorted(each) for label, each in found.items()}


def collected(pairs: list[tuple[int, object]]) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for label, image in pairs:
        found.setdefault(label, []).append(np.asarray(image).tobytes())
    return {label: sorted(each) for label, each in found.items()}


@pytest.mark.parametrize("folder", ["images", "masked"])
def test_image_folder_of_torchvision(path: Path, folder: str) -> None:
    images = ImageFolder(path / folder)
    labels = [int(images.classes[target]) for target in images.targets]
    pairs = [(label, image) for label, (image, _) in zip(labels, images, strict=True)]
    assert collected(pairs) == expected(folder)


def test_image_folder_in_a_loader(path: Path) -> None:
    images = ImageFolder(path / "masked", transforms.ToTensor())
    pixels, targets = next(iter(DataLoader(images, batch_size=4)))
    assert pixels.shape == (4, 3, 16, 24) and pixels.dtype == torch.float32
    assert targets.tolist() == [0, 1, 1, 2]  # it numbers only the classes that have images


@pytest.mark.parametrize("folder", ["images", "masked"])
def test_train_script_of_timm(path: Path, folder: str) -> None:
    # What timm/train.py calls with --data-dir, --train-split and --class-map.
    dataset = create_dataset(
        "", root=str(path), split=folder, class_map=str(path / "classes.txt"), is_training=True
    )
    assert collected([(label, image) for image, label in dataset]) == expected(folder)


def test_imagefolder_of_hugging_face(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    found = datasets.load_dataset(str(path), cache_dir=str(tmp_path))
    assert list(found) == ["train"]
    rows = found["train"]
    assert collected([(row["label"], row["image"]) for row in rows]) == expected("images")
    assert collected([(row["label"], row["masked"]) for row in rows]) == expected("masked")
    _, masks, _ = batch(4)
    for row, record in zip(rows, Pool(path).records, strict=True):
        np.testing.assert_array_equal(np.asarray(row["mask"]) > 0, masks[record["index"]])
        assert {key: row[key] for key in ("label", "class_name", "kept", "seed")} == {
            key: record[key] for key in ("label", "class_name", "kept", "seed")
        }
