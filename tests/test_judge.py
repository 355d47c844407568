"""The independent judge: what its card says, whom it judges, and where its word goes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smi_fast
from smi_fast.judge import check_judge, load_judge, verdicts
from smi_fast.pool import Pool
from smi_fast.zoo import label_names, load_teacher
from tests.helpers.pools import NAMES, SETTINGS, batch
from tests.helpers.smi import Smi

WEIGHTS = Path(smi_fast.__file__).with_name("weights")


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Smi:
    return Smi(monkeypatch, capsys)


def test_the_judge_is_what_its_card_says() -> None:
    card = json.loads((WEIGHTS / "fashion_canvas_judge.json").read_text())
    judge = load_judge()
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    assert judge.pretrained_cfg["label_names"] == tuple(card["classes"])
    assert list(label_names(load_teacher("fashion-canvas"))) == card["classes"]
    text = (WEIGHTS / "fashion_canvas_judge.md").read_text()
    assert f"{card['test_accuracy']:.1%}".replace("%", " %") in text
    with pytest.raises(ValueError, match="expected the judge fashion-canvas, got 'lite0'"):
        load_judge("lite0")


def test_a_verdict_is_the_most_probable_class() -> None:
    judge, pixels = load_judge(), torch.rand(4, 3, 64, 64, dtype=torch.float64)
    mean, std = (torch.tensor(judge.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    likely = judge((pixels.float() - mean) / std).softmax(1).max(1)
    for verdict, index, value in zip(
        verdicts(judge, pixels), likely.indices, likely.values, strict=True
    ):
        assert verdict["judge"] == judge.pretrained_cfg["label_names"][index]
        assert verdict["judge_confidence"] == pytest.approx(float(value))


def test_a_judge_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="a judge of the teacher's classes, got one of t-shirt, "):
        check_judge(load_judge(), NAMES)


def test_the_command_stores_what_the_judge_sees(smi: Smi, tmp_path: Path) -> None:
    code, out, _ = smi.invert(tmp_path, "--judge", "fashion-canvas")
    records = Pool(tmp_path).records
    assert code == 0
    paths = [tmp_path / record["file_name"] for record in records]
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    seen = verdicts(load_judge(), torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    for record, verdict in zip(records, seen, strict=True):
        assert record["judge_confidence"] == pytest.approx(verdict["judge_confidence"], abs=0.02)
    agreed = sum(record["judge"] == record["class_name"] for record in records) / len(records)
    assert f"an independent judge sees it in {agreed:.1%} of the whole images" in out
    code, _, err = smi.invert(tmp_path, "--resume")
    assert code == 2 and 'made with judge = "fashion-canvas", now it is null' in err


def test_the_command_refuses_an_unknown_judge(smi: Smi, tmp_path: Path) -> None:
    code, _, err = smi.invert(tmp_path / "pool", "--judge", "myself")
    assert code == 2 and "expected the judge fashion-canvas, got 'myself'" in err
    assert not (tmp_path / "pool").exists()


def test_the_sheet_shows_another_word_in_red(tmp_path: Path) -> None:
    from smi_fast.pool.pictures import STOP_COLOUR, contact_sheet

    red = tuple(bytes.fromhex(STOP_COLOUR[1:]))
    found = []
    for word in ("class 0", "another class whose name is far wider than a tile"):
        path = tmp_path / word[:7]
        images, masks, _ = batch(1)
        with Pool.create(path, SETTINGS, NAMES) as pool:
            pool.add(images, masks, [{"label": 0, "confidence": 0.5, "judge": word}])
        contact_sheet(path, path / "sheet.png")
        sheet = np.asarray(Image.open(path / "sheet.png"))
        near = abs(sheet.astype(int) - red).max(axis=-1) < 40
        found.append(near[-40:].sum())
        assert (sheet[-40:, -5:] == 255).all()
    assert found[0] == 0 < found[1]
