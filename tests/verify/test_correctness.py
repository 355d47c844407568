"""``smi-fast verify``: what it says, and that it sees a wrong kernel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smi_fast import cli
from smi_fast.ops import backends, reference
from smi_fast.verify import correctness
from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.cases import OpCall

CPU = torch.device("cpu")


def smi_fast_verify(monkeypatch: pytest.MonkeyPatch, out: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["smi-fast", "verify", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def functions(**replaced: object) -> SimpleNamespace:
    """The reference, but for some of its functions."""
    names = (op for name in backends.OPS for op in (name, name + "_backward"))
    plain = {name: getattr(reference, name) for name in names if hasattr(reference, name)}
    return SimpleNamespace(**{**plain, **replaced})


def variation_calls() -> list[OpCall]:
    return [call for call in op_calls() if call.op == "total_variation"]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend than the reference, wrong in one op and data type."""

    def wrong(grad: torch.Tensor, *rest: torch.Tensor | float) -> torch.Tensor:
        gradient = reference.batch_norm_matching_backward(grad, *rest)
        return gradient * 1.01 if grad.dtype == torch.float64 else gradient

    def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        ours = dtype in (torch.float32, torch.float64)
        return None if ours else "it takes float32 and float64"

    backend = backends.Backend("planted", functions(batch_norm_matching_backward=wrong), why_not)
    absent = backends.Backend("absent", None, lambda *_: "it never runs")
    monkeypatch.setattr(backends, "BACKENDS", (absent, backend, backends.BACKENDS[-1]))


def test_kernels_of_this_machine_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if backends.report(CPU)["cpp"] is not None:
        pytest.skip("needs the C++ kernels")
    assert smi_fast_verify(monkeypatch, tmp_path / "found.json") == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    checked = {(v["op"], v["dtype"]) for v in found["verdicts"] if v["backend"] == "cpp"}
    assert len(checked) == 2 * 9 and not any(v["failures"] for v in found["verdicts"])
    assert all(v["error"] <= v["budget"] for v in found["verdicts"] if v["error"] is not None)
    if not torch.cuda.is_available():
        assert "not run: times: no CUDA device is visible" in out
        assert "not run: triton: " in out and found["times"] == []


def test_wrong_kernel_is_seen(
    planted: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert smi_fast_verify(monkeypatch, tmp_path / "found.json") == 1
    out = capsys.readouterr().out
    (failed,) = (line for line in out.splitlines() if line.endswith("FAILED"))
    assert failed.split()[:5] == ["planted", "cpu", "batch_norm_matching_backward", "float64", "33"]
    assert out.count("planted on cpu, float64: batch_norm_matching_backward-") == 33
    assert "not run: absent: it never runs" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [v["op"] for v in found["verdicts"] if v["failures"]] == ["batch_norm_matching_backward"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_result_that_is_no_number_is_a_failure(planted: None, value: float) -> None:
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
