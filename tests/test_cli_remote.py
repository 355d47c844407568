"""The command on pools at a URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from smi_fast.pool.layout import CONTACT_SHEET, PAGE
from smi_fast.workers import Worker
from tests.helpers.pools import files
from tests.helpers.smi import Smi
from tests.helpers.stores import files_at

URL = "memory://pool"


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Smi]:
    yield Smi(monkeypatch, capsys)
    fsspec.filesystem("memory").store.clear()


def test_invert_fills_a_pool_at_a_url_and_resumes_it(
    smi: Smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--batch-size", 1, "--strip", 2)
    code, out, err = smi.invert(tmp_path / "here", *options)
    assert code == 0, err
    added = Worker.add

    def interrupted(self: Worker, *arguments: Any) -> None:
        added(self, *arguments)
        self._stop.wanted = True

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "add", interrupted)
        code, _, err = smi.invert(URL, *options)
    assert code == 130 and f"stopped: {URL} has " in err
    code, there, err = smi.invert(URL, "--resume", *options)
    assert code == 0, err
    assert there.replace(URL, str(tmp_path / "here")) == out
    assert files_at(URL) == files(tmp_path / "here")
    assert f"look at {URL}/{CONTACT_SHEET}\n" in there


def test_the_other_commands_read_a_pool_at_a_url(smi: Smi, tmp_path: Path) -> None:
    code, _, err = smi.invert(URL)
    assert code == 0, err
    assert smi("pool", "check", URL)[:2] == (0, f"6 images in {URL}: nothing wrong\n")
    assert smi("report", URL)[:2] == (0, f"look at {URL}/{PAGE}\n")
    assert b"<title>6 images in pool</title>" in files_at(URL)[PAGE]
    code, out, err = smi("export", URL, "--layout", "imagenet", "--out", tmp_path / "exported")
    assert (code, out) == (0, f"6 images in {tmp_path / 'exported'}\n"), err
    code, _, err = smi.invert(tmp_path / "here", "--seed", 1)
    code, out, err = smi("pool", "merge", URL, tmp_path / "here", "--out", tmp_path / "merged")
    assert code == 0 and out.startswith(f"12 images in {tmp_path / 'merged'}; "), err
    fsspec.filesystem("memory").pipe_file("/pool/masks/0002/000000.png", b"damaged")
    code, out, _ = smi("pool", "check", URL)
    assert code == 1 and "image 0: its files are not those that were written" in out
    fsspec.filesystem("memory").rm_file("/pool/masks/0002/000000.png")
    code, out, _ = smi("pool", "check", URL)
    assert code == 1 and f"{URL}/masks/0002/000000.png can't be read: No such file" in out


def test_a_url_that_is_no_pool_is_one_sentence(smi: Smi) -> None:
    for command in (("pool", "check"), ("report",)):
        code, _, err = smi(*command, "memory://nothing")
        assert code == 2 and err.count("\n") == 1, err
        assert "an empty or missing folder" in err
    code, _, err = smi.invert("what://x")
    assert (code, err) == (2, "smi-fast: what://x: opening it failed: Protocol not known: what\n")
