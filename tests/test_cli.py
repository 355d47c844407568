"""The command, as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smi_fast
from smi_fast import cli
from smi_fast.inversion.loop import Loop
from smi_fast.objectives import LossInputs
from smi_fast.ops import backends, native
from smi_fast.pool import Pool


class Smi:
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["smi-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = self.capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    def invert(self, out: Path, *arguments: object) -> tuple[int, str, str]:
        quick = ("--schedule", "dense", "--iterations", 3, "--classes", "2,7-8", "--per-class", 2)
        return self("invert", "--out", out, *quick, *arguments)


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Smi:
    return Smi(monkeypatch, capsys)


def test_invert_fills_a_pool(smi: Smi, tmp_path: Path) -> None:
    code, out, _ = smi.invert(tmp_path / "pool", "--seed", 3)
    records = Pool(tmp_path / "pool").records
    assert code == 0
    assert [record["label"] for record in records] == [2, 2, 7, 7, 8, 8]
    assert [record["class_name"] for record in records[::2]] == ["pullover", "sneaker", "bag"]
    for record in records:
        assert record["seed"] == 3 and record["schedule"] == "dense" and record["iterations"] == 3
        assert record["versions"]["torch"] == torch.__version__
        assert 0 < record["confidence"] < 1
        assert Image.open(tmp_path / "pool" / record["image"]).size == (64, 64)
        assert Image.open(tmp_path / "pool" / record["mask"]).size == (8, 8)
    mean = sum(record["confidence"] for record in records) / 6
    assert f"at a mean confidence of {mean:.3f}" in out
    for name in ("contact_sheet.png", "loss.png"):
        assert Image.open(tmp_path / "pool" / name).size > (100, 100)


def test_quiet_prints_nothing_but_the_result(smi: Smi, tmp_path: Path) -> None:
    code, out, err = smi.invert(tmp_path / "pool", "--quiet")
    assert (code, err) == (0, "")
    result, where = out.splitlines()
    assert result.startswith(f"6 images in {tmp_path / 'pool'}: ") and "confidence" in result
    assert where == f"look at {tmp_path / 'pool' / 'contact_sheet.png'}"
    code, out, err = smi.invert(tmp_path / "loud")
    assert code == 0 and len(out.splitlines()) > 2 and "arXiv" in out
    assert err.startswith("iteration 3 of 3: cross_entropy ") and err.count("\n") == 1


def test_quiet_still_tells_what_went_wrong(smi: Smi, tmp_path: Path) -> None:
    code, out, err = smi.invert(tmp_path / "pool", "--quiet", "--lr", 0)
    assert (code, out) == (2, "") and err == "smi-fast: expected lr above 0, got 0.0\n"


def test_masked_images_of_a_sparse_run_are_black_where_patches_stopped(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_schedule", lambda *_: smi_fast.StopSchedule((1, 2), (0.5, 0.5)))
    assert smi.invert(tmp_path / "pool")[0] == 0
    for record in Pool(tmp_path / "pool").records:
        whole, masked, mask = (
            np.asarray(Image.open(tmp_path / "pool" / record[name]))
            for name in ("image", "masked", "mask")
        )
        shown = (mask > 0).repeat(8, 0).repeat(8, 1)
        assert (mask > 0).sum() == record["kept_patches"] == 16
        assert (masked[shown] == whole[shown]).all() and not masked[~shown].any()


def test_resume_gives_what_an_uninterrupted_run_gives(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi.invert(tmp_path / "whole", "--batch-size", 2)
    calls = []
    step = Loop._checked_step

    def interrupted(self: object, *arguments: object) -> object:
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_checked_step", interrupted)
        code, _, err = smi.invert(tmp_path / "parts", "--batch-size", 2)
    assert code == 130 and "interrupted after 1 iterations" in err and "--resume" in err
    assert len(Pool(tmp_path / "parts").records) == 2
    assert len(list((tmp_path / "parts" / "unfinished").iterdir())) == 2
    assert smi.invert(tmp_path / "parts", "--batch-size", 2, "--resume")[0] == 0
    assert Pool(tmp_path / "parts").records == Pool(tmp_path / "whole").records
    for path in sorted((tmp_path / "whole" / "images").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / "images" / path.name).read_bytes()
    assert not (tmp_path / "parts" / "unfinished").exists()


def test_existing_pool_is_kept_unless_told(smi: Smi, tmp_path: Path) -> None:
    smi.invert(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, err = smi.invert(tmp_path)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    code, _, err = smi.invert(tmp_path, "--resume", "--seed", 5)
    assert code == 2 and "made with seed = 0, now it is 5" in err
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert smi.invert(tmp_path, "--overwrite", "--seed", 5)[0] == 0
    assert {record["seed"] for record in Pool(tmp_path).records} == {5}


def test_non_finite_loss_saves_the_last_images(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, inputs: LossInputs) -> torch.Tensor:
        return inputs.logits.sum() * torch.nan

    monkeypatch.setattr(smi_fast.CrossEntropy, "__call__", broken)
    code, _, err = smi.invert(tmp_path / "pool")
    assert code == 2 and "cross_entropy is not finite at iteration 0" in err
    assert len(list((tmp_path / "pool" / "unfinished").iterdir())) == 6
    assert Pool(tmp_path / "pool").records == []


def test_unwritable_folder(smi: Smi, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = smi.invert(tmp_path / "file" / "pool")
    assert code == 2 and err.count("\n") == 1 and "Not a directory" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher", "no_such_vit"), "fashion-canvas or a timm model, got 'no_such_vit'"),
        (("--schedule", "sometimes"), "smi, smi-scaled, dense, got 'sometimes'"),
        (("--schedule", "smi"), "the stop at 300 is past the end of 3 iterations"),
        (("--classes", "0-10"), "classes in 0..9, got '0-10'"),
        (("--classes", "x"), "classes such as 0-9 or 3,17,20-24, got 'x'"),
        (("--device", "tpu"), "cpu or a visible cuda device, got 'tpu'"),
        (("--backend", "abacus"), "a backend among auto, .*reference, got 'abacus'"),
        (("--lr", "0"), "lr above 0, got 0"),
        (("--checkpoint", "nothing.pth"), "comes with its weights"),
        (("--resume", "--overwrite"), "--resume or --overwrite, got both"),
        (("--teacher", "swin_tiny_patch4_window7_224", "--checkpoint", "gone.pth"), "gone.pth"),
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


def test_faults_of_ours_keep_their_trace(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cli, "app", fault)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main()


def test_version(smi: Smi) -> None:
    assert smi("--version") == (0, f"smi_fast {smi_fast.__version__}\n", "")


def test_info_tells_versions_and_backends(smi: Smi) -> None:
    code, out, _ = smi("info")
    assert code == 0
    assert f"smi_fast  {smi_fast.__version__}" in out and torch.__version__ in out
    assert "cpu (" in out and "reference  runs" in out


def test_info_tells_what_each_op_takes_and_why(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "WHY_NO_CUDA", "smi_fast._C_cuda can't be loaded (for a test)")
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    on_cpu, on_gpu = smi("info")[1].split("\ncuda (none is visible")
    assert "  cuda       smi_fast._C_cuda can't be loaded (for a test)\n" in on_gpu
    for op in backends.OPS:
        chosen = backends.choose(op, torch.device("cpu"), torch.float32).name
        assert f"    {op:<20} {chosen}\n" in on_cpu
        name, why = backends.ON_GPU[op]
        assert f"    {op:<20} triton{f': {why}' if name == 'triton' else ''}\n" in on_gpu
    monkeypatch.setattr(backends, "DEFAULT", "cpp")
    assert "  cpp takes\n    gather_patches       no backend can run" in smi("info")[1]


def test_help_names_every_option(smi: Smi) -> None:
    _, out, _ = smi("invert", "--help")
    for option in ("--teacher", "--classes", "--schedule", "--seed", "--resume", "--overwrite"):
        assert option in out
