"""``smi-fast verify``: what it says, and that it sees a wrong kernel."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smi_fast import cli
from smi_fast.ops import backends, reference
from smi_fast.verify import correctness, isolation
from smi_fast.verify.budget import NOISE, SDPA_NOISE
from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.cases import OpCall

CPU = torch.device("cpu")


def smi_fast_verify(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["smi-fast", "verify", "--out", str(out), *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in (found[0], found[-1])] == ["machine", "summary"]
    return [line for line in found if line["kind"] == kind]


def functions(**replaced: object) -> SimpleNamespace:
    """The reference, but for some of its functions."""
    names = (op for name in backends.OPS for op in (name, name + "_backward"))
    plain = {name: getattr(reference, name) for name in names if hasattr(reference, name)}
    return SimpleNamespace(**{**plain, **replaced})


def variation_calls() -> list[OpCall]:
    return [call for call in op_calls() if call.op == "total_variation"]


def plant(monkeypatch: pytest.MonkeyPatch, **replaced: object) -> None:
    """Another backend than the reference, with some functions replaced.

    Its processes are forked, because one that starts afresh would not have it. Threads don't
    survive a fork, so torch takes only one.
    """

    def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        ours = dtype in (torch.float32, torch.float64)
        return None if ours else "it takes float32 and float64"

    backend = backends.Backend("planted", functions(**replaced), why_not)
    absent = backends.Backend("absent", None, lambda *_: "it never runs")
    monkeypatch.setattr(backends, "BACKENDS", (absent, backend, backends.BACKENDS[-1]))
    monkeypatch.setattr(isolation, "_start_method", lambda _: "fork")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_kernels_of_this_machine_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if backends.report(CPU)["cpp"] is not None:
        pytest.skip("needs the C++ kernels")
    out = tmp_path / "found.jsonl"
    assert smi_fast_verify(monkeypatch, out) == 0
    found = lines(out, "verdict")
    checked = {(v["op"], v["dtype"]) for v in found if v["backend"] == "cpp"}
    assert len(checked) == 2 * 11 and not any(v["failures"] for v in found)
    assert all(v["error"] <= v["budget"] for v in found if v["error"] is not None)
    (summary,) = lines(out, "summary")
    assert summary["right"] and summary["verdicts"] == len(found)
    if not torch.cuda.is_available():
        said = capsys.readouterr().out
        assert "not run: times: no CUDA device is visible" in said
        assert "not run: triton: " in said and summary["times"] == 0


def test_wrong_kernel_is_seen(
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def wrong(grad: torch.Tensor, *rest: torch.Tensor | float) -> torch.Tensor:
        gradient = reference.batch_norm_matching_backward(grad, *rest)
        return gradient * 1.01 if grad.dtype == torch.float64 else gradient

    plant(monkeypatch, batch_norm_matching_backward=wrong)
    assert smi_fast_verify(monkeypatch, tmp_path / "found.jsonl") == 1
    out = capsys.readouterr().out
    (failed,) = (line for line in out.splitlines() if line.endswith("FAILED"))
    assert failed.split()[:5] == ["planted", "cpu", "batch_norm_matching_backward", "float64", "33"]
    assert out.count("planted on cpu, float64: batch_norm_matching_backward-") == 33
    assert "not run: absent: it never runs" in out
    (summary,) = lines(tmp_path / "found.jsonl", "summary")
    assert summary["failed"] == ["planted cpu batch_norm_matching_backward float64"]


def test_one_failure_leaves_every_other_verdict(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One op raises, one kills its process, one hangs, one is NaN, one ends with an exit code."""

    class CompilationError(Exception):
        """As Triton's errors, it is no RuntimeError."""

    def raises(*_: object) -> None:
        raise CompilationError("at 3:7:\n    tl.dot(a, b)")

    def killed(*_: object) -> None:
        faulthandler.disable()  # the traceback of a planned crash says nothing
        os.kill(os.getpid(), signal.SIGSEGV)

    def hangs(images: torch.Tensor, *_: object) -> torch.Tensor:
        if images.dtype == torch.float64:
            time.sleep(600)
        return reference.total_variation(images, *_)

    def exits(*_: object) -> None:
        os._exit(3)

    plant(
        monkeypatch,
        gather_patches=raises,
        gather_attention=killed,
        total_variation=hangs,
        batch_norm_matching=lambda x, mean, *_: (x * torch.nan, mean, mean),
        adam_clamp_=exits,
    )
    assert smi_fast_verify(monkeypatch, tmp_path / "found.jsonl", "--limit", "20") == 1
    found = {(v["op"], v["dtype"]): v for v in lines(tmp_path / "found.jsonl", "verdict")}
    right = {key for key, verdict in found.items() if not verdict["failures"]}
    backward = {f"{op}_backward" for op in backends.OPS if op != "adam_clamp_"}
    unhurt = {*backward, "gather_sigmoid_patches"}
    assert right == {(op, dtype) for op in unhurt for dtype in ("float32", "float64")} | {
        ("total_variation", "float32")
    }
    said = {key: found[key]["failures"] for key in found.keys() - right}
    assert "CompilationError: at 3:7: tl.dot(a, b)" in said["gather_patches", "float64"][-1]
    assert len(said["gather_patches", "float64"]) == found["gather_patches", "float64"]["calls"]
    (dead,) = said["gather_attention", "float32"]
    assert dead.startswith("gather_attention-1-64: its process was ended by SIGSEGV; the calls")
    (slow,) = said["total_variation", "float64"]
    assert slow.startswith("total_variation-1x1: its process took longer than 20 s")
    (gone,) = said["adam_clamp_", "float32"]
    assert "its process ended with exit code 3" in gone
    assert "error nan" in said["batch_norm_matching", "float32"][0]
    assert len(found) == 12 + 2 + 1 + 2 + 2 + 1


