"""The command, as a user types it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import smi_fast
from smi_fast import __main__, cli, zoo
from smi_fast.engine import gain
from smi_fast.inversion.loop import Loop
from smi_fast.objectives import LossInputs
from smi_fast.ops import backends, native
from smi_fast.pool import CONTACT_SHEET, LOSS_CURVES, Pool, PoolError
from smi_fast.zoo import fingerprint, load_cnn, load_teacher
from tests.helpers.pools import files
from tests.helpers.smi import QUICK, Smi


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
        assert record["seed"] == 3 and record["schedule"] == "Dense()" and record["iterations"] == 3
        assert record["versions"]["torch"] == torch.__version__
        assert 0 < record["confidence"] < 1
        assert record["teacher"] == "fashion-canvas" and record["recipe"] == "clear"
        assert Image.open(tmp_path / "pool" / record["file_name"]).size == (64, 64)
        assert Image.open(tmp_path / "pool" / record["mask_file_name"]).size == (8, 8)
    mean = sum(record["confidence"] for record in records) / 6
    assert f"at a mean confidence of {mean:.3f}" in out
    for name in (CONTACT_SHEET, LOSS_CURVES):
        assert Image.open(tmp_path / "pool" / name).size > (100, 100)


def test_quiet_prints_nothing_but_the_result(smi: Smi, tmp_path: Path) -> None:
    code, out, err = smi.invert(tmp_path / "pool", "--quiet")
    assert (code, err) == (0, "")
    result, where = out.splitlines()
    assert result.startswith(f"6 images in {tmp_path / 'pool'}: ") and "confidence" in result
    assert where == f"look at {tmp_path / 'pool' / CONTACT_SHEET}"
    code, out, err = smi.invert(tmp_path / "loud")
    assert code == 0 and len(out.splitlines()) > 2 and out.startswith("clear: ")
    batch, pool = err.splitlines()
    assert batch.startswith("iteration 3 of 3: cross_entropy ")
    assert pool.startswith("6 of 6 images, ") and " 3 classes, mean confidence 0." in pool


def test_quiet_still_tells_what_went_wrong(smi: Smi, tmp_path: Path) -> None:
    code, out, err = smi.invert(tmp_path / "pool", "--quiet", "--lr", 0)
    assert (code, out) == (2, "") and err == "smi-fast: expected lr above 0, got 0.0\n"


@pytest.mark.parametrize(
    ("given", "colour"), [("mean", None), ("black", (0, 0, 0)), ("255, 128,0", (255, 128, 0))]
)
def test_masked_images_show_the_background_where_patches_stopped(
    smi: Smi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    colour: tuple[int, ...] | None,
) -> None:
    monkeypatch.setattr(cli, "_schedule", lambda *_: smi_fast.StopSchedule((1, 2), (0.5, 0.5)))
    assert smi.invert(tmp_path / "pool", "--background", given)[0] == 0
    for record in Pool(tmp_path / "pool").records:
        whole, masked, mask = (
            np.asarray(Image.open(tmp_path / "pool" / record[name]))
            for name in ("file_name", "masked_file_name", "mask_file_name")
        )
        shown = (mask > 0).repeat(8, 0).repeat(8, 1)
        assert (mask > 0).sum() == len(record["kept"]) == 16
        assert (masked[shown] == whole[shown]).all()
        expected = whole[shown].mean(0) if colour is None else colour
        assert (abs(masked[~shown] - np.array(expected)) <= 0.51).all()
    code, _, err = smi.invert(tmp_path / "pool", "--background", "blurred", "--resume")
    assert code == 2 and "made with background = " in err and 'now it is "blurred"' in err


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
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_rebirth_takes_several_images_out_of_a_trajectory(smi: Smi, tmp_path: Path) -> None:
    options = "--schedule", "rebirth", "--factor", 2, "--iterations", 4, "--importance", "rollout"
    code, out, _ = smi.invert(tmp_path, *options, "--per-class", 3)
    records = Pool(tmp_path).records
    assert code == 0 and "9 images" in out and "of the 32 kept patches of each" in out
    assert [record["trajectory"] for record in records] == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert [record["iterations"] for record in records] == [2, 4, 2] * 3
    assert {record["schedule"] for record in records} == {
        "PatchRebirth(v=2, at=(2,), order='importance')"
    }
    assert Pool(tmp_path).settings["importance"] == "Rollout()"
    assert smi.invert(tmp_path, *options, "--per-class", 3, "--resume")[0] == 0
    code, _, err = smi.invert(tmp_path, *options[:-1], "random", "--per-class", 3, "--resume")
    assert code == 2 and "made with importance = " in err


def test_finished_images_leave_their_places(smi: Smi, tmp_path: Path) -> None:
    arguments = ("--iterations", 30, "--schedule", "once", "--batch-size", 8, "--max-batch", 3)
    code, _, err = smi.invert(tmp_path / "pool", *arguments, "--finish", 1e-9)
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "pool/metadata.jsonl").open()]
    # Three iterations in front of the stop, and twenty in which the teacher is sure.
    assert {record["iterations"] for record in records} == {23}


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


def test_ctrl_c_ends_the_process_at_once_until_a_pool_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: object, **options: object) -> object:
            handlers.append(signal.getsignal(signal.SIGINT))
            return function(*arguments, **options)

        return noted

    for owner, name in ((zoo, "load_teacher"), (Pool, "create")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    monkeypatch.setattr(sys, "argv", ["smi-fast", "invert", "--out", str(tmp_path), *QUICK])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            __main__.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.SIG_DFL, signal.default_int_handler]


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**64 - 1])
def test_seeds_of_64_bits(smi: Smi, tmp_path: Path, seed: int) -> None:
    assert smi.invert(tmp_path, "--seed", seed)[0] == 0
    assert {record["seed"] for record in Pool(tmp_path).records} == {seed}


def test_resume_refuses_another_learning_rate(smi: Smi, tmp_path: Path) -> None:
    options = ("--recipe", "psaq_vit", "--schedule", "dense", "--classes", 3, "--per-class", 1)
    assert smi.invert(tmp_path, *options)[0] == 0
    code, _, err = smi.invert(tmp_path, *options, "--lr", 0.2, "--resume")
    made = '"Cosine(lr=0.2, warm_up=0.2, final=0.0, restarts=1)"'
    assert code == 2 and f"made with lr = {made}, now it is 0.2" in err
    assert smi.invert(tmp_path, *options, "--resume")[0] == 0


def test_resume_refuses_another_precision(smi: Smi, tmp_path: Path) -> None:
    assert smi.invert(tmp_path, "--precision", "bfloat16")[0] == 0
    assert {record["precision"] for record in Pool(tmp_path).records} == {"bfloat16"}
    code, _, err = smi.invert(tmp_path, "--resume")
    assert code == 2 and 'made with precision = "bfloat16", now it is "float32"' in err
    assert smi.invert(tmp_path, "--precision", "bfloat16", "--resume")[0] == 0


def test_resume_refuses_other_weights_of_the_same_name(smi: Smi, tmp_path: Path) -> None:
    options = ("--teacher", "vit_tiny_patch16_224", "--classes", 0, "--per-class", 1)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
        save_file(model.state_dict(), tmp_path / folder / "w.safetensors")
    pool = tmp_path / "pool"
    assert smi.invert(pool, *options, "--checkpoint", tmp_path / "a/w.safetensors")[0] == 0
    again = (pool, *options, "--resume", "--checkpoint")
    code, _, err = smi.invert(*again, tmp_path / "b/w.safetensors")
    assert code == 2 and "made with teacher_sha256 = " in err
    assert smi.invert(*again, tmp_path / "a/w.safetensors")[0] == 0


def test_settings_say_what_computed_the_images(smi: Smi, tmp_path: Path) -> None:
    arguments = ("--recipe", "deepinversion", "--cnn", "fashion-canvas", "--backend", "reference")
    assert smi.invert(tmp_path, *arguments)[0] == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["backend"] == "reference"
    assert settings["jitter"] == repr(smi_fast.Jitter(share=30 / 224))
    assert settings["device"] == "cpu" and settings["precision"] == "float32"
    assert settings["teacher_sha256"] == fingerprint(load_teacher("fashion-canvas"))
    assert settings["cnn_sha256"] == fingerprint(load_cnn("fashion-canvas"))
    path = tmp_path / "settings.json"
    for key in ("backend", "device", "precision", "jitter", "copies", "cnn_sha256"):
        path.write_text(json.dumps({**settings, key: "other"}))
        code, _, err = smi.invert(tmp_path, *arguments, "--resume")
        assert code == 2 and f'made with {key} = "other", now it is' in err


def test_a_failed_first_batch_does_not_block_the_same_command(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "add", MagicMock(side_effect=PoolError("disk full")))
        assert smi.invert(tmp_path)[0] == 2
    assert files(tmp_path).keys() == {"settings.json", "classes.txt", "README.md"}
    assert smi.invert(tmp_path)[0] == 0
    assert len(Pool(tmp_path).records) == 6


def test_version(smi: Smi) -> None:
    assert smi("--version") == (0, f"smi_fast {smi_fast.__version__}\n", "")


def test_info_tells_versions_and_backends(smi: Smi) -> None:
    code, out, _ = smi("info")
    assert code == 0
    assert f"smi_fast  {smi_fast.__version__}" in out and torch.__version__ in out
    assert "cpu (" in out and "reference  runs" in out


def test_info_tells_what_bfloat16_gives(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gain, "times", lambda: {"float32": 0.5, "bfloat16": 0.3})
    share = "a block of DeiT-S takes 0.60 of its time in float32 with 46 patches"
    for names, said in (
        (["AVX512-BF16", "AMX"], "multiplied by AVX512-BF16 and AMX; "),
        ([], "no instructions of this processor multiply it; "),
    ):
        monkeypatch.setattr(gain, "instructions", lambda names=names: names)
        assert f"    in bfloat16          {said}{share}\n" in smi("info")[1]
    monkeypatch.setattr(native, "WHY_NO_CPU", "a reason")
    assert "    in bfloat16          no engine multiplies it: a reason\n" in smi("info")[1]


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
        said = f"triton{f': {why}' if name == 'triton' else ''}"
        if op == "gather_attention":  # by Triton or by PyTorch
            said = "the fastest for each size, see smi-fast tune"
        assert f"    {op:<20} {said}\n" in on_gpu
    for name, shown in (("cpp", on_cpu), ("triton", on_gpu)):
        engine = (
            f"    blocks of a teacher  {name}'s engine; without LayerNorm or RMSNorm, or GELU or"
        )
        assert engine in shown
    assert "    in float32           tensor cores stand idle, in tf32 and bfloat16 they " in on_gpu
    monkeypatch.setattr(backends, "DEFAULT", "cpp")
    assert "  cpp takes\n    gather_patches       no backend can run" in smi("info")[1]


def test_graphs_can_be_switched_off(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = []

    class Noted(smi_fast.SparseInverter):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            noted.append(options["graph"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr("smi_fast.inversion.SparseInverter", Noted)
    for option in ((), ("--no-graph",)):
        folder = tmp_path / str(len(option))
        assert smi.invert(folder, "--classes", "0", "--iterations", 4, *option)[0] == 0
    assert noted == [True, False]


def test_help_names_every_option(smi: Smi) -> None:
    _, out, _ = smi("invert", "--help")
    for option in ("--teacher", "--classes", "--schedule", "--seed", "--resume", "--overwrite"):
        assert option in out
