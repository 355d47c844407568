"""The measurements of ``ops.py`` for pytest-benchmark: ``pytest benchmarks``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed.ops import Case, cases, check

IMPLEMENTATIONS = [(case, name) for case in cases() for name in case.implementations]


@pytest.mark.parametrize(("case", "name"), IMPLEMENTATIONS, ids=str)
def test_op(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    benchmark.group = str(case)
    call = case.call(name)
    check({"reference": case.call("reference"), name: call})
    benchmark(call)
