"""What the command says to wrong options and damaged pools, and what it leaves alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import smi_fast
from smi_fast import cli
from smi_fast.inversion.loop import Loop
from smi_fast.options import CommandError
from smi_fast.pool import CONTACT_SHEET, LOSS_CURVES, Pool, PoolError
from smi_fast.pool.settings import make_settings
from smi_fast.teacher.support import UnsupportedTeacher
from tests.helpers.pools import NAMES, batch, files
from tests.helpers.smi import QUICK, Smi


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Smi:
    return Smi(monkeypatch, capsys)


def test_unwritable_folder(smi: Smi, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = smi.invert(tmp_path / "file" / "pool")
    assert code == 2 and err.count("\n") == 1 and "Not a directory" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher", "no_such_vit"), "fashion-canvas or a timm model, got 'no_such_vit'"),
        (("--schedule", "sometimes"), "smi, smi-scaled, once, rebirth, dense, got 'sometimes'"),
        (("--schedule", "rebirth"), "expected v = 7 or more iterations, got 3"),
        (("--schedule", "rebirth", "--factor", 1), "expected v, .* from 2, got 1"),
        (("--schedule", "rebirth", "--factor", 65, "--iterations", 65), "at most 64, .* got 65"),
        (("--factor", 2), "expected --schedule rebirth with --factor, got 'dense'"),
        (("--importance", "size"), "expected importance attention, .*got 'size'"),
        (("--schedule", "smi"), "the stop at 300 is past the end of 3 iterations"),
        (("--classes", "0-10"), "classes in 0..9, got 10"),
        (("--classes", "x"), "classes such as 0-9 or 3,17,20-24, got 'x'"),
        (("--device", "tpu"), "cpu or a visible cuda device, got 'tpu'"),
        (("--backend", "abacus"), "a backend among auto, .*reference, got 'abacus'"),
        (("--precision", "half"), "expected precision float32, tf32 or bfloat16, got 'half'"),
        (("--precision", "tf32", "--device", "cpu"), "tf32 is of the tensor cores of a GPU"),
        (("--precision", "bfloat16", "--backend", "reference"), "bfloat16 .* has no engine"),
        (("--lr", "0"), "lr above 0, got 0"),
        (("--checkpoint", "nothing.pth"), "comes with its weights"),
        (("--strip", "4"), "expected a strip of 0..3 moments, got 4"),
        (("--max-batch", 0), "expected max_batch of 1 or more images, got 0"),
        (("--finish", "1.5"), "expected a confidence in .*, got 1.5"),
        (("--finish", "0.9", "--strip", 2), "a strip of 0 moments with finish.*, got 2"),
        (("--finish", "0.9", "--recipe", "psaq_vit"), "with finish, got patch_similarity"),
        (("--background", "grey"), "expected --background mean, blurred, black, or R,G,B .*'grey'"),
        (("--background", "0,0,256"), "or R,G,B such as 255,128,0, got '0,0,256'"),
        (("--background", "0,0"), "or R,G,B such as 255,128,0, got '0,0'"),
        (("--resume", "--overwrite"), "--resume or --overwrite, got both"),
        (("--teacher", "vit_tiny_patch16_224", "--checkpoint", "gone.pth"), "gone.pth"),
        (("--teacher", "resnet18"), "a VisionTransformer or Eva of timm as teacher, got resnet18"),
    ],
)
def test_mistakes_are_told_in_one_line(
    smi: Smi, tmp_path: Path, arguments: tuple, message: str
) -> None:
    code, _, err = smi.invert(tmp_path / "pool", *arguments)
    assert code == 2
    assert err.startswith("smi-fast: ") and err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)
    assert not (tmp_path / "pool").exists()


def test_only_errors_of_our_own_classes_are_sentences(
    smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sum_of_list_and_dict() -> None:
        sum([[], {}])  # type: ignore[list-item]

    def fault() -> None:
        raise RuntimeError("out of memory")

    for function in (sum_of_list_and_dict, fault):
        monkeypatch.setattr(cli, "app", function)
        with pytest.raises((TypeError, RuntimeError), match=r"unsupported operand|out of memory"):
            cli.main()
    for error in (CommandError("no"), PoolError("no"), UnsupportedTeacher("no")):
        monkeypatch.setattr(cli, "app", MagicMock(side_effect=error))
        assert smi() == (2, "", "smi-fast: no\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schedule", "smi", "--iterations", 8), "past the end of 8 .* --schedule smi-scaled"),
        (("--schedule", "smi-scaled", "--iterations", 59), "expected 60 or more iterations"),
        (("--iterations", 10**9), "expected --iterations of at most 1000000, got 1000000000"),
        (("--seed", 2**64), "expected --seed of at most 18446744073709551615"),
        (("--classes", "0-9999999999"), "expected classes such as"),
        (("--classes", "0-999999999"), "expected classes in 0..9, got 999999999"),
        (("--classes", "0," + "9" * 5000), "expected classes such as"),
        (("--classes", "9-0"), "expected classes such as"),
        (("--classes", "0,9-0"), "expected classes such as"),
        (("--per-class", 10**9), "expected at most 1000000 images, got 3000000000"),
        (("--cnn-checkpoint", "/nonexistent"), "expected --cnn with --cnn-checkpoint, got none"),
        (("--device", "cuda:7"), "cpu or a visible cuda device, got 'cuda:7'"),
        (("--recipe", "dream"), "expected a recipe among"),
        (("--backend", "cuda"), "no backend can run"),
        (("--lr", "0"), "lr above 0"),
        (("--teacher", "no_such_vit"), "no_such_vit"),
        (("--checkpoint", "gone.pth", "--teacher", "vit_tiny_patch16_224"), "gone.pth"),
    ],
)
def test_overwrite_deletes_nothing_before_every_option_is_checked(
    smi: Smi, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    with Pool.create(tmp_path, {"seed": 0}, NAMES) as pool:
        pool.add(*batch(2))
    before = files(tmp_path)
    code, _, err = smi.invert(tmp_path, "--overwrite", *arguments)
    assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert files(tmp_path) == before


def test_an_objective_that_cannot_be_computed_leaves_the_old_pool(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi.invert(tmp_path)
    before = files(tmp_path)

    def refuse(*_: object) -> None:
        raise ValueError("expected another teacher")

    monkeypatch.setattr(smi_fast.CrossEntropy, "begin", refuse)
    code, _, err = smi.invert(tmp_path, "--overwrite", "--seed", 1)
    assert (code, err) == (2, "smi-fast: expected another teacher\n")
    assert files(tmp_path) == before


def test_a_batch_beyond_memory_is_told(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(Loop, "run", full)
    code, _, err = smi.invert(tmp_path)
    assert code == 2 and "a batch of 6 images does not fit into memory: take a smaller" in err


def test_resume_of_a_finished_pool_draws_its_pictures_anew(
    smi: Smi, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    (tmp_path / LOSS_CURVES).write_bytes(b"stale")
    (tmp_path / CONTACT_SHEET).unlink()
    (tmp_path / "report/.loss.png.part").write_bytes(b"left by a kill")
    assert smi.invert(tmp_path, "--resume")[0] == 0
    assert files(tmp_path) == before


def test_a_second_writer_is_refused(smi: Smi, tmp_path: Path) -> None:
    pool = Pool.create(tmp_path, {"seed": 0}, NAMES)
    before = files(tmp_path)
    for options in ((), ("--resume",), ("--overwrite",)):
        code, _, err = smi.invert(tmp_path, *options)
        assert (code, err) == (2, f"smi-fast: another process adds images to {tmp_path}\n")
    assert files(tmp_path) == before
    pool.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pool, to be copied."""
    path = tmp_path_factory.mktemp("finished") / "pool"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smi-fast", "invert", "--out", str(path), *QUICK])
        with pytest.raises(SystemExit) as done:
            cli.main()
    assert not done.value.code
    return path