def test_calls_after_an_error_of_the_device_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(correctness, "answers", lambda device: False)
    backend = backends.Backend("planted", functions(total_variation=illegal), lambda *_: None)
    monkeypatch.setattr(backends, "BACKENDS", (backend,))
    sent: list[object] = []
    correctness._check(sent.append, "planted", "total_variation", "cpu")
    (verdict,) = (each for each in sent if isinstance(each, correctness.Verdict))
    assert verdict.dtype == "float32"
    assert "illegal memory access" in verdict.failures[0]
    assert verdict.failures[1:] == ("the rest of the op is skipped: the device answers no more",)


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_precision_that_the_process_allows_changes_no_budget(allowed: str) -> None:
    seen = []

    def product(*arguments: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return reference.gather_attention(*arguments)

    backend = backends.Backend("planted", functions(gather_attention=product), lambda *_: None)
    calls = [call for call in op_calls() if call.op == "gather_attention"][:6]
    expected = correctness.verdict(backend, CPU, torch.float32, calls)
    torch.set_float32_matmul_precision(allowed)
    try:
        before = torch.backends.mkldnn.matmul.fp32_precision
        assert correctness.verdict(backend, CPU, torch.float32, calls) == expected
        assert torch.get_float32_matmul_precision() == allowed
        assert torch.backends.mkldnn.matmul.fp32_precision == before != "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"ieee"}


def test_attention_of_pytorch_has_a_budget_of_its_own() -> None:
    """Only where Triton leaves the call to it, which it does with large sets of tokens."""
    pytest.importorskip("triton")
    pytest.importorskip("smi_fast.kernels")
    calls = {str(call): call for call in op_calls()}
    large = calls["gather_attention_backward-197-64-dense"]
    small = calls["gather_attention_backward-2-64-dense"]
    triton, other = (
        backends.Backend(name, reference, lambda *_: None) for name in ("triton", "other")
    )
    budgets = [
        [correctness.verdict(each, CPU, torch.float32, [call]).budget for each in (triton, other)]
        for call in (large, small)
    ]
    assert budgets[0][0] > budgets[0][1] and budgets[1][0] == budgets[1][1]
    assert large.noise(triton, CPU, torch.float32) == SDPA_NOISE == 2 * NOISE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_result_that_is_no_number_is_a_failure(value: float) -> None:
    wrong = functions(total_variation=lambda *_: torch.full((3, 4), value))
    backend = backends.Backend("planted", wrong, lambda *_: None)
    calls = variation_calls()
    verdict = correctness.verdict(backend, CPU, torch.float32, calls)
    assert len(verdict.failures) > 10 and not verdict.error <= verdict.budget


def test_kernel_that_raises_is_a_failure() -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("CUDA error: misaligned address")

    backend = backends.Backend("planted", functions(total_variation=refuses), lambda *_: None)
    calls = variation_calls()
    verdict = correctness.verdict(backend, CPU, torch.float32, calls)
    assert len(verdict.failures) == len(calls) == verdict.calls and verdict.error is None
    assert "misaligned address" in verdict.failures[0]
