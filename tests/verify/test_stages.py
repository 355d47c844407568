"""Stages in processes of their own: none keeps another from running, and time has an end."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smi_fast.ops import backends
from smi_fast.verify import correctness, gpu_stages, report, stages
from smi_fast.verify.stages import Line, Stage, alone

CPU = torch.device("cpu")
Send = Callable[[object], None]


def finds(send: Send, device_name: str, number: int) -> None:
    print("what a process prints is no line")
    for index in range(number):
        send({"kind": "time", "number": index, "on": device_name})


def hangs(send: Send, device_name: str) -> None:
    send({"number": 0})
    time.sleep(600)


def dies(send: Send, device_name: str) -> None:
    faulthandler.disable()  # the traceback of a planned crash says nothing
    os.kill(os.getpid(), signal.SIGSEGV)


def sends_garbage(send: Send, device_name: str) -> None:
    for garbage in ("42", {1, 2}, {"set": {1}}, {"kind": "time", "right": True}):
        send(garbage)


def raises(device: torch.device, seconds: float) -> Iterator[Line]:
    yield {"number": 0}
    raise KeyError("a name")


FAKES = (
    Stage("hangs", 1, alone(hangs)),
    Stage("dies", 1, alone(dies), proves=True),
    Stage("garbage", 1, alone(sends_garbage)),
    Stage("raises", 1, raises),
    Stage("finds", 1, alone(finds, 3)),
)


def test_what_one_stage_does_keeps_no_other_from_running() -> None:
    start = time.monotonic()
    lines = list(stages.run(FAKES, CPU, seconds=75))
    assert time.monotonic() - start < 75
    ended = {line["stage"]: line for line in lines if line["kind"] == "stage"}
    assert [*ended] == [stage.name for stage in FAKES]
    assert ended["hangs"]["problems"] == ["its process took longer than 15 s"]
    assert ended["dies"]["problems"] == ["its process was ended by SIGSEGV"]
    assert ended["raises"]["problems"] == ["KeyError: 'a name'"]
    assert len(ended["garbage"]["problems"]) == 3
    assert "expected a dictionary for JSON, got '42'" in ended["garbage"]["problems"][0]
    assert not ended["finds"]["problems"]
    assert [ended[name]["lines"] for name in ended] == [1, 0, 1, 1, 3]
    assert [name for name in ended if "failures" in ended[name]] == ["dies"]
    found = [line for line in lines if line["stage"] == "finds"][:-1]
    assert [line["number"] for line in found] == [0, 1, 2] and found[0]["on"] == "cpu"


def test_lines_come_while_their_stage_runs() -> None:
    sent = stages.run([Stage("hangs", 1, alone(hangs))], CPU, seconds=60)
    assert next(sent) == {"kind": "found", "number": 0, "stage": "hangs"}
    sent.close()


def test_time_that_a_stage_leaves_is_for_those_after_it() -> None:
    given = []

    def quick(device: torch.device, seconds: float) -> Iterator[Line]:
        given.append(seconds)
        if len(given) == 1:
            time.sleep(2)
        return iter(())

    list(stages.run([Stage(str(i), share, quick) for i, share in enumerate((1, 1, 2))], CPU, 40))
    assert given == pytest.approx([10, 38 / 3, 38], abs=0.5)


def test_no_time_left_is_said_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.isolation.multiprocessing, "get_context", None)
    (line,) = stages.run([Stage("late", 1, alone(hangs))], CPU, seconds=-1)
    assert line["problems"] == ["no time was left for it"]


def test_functions_in_turn_share_the_time() -> None:
    parts = [({"of": work.__name__}, work, ()) for work in (hangs, dies, sends_garbage)]
    start = time.monotonic()
    lines = [line for line in stages.in_turn(parts, CPU, 45) if isinstance(line, dict)]
    assert time.monotonic() - start < 45
    reasons = {line["of"]: line["not_timed"] for line in lines if "not_timed" in line}
    assert reasons == {
        "hangs": "its process took longer than 15 s",
        "dies": "its process was ended by SIGSEGV",
    }
    assert lines[-1] == {"kind": "time", "right": True}


def test_report_of_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the CPU in place of a GPU."""

    def verdicts(device: torch.device, *_: object) -> Iterator[correctness.Verdict]:
        yield correctness.Verdict("b", "cpu", "op", "float32", 2, 0.5, 0.1, ("op-1: error",))

    monkeypatch.setattr(correctness, "verdicts", verdicts)
    monkeypatch.setattr(report, "_found", lambda device, _, s, chosen: stages.run(chosen, CPU, s))
    chosen = (
        Stage("grid", 1, gpu_stages.verdict_lines, proves=True),
        Stage("dies", 1, alone(dies), proves=True),
        Stage("finds", 1, alone(finds, 2)),
    )
    out, old = tmp_path / "found.jsonl", tmp_path / "old.jsonl"
    assert not report.verify(out, [CPU], 60, 60, chosen)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = ["machine", "verdict", "stage", "stage", "time", "time", "stage", "summary"]
    assert [line["kind"] for line in lines] == kinds
    assert lines[-1]["failed"] == ["b cpu op float32", "cpu dies"]
    assert (lines[-1]["verdicts"], lines[-1]["times"]) == (1, 2)
    assert "FAILED" in capsys.readouterr().out

    old.write_text(out.read_text().replace('"number": 1', '"number": 1, "milliseconds": 2.0'))
    report.verify(out, [CPU], 60, 60, chosen[2:], old)
    assert "no longer timed: device=cpu measure=milliseconds number=1" in capsys.readouterr().out


def test_stages_of_a_gpu_have_names_of_their_own_and_take_nine_minutes() -> None:
    names = [stage.name for stage in gpu_stages.STAGES]
    assert len(set(names)) == len(names)
    assert all(stage.seconds > 0 for stage in gpu_stages.STAGES)
    assert [s.name for s in gpu_stages.STAGES if s.proves] == ["smoke", "captured", "grid"]


def test_environment_says_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda _: None)
    assert gpu_stages.driver() == "nvidia-smi isn't installed"
    assert backends.name_or_reason("gather_attention", CPU) in ("cpp", "reference")

    def none(*_: Any) -> None:
        raise gpu_stages.backends.BackendUnavailable("no backend can run it")

    monkeypatch.setattr(gpu_stages.backends, "choose", none)
    assert backends.name_or_reason("gather_attention", CPU) == "no backend can run it"
