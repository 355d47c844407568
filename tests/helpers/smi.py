"""The command in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from smi_fast import cli

QUICK = ("--schedule", "dense", "--iterations", "3", "--classes", "2,7-8", "--per-class", "2")


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

    def invert(self, out: Path | str, *arguments: object) -> tuple[int, str, str]:
        return self("invert", "--out", out, *QUICK, *arguments)