def damaged(name: str, content: bytes | None) -> object:
    def damage(pool: Path) -> None:
        path = pool / name
        path.unlink() if content is None else path.write_bytes(content)

    return damage


def edited(old: str, new: str) -> object:
    def edit(pool: Path) -> None:
        path = pool / "metadata.jsonl"
        path.write_text(path.read_text().replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("images/0002/000001.png", None), "images/0002/000001.png is missing"),
        (damaged("images/0002/000001.png", b"x"), "reading .*000001.png failed.*; put the im"),
        (damaged("masked/0007/000002.png", b"\x89PNG\r\n\x1a\n"), "reading .*000002.png failed"),
        (damaged("metadata.jsonl", b"{}\n"), "line 1 is not the record of image 0"),
        (damaged("settings.json", b"[" * 10**5), "settings.json failed: it is nested too deep"),
        (damaged("settings.json", b"[]"), "not a pool of this version"),
        (damaged("settings.json", b"\xff"), "reading .*settings.json failed: 'utf-8' codec"),
        (damaged("report/loss.json", b"[]"), "it is not the loss of a batch"),
        (edited('"label": 2', '"label": 3'), "line 1 is not the record of image 0"),
        (edited('"confidence": 0', '"confidence": 1'), "line 1 of .* is not the record"),
        (edited('"confidence": 0.', '"confidence": NaN, "c": 0.'), "NaN is no value of JSON"),
        (edited('"kept"', '"patches"'), "line 1 of .* is not the record"),
        (edited('"iterations"', '"its"'), "line 1 of .* is not the record of an image of class 2"),
    ],
)
def test_a_damaged_pool_is_told_in_one_line(
    smi: Smi,
    finished: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    code, _, err = smi.invert(tmp_path, "--resume", "--quiet")
    assert code == 2 and err.count("\n") == 1 and re.search(message, err), err


def test_a_pool_with_too_many_images_is_not_resumed(
    smi: Smi, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "metadata.jsonl").read_text()
    extra = lines.splitlines()[-1].replace("000005", "000006").replace('"index": 5', '"index": 6')
    extra = extra.replace('"batch": 0, "batch_size": 6', '"batch": 1, "batch_size": 1')
    (tmp_path / "metadata.jsonl").write_text(f"{lines}{extra}\n")
    for folder in ("images", "masked", "masks"):
        shutil.copy(tmp_path / folder / "0008/000005.png", tmp_path / folder / "0008/000006.png")
    code, _, err = smi.invert(tmp_path, "--resume")
    assert code == 2 and "to hold 6 images or fewer, got 7" in err


@pytest.mark.parametrize("picture", [LOSS_CURVES, CONTACT_SHEET])
def test_a_picture_that_cannot_be_drawn_loses_no_image(
    smi: Smi, tmp_path: Path, picture: str
) -> None:
    (tmp_path / picture).mkdir(parents=True)
    (tmp_path / "settings.json").write_text(json.dumps(make_settings({}, NAMES, "mean")))
    code, _, err = smi.invert(tmp_path)
    assert code == 2 and err.endswith("Is a directory; images safe in the pool: 6\n")
    (tmp_path / picture).rmdir()
    assert smi.invert(tmp_path, "--resume")[0] == 0


def test_verify_checks_its_file_before_the_work(smi: Smi, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("nowhere/x.json", ".", "file/x.json"):
        code, _, err = smi("verify", "--out", tmp_path / out)
        assert code == 2 and err.startswith("smi-fast: expected --out to be a file that can be wri")
