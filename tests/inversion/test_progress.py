"""How far an inversion is, as a terminal and a log file show it."""

from __future__ import annotations

import sys

import pytest
from timm.models.vision_transformer import VisionTransformer

from tests.helpers.inversions import TARGETS, make


def test_progress_bar_tells_loss_and_kept_patches(
    teacher: VisionTransformer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make(teacher).invert(TARGETS)
    bar = capsys.readouterr().err.splitlines()[-1]
    assert "10/10" in bar and "cross_entropy" in bar and "kept 6" in bar and "images/s" in bar


def test_progress_is_a_line_per_phase_where_no_terminal_can_redraw_it(
    teacher: VisionTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    make(teacher).invert(TARGETS)
    captured = capsys.readouterr()
    assert captured.out == "" and "\r" not in captured.err
    lines = captured.err.splitlines()
    for line, (done, kept) in zip(lines, ((3, 24), (6, 12), (10, 6)), strict=True):
        assert line.startswith(f"iteration {done} of 10: cross_entropy ")
        assert f"kept {kept}, " in line and line.endswith(" images/s")


def test_progress_can_be_turned_off(
    teacher: VisionTransformer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)
        make(teacher).invert(TARGETS, progress=False)
    assert capsys.readouterr() == ("", "")
