"""What two runs on a GPU say of each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from smi_fast import cli
from smi_fast.verify import compare

MACHINE = {"kind": "machine", "devices": {}}


def times(scale: float, **more: float) -> list[dict[str, Any]]:
    op = {"kind": "time", "op": "adam_clamp_", "dtype": "float32", "failed": {"x": str(scale)}}
    ways = {"cuda": 1.0, "eager": 2.0 * scale, **more}
    step = {"kind": "time", "step": "dense", "batch": 8, "iterations": int(9 * scale)}
    return [
        MACHINE,
        {**op, "milliseconds": ways, "replayed": {"cuda": 0.5 * scale}},
        {**step, "milliseconds": 3.0 * scale},
        {**step, "batch": 32, "milliseconds": 12.0},
        {"kind": "verdict", "op": "adam_clamp_", "milliseconds": 9.0 * scale},
    ]


def test_only_what_takes_longer_is_told() -> None:
    assert list(compare.sentences(times(1), times(1))) == ["5 times are in both files"]
    assert list(compare.sentences(times(1), times(1.09))) == ["5 times are in both files"]
    assert list(compare.sentences(times(1), times(0.5))) == ["5 times are in both files"]
    slower = list(compare.sentences(times(1), times(1.5)))[1:]
    assert len(slower) == 3
    assert "1.50 times as long: batch=8 measure=milliseconds step=dense: 4.5 after 3" in slower
    assert any("way=eager" in line and "op=adam_clamp_" in line for line in slower)
    assert any("measure=replayed" in line and "way=cuda" in line for line in slower)


def test_time_that_is_missing_now_is_told_and_a_new_one_is_not() -> None:
    lines = list(compare.sentences(times(1, triton=4.0), times(1)))
    assert len(lines) == 2
    assert lines[1].startswith("no longer timed: ") and "way=triton" in lines[1]
    assert len(list(compare.sentences(times(1), times(1, triton=4.0)))) == 1


def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    lines = [json.dumps(line) for line in times(1)]
    file.write_text("\n".join(lines)[:-20])
    assert compare.read(file) == times(1)[:-1]


@pytest.mark.parametrize("content", [None, b"", b"[1, 2]\n\xff", b'{"kind": "time"}\n7\n'])
def test_another_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(compare.NotComparable, match="expected a file of figures to compare with"):
        compare.read(file)


def test_the_command_refuses_it_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.jsonl"
    options = ["--device", "cpu", "--out", str(out), "--compare", str(tmp_path / "none.jsonl")]
    monkeypatch.setattr(sys, "argv", ["smi-fast", "verify", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "expected a file of figures to compare with, got" in capsys.readouterr().err
    assert not out.exists()
