"""The table of mutants fits the package: each old text is there, and so is each test."""

from __future__ import annotations

import re

import pytest

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.table import MUTANTS


def test_names_are_distinct_and_few_mutants_are_equivalent() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    assert sum(bool(mutant.equivalent) for mutant in MUTANTS) <= 0.05 * len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_file_has_the_old_text_once_and_the_tests_exist(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text("utf-8")
    assert mutant.planted(text) != text
    nodes = mutant.tests.partition(" -k")[0].split()
    assert nodes and mutant.breaks.endswith(".")
    for node in nodes:
        path, _, name = node.partition("::")
        assert (ROOT / path).exists(), node
        function = re.escape(name.partition("[")[0])
        assert not name or re.search(rf"^def {function}\(", (ROOT / path).read_text("utf-8"), re.M)
