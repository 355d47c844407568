"""A run of mutants that is interrupted leaves neither a process nor a fault behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.mutants import run
from tests.mutants.mutant import ROOT
from tests.mutants.table import MUTANTS
from tests.mutants.tree import Tree


class Endless(Tree):
    """Stands for tests that take long."""

    def test(self, build: str, tests: str) -> None:
        os.setsid()
        self.log.write_text(f"{os.getpid()}\n")
        time.sleep(600)


def test_an_interrupt_ends_the_tests_and_takes_the_fault_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant, tree = next(m for m in MUTANTS if not m.build), Endless(tmp_path / "tree")
    planted = tree.path / mutant.file
    planted.parent.mkdir(parents=True)
    planted.write_text((ROOT / mutant.file).read_text())
    whole = planted.read_text()

    def interrupted(_: Iterable[int], timeout: float) -> None:
        assert planted.read_text() == mutant.planted(whole)
        while not (tree.log.exists() and tree.log.read_text().endswith("\n")):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(run.run_each([mutant], [tree]))
    assert planted.read_text() == whole
    with pytest.raises(ProcessLookupError):
        os.kill(int(tree.log.read_text()), 0)
