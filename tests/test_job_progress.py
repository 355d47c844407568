"""What is shown of a whole pool."""

from __future__ import annotations

import json
import sys

import pytest

from smi_fast.job_progress import JobProgress, Tally

HELD = Tally(10, frozenset({3}), 9.0)
MADE = Tally(30, frozenset({3, 7}), 15.0)


def test_tallies_add_up_and_pass_as_json() -> None:
    records = [{"label": 3, "confidence": 0.75}, {"label": 1, "confidence": 0.5}]
    found = Tally.of(iter(records))
    assert found == Tally(2, frozenset({1, 3}), 1.25)
    assert Tally.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found + HELD == Tally(12, frozenset({1, 3}), 10.25)


def test_the_rate_is_that_of_the_images_made_since() -> None:
    progress = JobProgress(100, HELD, shown=False)
    line = progress.line(HELD + MADE, rate=0.5)
    assert line == ("40 of 100 images, 0.5 images/s, 02:00 left, 2 classes, mean confidence 0.600")
    assert progress.line(HELD, rate=2.0).endswith("left, 1 class, mean confidence 0.900")


def test_a_line_only_when_something_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    with JobProgress(100, HELD, shown=True) as progress:
        for made in (Tally(), MADE, MADE, MADE + MADE):
            progress.show(made)
    starts = [line.split(" images")[0] for line in capsys.readouterr().err.splitlines()]
    assert starts == ["40 of 100", "70 of 100"]
    with JobProgress(100, HELD, shown=False) as progress:
        progress.show(MADE)
    assert capsys.readouterr().err == ""


def test_a_bar_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with JobProgress(100, HELD, shown=True) as progress:
        progress.show(MADE)
    bar = capsys.readouterr().err.split("\r")[-1]
    assert " 40/100 " in bar and "image/s, 2 classes, mean confidence 0.600]" in bar
