"""The engine of GPUs, on the CPU: what it computes, and how many kernels it asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.backends.triton import engine_runs
from tests.backends.triton.test_runs import process
from tests.helpers.kernels import needs_cpp

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "smi_fast.kernels")),
    reason="needs triton and the installed smi_fast.kernels",
)
Run = Callable[..., Any]
# The greatest error, as a share of the largest number: float32 as the engine of the CPU has it, and
# some roundings of the other two.
CLOSE = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 0.02}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Calls a function of :mod:`.engine_runs` where kernels are interpreted."""
    with process("1") as call:
        yield call


@pytest.mark.parametrize("size", engine_runs.SIZES, ids=str)
@pytest.mark.parametrize("precision", CLOSE)
def test_equals_the_blocks(interpreted: Run, precision: str, size: tuple[int, int]) -> None:
    assert interpreted(engine_runs.whole_blocks, precision, *size) < CLOSE[precision]


@pytest.mark.parametrize("size", engine_runs.SIZES, ids=str)
@pytest.mark.parametrize("precision", CLOSE)
def test_first_rows_are_those_of_the_block(
    interpreted: Run, precision: str, size: tuple[int, int]
) -> None:
    assert interpreted(engine_runs.first_rows, precision, *size) < CLOSE[precision]


@pytest.mark.parametrize("kind", engine_runs.KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_norms_and_activations(interpreted: Run, precision: str, kind: str) -> None:
    for found in (engine_runs.whole_blocks, engine_runs.first_rows):
        assert interpreted(found, precision, 96, 2, kind) < CLOSE[precision]


def test_a_norm_of_another_kind_stays_behind_the_rows(interpreted: Run) -> None:
    assert interpreted(engine_runs.other_norm) < 1e-5


def test_bfloat16_is_within_its_budget(interpreted: Run) -> None:
    for error, budget in interpreted(engine_runs.in_bfloat16):
        assert error <= budget


@pytest.mark.parametrize("part", ["qkv", "proj", "fc1", "fc2"])
def test_the_budget_catches_one_percent_of_one_matrix(interpreted: Run, part: str) -> None:
    found = interpreted(engine_runs.in_bfloat16, part)
    assert not all(error <= budget for error, budget in found)


@pytest.mark.parametrize(
    ("precision", "expected"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")]
)
def test_products_see_the_precision_and_nothing_else_does(
    interpreted: Run, precision: str, expected: str
) -> None:
    assert interpreted(engine_runs.settings_of_products, precision) == [(expected, False)]


def test_the_loss_is_that_of_pytorch(interpreted: Run) -> None:
    assert max(interpreted(engine_runs.loss)) < 1e-6


def test_memory_is_planned_once_and_of_one_pass(interpreted: Run) -> None:
    interpreted(engine_runs.memory)


def test_it_follows_its_teacher_and_copies_of_it(interpreted: Run) -> None:
    interpreted(engine_runs.followed_weights)


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("deit_tiny_distilled_patch16_224", None),
        ("vit_tiny_patch16_224 average with class token", None),
        ("vit_tiny_patch16_224 no bias", {1: 0.6}),
        ("eva02_tiny_patch14_224", None),
        ("eva02_base_patch16_clip_224", None),
        ("vit_small_patch16_dinov3", None),
        ("vit_small_patch16_rope_mixed_224", {1: 0.6}),
        ("aimv2_huge_patch14_224", None),
    ],
)
def test_teachers(interpreted: Run, name: str, narrow: dict[int, float] | None) -> None:
    """With two rows that the head reads, with all, and with fewer tokens from a block on; with
    rotary positions of both kinds, SwiGLU, RMSNorm, and norms inside of blocks.
    """
    assert max(interpreted(engine_runs.teacher, name, narrow)) < 1e-4


@needs_cpp
def test_three_iterations_give_the_images_of_the_cpu_engine(interpreted: Run) -> None:
    found = interpreted(engine_runs.images)
    assert 0 < found["ours"] <= 2 * found["cpu"] and found["apart"] <= 2 * found["cpu"], found
    assert found["tf32"] <= found["cpu"], found


@pytest.mark.parametrize(
    ("precision", "of_block", "of_rows", "parts"),
    [
        ("float32", 16, 20, ()),
        ("tf32", 14, 18, ()),
        ("bfloat16", 14, 18, ()),
        ("bfloat16", 24, 28, ("all", True)),
    ],
)
def test_kernels_of_blocks(
    precision: str, of_block: int, of_rows: int, parts: tuple[Any, ...]
) -> None:
    """And none of them waits for the host, or has a shape that depends on data. Between the blocks
    and the last one there is no other.
    """
    with process("0") as call:
        two, three, rows, joined = call(engine_runs.kernels_of_blocks, precision, *parts)
    assert three.total() - two.total() == of_block, three - two
    assert rows.total() == of_rows, rows
    assert joined.total() == of_block + of_rows, joined
