"""The measurements of ``ops.py`` for pytest-benchmark: ``pytest benchmarks``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed.ops import OpBenchmark, check, op_benchmarks

IMPLEMENTATIONS = [(each, name) for each in op_benchmarks() for name in each.implementations]


@pytest.mark.parametrize(("op_benchmark", "name"), IMPLEMENTATIONS, ids=str)
def test_op(benchmark: BenchmarkFixture, op_benchmark: OpBenchmark, name: str) -> None:
    benchmark.group = str(op_benchmark)
    call = op_benchmark.call(name)
    check({"reference": op_benchmark.call("reference"), name: call})
    benchmark(call)
