"""The Triton kernels, executed on the CPU: values, bounds, races and bytes.

They run on Triton's interpreter with the corrections of :mod:`tests.backends.triton.guard`, in a
process of their own, because triton decides at its import whether kernels are interpreted.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from smi_fast.verify.call_grid import in_turn, op_calls, reduced
from smi_fast.verify.cases import OpCall
from smi_fast.verify.gpu_engine_grid import gpu_engine_calls
from tests.backends.planted import CALL_OF_EACH_OP, CALLS_WITH_FACTORS
from tests.backends.triton import interpreted as calls

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or importlib.util.find_spec("smi_fast.kernels") is None,
    reason="needs triton and the installed smi_fast.kernels",
)
Run = Callable[..., Any]
# Larger images would only add programs, which the interpreter runs one by one.
CALLS = in_turn(reduced(op_calls(), elements=100_000, layouts=True))
STEPS = gpu_engine_calls()
# A few rows would be too few for their rounding to cancel in the norm.
STEP_OF_EACH_KIND = list(
    {call.op: call for call in reversed(STEPS) if 40 < len(call.arguments[0]) < 100}.values()
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Calls a function of :mod:`.interpreted` where kernels are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *args, **named: pool.submit(function, *args, **named).result()


@pytest.mark.parametrize(("call", "dtype"), CALLS, ids=str)
def test_error_is_within_its_budget(interpreted: Run, call: OpCall, dtype: torch.dtype) -> None:
    interpreted(calls.check, str(call), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", STEPS, ids=str)
def test_error_of_a_step_is_within_its_budget(
    interpreted: Run, call: OpCall, dtype: torch.dtype
) -> None:
    interpreted(calls.check, str(call), dtype)


@pytest.mark.parametrize("call", STEP_OF_EACH_KIND, ids=str)
def test_budget_catches_half_a_percent_of_a_step(interpreted: Run, call: OpCall) -> None:
    for dtype, factor in ((torch.float32, 1 + 1e-5), (torch.bfloat16, 1.005)):
        said = interpreted(calls.with_factor, str(call), dtype, "result", factor)
        assert said is not None and "error" in said


@pytest.mark.parametrize("call", [c for c in STEPS if c.op.startswith("attend_rows")], ids=str)
def test_rows_of_bfloat16(interpreted: Run, call: OpCall) -> None:
    interpreted(calls.attend_rows_in_bfloat16, str(call))


def test_products_follow_the_precision_of_torch(interpreted: Run) -> None:
    found = interpreted(calls.products_by_precision)
    assert found["float32"] < 2e-6 and 1e-4 < found["tf32"] < 2e-3


def test_a_variance_that_overflows_shows(interpreted: Run) -> None:
    interpreted(calls.overflow)


@pytest.mark.parametrize("call", CALLS_WITH_FACTORS, ids=str)
@pytest.mark.parametrize("part", "qkv")
def test_budget_catches_a_factor(interpreted: Run, call: OpCall, part: str) -> None:
    for dtype, factor in ((torch.bfloat16, 1.005), (torch.float16, 1.001)):
        said = interpreted(calls.with_factor, str(call), dtype, part, factor)
        assert said is not None and "error" in said


@pytest.mark.parametrize("call", CALL_OF_EACH_OP, ids=str)
def test_budget_catches_a_scaled_result(interpreted: Run, call: OpCall) -> None:
    for dtype, factor in ((torch.float32, 1 + 1e-5), (torch.bfloat16, 1.02)):
        assert interpreted(calls.with_factor, str(call), dtype, "result", factor) is not None


def test_sums_of_float16_images_are_finite(interpreted: Run) -> None:
    interpreted(calls.sums_of_float16)


def test_same_bytes_again(interpreted: Run) -> None:
    interpreted(calls.deterministic)


@pytest.mark.parametrize(
    "op",
    [
        "gather_patches",
        "gather_patches_backward",
        "gather_sigmoid_patches",
        "gather_sigmoid_patches_backward",
        "total_variation",
        "total_variation_backward",
        "batch_norm_matching",
        "batch_norm_matching_backward",
        "adam_clamp_",
        "gather_attention",
        "gather_attention_backward",
        "add_normalize_",
        "normalize_backward_",
        "gelu_",
        "multiply_",
        "swiglu_",
        "swiglu_backward_",
        "rotate_",
        "rotate_backward_",
        "attend_rows",
        "attend_rows_backward",
        "cross_entropy",
    ],
)
def test_bytes_moved(interpreted: Run, op: str) -> None:
    moved, floor = interpreted(calls.traffic, op)
    assert floor <= moved <= 1.15 * floor


def test_guard_rounds_as_the_hardware_does(interpreted: Run) -> None:
    interpreted(calls.rounding)


def test_guard_catches_an_index_out_of_bounds(interpreted: Run) -> None:
    assert interpreted(calls.out_of_bounds_index).startswith("OutOfBoundsError")


ATTENTION = (
    "gather_attention.py",
    ("gather_attention-47-32-kept", "gather_attention_backward-47-32-kept-dense"),
)
ADAM = ("adam_clamp.py", ("adam_clamp_-not-a-number-all",))
VARIATION = ("total_variation.py", ("total_variation-7x33", "total_variation_backward-7x33"))


@pytest.mark.parametrize(
    ("kernel", "old", "new", "caught"),
    [
        # A mask dropped in softmax gives wrong values; in a store, it reaches into a neighbour.
        (ATTENTION, 'tl.where(valid[None, :], scores, -float("inf"))', "scores", "WrongResult"),
        (ATTENTION, "tl.where(valid[:, None], scores, -1e38)", "scores", "WrongResult"),
        (
            ATTENTION,
            "mask=(tokens < K)[:, None] & real",
            "mask=real",
            "(RaceError|OutOfBoundsError)",
        ),
        # A load that leaves masked lanes undefined.
        (
            ATTENTION,
            "exists[:, None] & real, other=0.0",
            "exists[:, None] & real",
            "WrongResult",
        ),
        # Programs that share a place for their sums.
        (VARIATION, "+ program, tl.sum(d * d)", ", tl.sum(d * d)", "RaceError"),
        # A tile whose end isn't cut off.
        (
            VARIATION,
            "mask=pixel < HEIGHT * WIDTH",
            "mask=pixel >= 0",
            "(RaceError|OutOfBoundsError)",
        ),
        # A clamp that turns NaN into a bound.
        (
            ADAM,
            "tl.where(pixels < lowest, lowest, pixels)",
            "tl.maximum(pixels, lowest)",
            "WrongResult",
        ),
        # Sums in a lower precision than float32, as a forgotten conversion gives.
        (ATTENTION, '"ieee" if full else "tf32"', '"tf32"', "WrongResult"),
    ],
)
def test_harness_catches(
    interpreted: Run, kernel: tuple[str, tuple[str, ...]], old: str, new: str, caught: str
) -> None:
    file, run = kernel
    said = interpreted(calls.planted_fault, file, old, new, run)
    assert any(said.startswith(name) for name in caught.strip("()").split("|")), said
