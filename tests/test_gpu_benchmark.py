"""``python -m benchmarks gpu``: what its stages compute, on the CPU and small."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks import gpu
from benchmarks.baselines.strong_dense import StrongDense
from benchmarks.gpu import counters, launches, parity, steps, whole_runs
from benchmarks.speed.loops import NO_STOPS, Workload, published_loop
from smi_fast.verify import stages, timing
from smi_fast.zoo import load_teacher

CPU = torch.device("cpu")


def same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@pytest.fixture
def workload() -> Workload:
    torch.manual_seed(1)
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    return Workload(vit.eval(), torch.tensor([1, 4]), torch.randn(2, 3, 32, 48))


def test_strong_baseline_computes_what_the_published_style_loop_does(workload: Workload) -> None:
    exact = Workload(workload.vit.double(), workload.targets, workload.init.double())
    theirs = []
    published_loop(exact)(NO_STOPS, 6, lambda t, images, kept: theirs.append(images.clone()))
    options = {"dtype": torch.float64, "compiler": same, "jitter": exact.jitter(6)}
    spaces = {"mean": exact.mean, "std": exact.std}
    ours = StrongDense(exact.vit, exact.targets, init=exact.init, **options, **spaces)
    for expected in theirs:
        ours.step()
        torch.testing.assert_close(ours.images.detach(), expected, rtol=0, atol=1e-8)


def test_strong_baseline_is_in_bfloat16_and_frozen_and_imports_no_smi_fast(
    workload: Workload,
) -> None:
    options = {"compiler": same, "jitter": workload.jitter(2)}
    spaces = {"mean": workload.mean, "std": workload.std}
    ours = StrongDense(workload.vit, workload.targets, init=workload.init, **options, **spaces)
    ours.step()
    weights = list(ours._vit.parameters())
    assert all(w.dtype == torch.bfloat16 and w.grad is None for w in weights)
    assert ours.images.dtype == torch.float32
    code = "import sys, benchmarks.baselines.strong_dense; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("smi_fast")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "StrongDense", partial(StrongDense, compiler=same))
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(timing, "SECONDS", 0)


def test_every_way_of_an_iteration_is_timed(small: None, workload: Workload) -> None:
    lines: list[Any] = []
    steps.measure(lines.append, workload, "tiny", CPU)
    timed = {(x["way"], x["precision"], x["kept"]) for x in lines if "milliseconds" in x}
    assert {
        ("published-style", "float32", 196),
        ("published-style", "tf32", 196),
        ("compiled", "bfloat16", 196),
        ("ours", "float32", 196),
        ("ours", "float32", 46),
    } <= timed
    # There are no tensor cores here.
    refused = [x for x in lines if x.get("precision") == "tf32" and "not_timed" in x]
    assert len(refused) == 2 and "BackendUnavailable" in refused[0]["not_timed"]
    runs = [x for x in lines if "run" in x]
    assert "published-style tf32" in runs[0]["times_faster_than"]
    assert all(x["model"] == "tiny" and x["batch"] == 2 for x in lines)


def test_wrong_gradient_is_not_timed(
    small: None, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.check_gradient(workload, "float32", 46)
    forward = steps.published.forward
    monkeypatch.setattr(steps.published, "forward", lambda v, x, kept: forward(v, x.flip(3), kept))
    lines: list[Any] = []
    steps.measure(lines.append, workload, "tiny", CPU)
    ours = [line for line in lines if line.get("way") == "ours"]
    assert len(ours) == 6 and not any("milliseconds" in line for line in ours)
    assert "expected the gradient of the published-style loop to 0.001" in ours[0]["not_timed"]
    assert not any("run" in line for line in lines)


def test_whole_runs_count_iterations_before_the_last_stop_as_dense() -> None:
    found = {
        ("ours", "float32", 196): 10.0,
        ("ours", "float32", 46): 2.0,
        ("published-style", "float32", 196): 52.0,
        ("ours", "bfloat16", 196): 1.0,
    }
    (line,) = steps.whole_runs(found)
    assert line["seconds"] == pytest.approx((300 * 10 + 3700 * 2) / 1e3)
    assert line["times_faster_than"]["published-style float32"] == 20.0
    assert line["times_faster_than"]["ours bfloat16"] == pytest.approx(4 / 10.4, abs=0.01)


def test_parity_holds_float64_to_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    line = parity.parity("patch16", "float64", "cpu")
    assert line["failures"] == [] and line["kept"] == line["masks"] == 1
    assert 0 < line["confidence"] <= 1
    original = parity.replay

    def shifted(*arguments: Any) -> Any:
        made = original(*arguments)
        made.kept[0] = made.kept[0].roll(1, 0)
        made.result.history["cross_entropy"][-1] += 1e-6
        return made

    monkeypatch.setattr(parity, "replay", shifted)
    wrong = parity.parity("patch16", "float64", "cpu")["failures"]
    assert [text.partition(":")[0] for text in wrong] == ["cross_entropy", "kept"]


def test_a_precision_that_fails_leaves_the_others() -> None:
    """In a process of its own, on the CPU, which has no TF32."""
    (stage,) = (stage for stage in gpu.STAGES if stage.name == "parity")
    *lines, ended = stages.run([stage], CPU, seconds=200)
    assert ended["problems"] == [] and len(lines) == 2 * 4
    failed = {(line["recording"], line["precision"]) for line in lines if line["failures"]}
    assert failed == {("dense", "tf32"), ("patch16", "tf32")} | {
        (line["recording"], line["precision"]) for line in lines if "pixels" not in line
    }
    exact = [line for line in lines if line["precision"] == "float64"]
    assert all(line["pixels"] < 1e-6 for line in exact)


def test_table_of_kernels_is_that_of_one_iteration() -> None:
    events = [
        SimpleNamespace(key=key, count=count, self_device_time_total=total)
        for key, count, total in (("small", 10, 5.0), ("gemm", 5, 50.0), ("on the host", 9, 0.0))
    ]
    found = launches.table(events, iterations=5, milliseconds=0.02)
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm", "small"]
    assert found["kernels"][0] == {"name": "gemm", "count": 1, "microseconds": 10.0}
    assert (found["count"], found["busy"]) == (3, 11.0)
    assert found["gap"] == pytest.approx((20 - 11) / 3)


CSV = """==PROF== Connected to process 7
cpp gather: printed by the program
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","k<float>(int, ""a"")","dram__bytes.sum","Mbyte","1,234.5"
"0","7","k<float>(int, ""a"")","sm__inst_executed.sum","inst","12"
"1","7","other","dram__bytes.sum","byte","8"
==PROF== Disconnected
"""


def test_counters_are_read_kernel_by_kernel() -> None:
    first, second = counters.rows(CSV.splitlines())
    assert first["kernel"] == 'k<float>(int, "a")'
    assert (first["dram__bytes.sum"], first["sm__inst_executed.sum"]) == ("1234.5 Mbyte", "12 inst")
    assert second == {"kernel": "other", "dram__bytes.sum": "8 byte"}
    assert list(counters.rows(["==ERROR== ERR_NVGPUCTRPERM"])) == []


def test_counters_say_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr(counters.shutil, "which", lambda _: None)
    counters.send_counters(lines.append, "cuda")
    monkeypatch.setattr(counters.shutil, "which", lambda _: "ncu")
    refused = SimpleNamespace(stdout="", stderr="==ERROR== ERR_NVGPUCTRPERM")
    monkeypatch.setattr(counters.subprocess, "run", lambda *_, **__: refused)
    counters.send_counters(lines.append, "cuda")
    assert [line["not_counted"] for line in lines] == [
        "ncu isn't installed",
        "ncu counted nothing: ==ERROR== ERR_NVGPUCTRPERM",
    ]


def test_whole_run_says_what_it_took_and_reached() -> None:
    found = whole_runs.whole_run(load_teacher("fashion-canvas"), "float32", 3, 80)
    assert found["seconds"] > 0 and found["first"] > 0 and 0 <= found["reached"] <= 1
    assert found["peak_bytes"] is None and found["iterations"] == 80


def test_there_are_ten_stages_of_nine_minutes() -> None:
    names = [stage.name for stage in gpu.STAGES]
    assert len(names) == len(set(names)) == 10
    assert names[:4] == ["environment", "smoke", "captured", "parity"]
    assert [s.name for s in gpu.STAGES if s.proves] == ["smoke", "captured", "parity", "grid"]


def test_command_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(minutes=3)
    assert capsys.readouterr().out == "gpu: not run, because no CUDA device is visible\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 (80GB)")
    monkeypatch.setattr(gpu, "result_file", lambda name, quick: tmp_path / name)
    monkeypatch.setattr(gpu.report, "verify", lambda *arguments: calls.append(arguments))
    for quick in (False, True):
        gpu.main(quick, minutes=3, compare=tmp_path)
    (out, devices, _, seconds, stages, old), (_, _, _, fewer, *_) = calls
    assert out == tmp_path / "gpu/nvidia_h100_80gb.jsonl" and devices == [torch.device("cuda", 0)]
    assert (seconds, fewer) == (180, 120) and stages is gpu.STAGES and old == tmp_path
