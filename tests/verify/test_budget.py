"""The error budget: it holds for a kernel that only rounds its result, and not for a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.ops import backends, reference
from smi_fast.verify.budget import Error, errors
from smi_fast.verify.call_grid import FLOATS, in_turn, op_calls, reduced
from smi_fast.verify.cases import CHANGED, EXACT, OpCall, WrongResult, expanded, strided

OPS = sorted({call.op for call in op_calls()} - set(EXACT))
HALF = {torch.bfloat16: 1.005, torch.float16: 1.001}


def rounded_once(factor: float = 1.0) -> Any:
    """Kernels that compute in float64, times a factor, and round once to the reference's type."""

    def kernel(op: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            exact = [a.double() if _floating(a) else a for a in arguments]
            results = getattr(reference, op)(*exact)
            if op in CHANGED:
                for index in CHANGED[op]:
                    arguments[index].copy_(exact[index] * factor)
                return None
            eager = getattr(reference, op)(*arguments)
            if isinstance(results, Tensor):
                return (results * factor).to(eager.dtype)
            pairs = zip(results, eager, strict=True)
            return tuple((result * factor).to(like.dtype) for result, like in pairs)

        return run

    return SimpleNamespace(**{op: kernel(op) for op in OPS})


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_one_rounding_is_allowed_and_a_factor_is_not(op: str, dtype: torch.dtype) -> None:
    calls = [c for c in reduced(op_calls(), elements=100_000, layouts=True) if c.op == op]
    for call in calls:
        call.check(rounded_once(), dtype)
    assert any(wrong(call, rounded_once(HALF[dtype]), dtype) for call in calls)


def wrong(call: OpCall, functions: Any, dtype: torch.dtype) -> bool:
    try:
        call.check(functions, dtype)
    except WrongResult:
        return True
    return False


def test_factor_is_seen_in_the_norm_before_it_is_in_an_element() -> None:
    """Eager rounds the probabilities too, so that its largest error hides a factor."""
    call = next(call for call in op_calls() if str(call) == "gather_attention-66-64-plain")
    found = list(call.errors(rounded_once(1.005), torch.bfloat16))
    assert {error.measure for error in found if not error.allowed} == {"norm"}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_rounding_leaves_room_in_the_norm(dtype: torch.dtype) -> None:
    for call in reduced(op_calls(), elements=100_000, layouts=False):
        if call.op in OPS:
            found = call.errors(rounded_once(), dtype)
            assert all(error.share < 0.5 for error in found if error.measure == "norm"), call


def test_every_row_of_the_sums_has_a_budget_of_its_own() -> None:
    """The norms of differences are small beside their number."""

    def norms_off(*arguments: Any) -> Tensor:
        sums = reference.total_variation(*arguments)
        sums[1] *= 1.01
        return sums

    call = next(call for call in op_calls() if str(call) == "total_variation-65x67")
    with pytest.raises(WrongResult, match="error"):
        call.check(SimpleNamespace(total_variation=norms_off), torch.float32)


def test_exact_result_comes_from_the_rounded_arguments() -> None:
    call = OpCall("", "total_variation", (torch.tensor([[[[1.0, 1.001]]]]), None, 1))
    for error in call.errors(reference, torch.bfloat16):
        assert error.value == 0


def test_infinity_is_right_where_the_exact_result_overflows_and_only_there() -> None:
    exact = torch.tensor([1e5, 2.0], dtype=torch.float64)
    eager = torch.tensor([torch.inf, torch.inf], dtype=torch.float16)
    right = torch.tensor([torch.inf, 2.0], dtype=torch.float16)
    assert all(error.allowed for error in errors(right, eager, exact))
    assert not all(error.allowed for error in errors(eager, eager, exact))


def test_nan_is_right_where_the_exact_result_is_nan_and_only_there() -> None:
    exact = torch.tensor([torch.nan, 2.0], dtype=torch.float64)
    right = torch.tensor([torch.nan, 2.0])
    assert all(error.allowed for error in errors(right, right, exact))
    for wrong in ([-1.0, 2.0], [torch.nan, torch.nan], [torch.inf, 2.0]):
        assert not any(error.allowed for error in errors(torch.tensor(wrong), right, exact))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_result_that_is_no_number_is_out_of_every_budget(value: float) -> None:
    exact = torch.ones(3, dtype=torch.float64)
    found = errors(torch.tensor([1.0, value, 1.0]), torch.ones(3), exact)
    assert not any(error.allowed for error in found)


def test_kernel_may_have_twice_the_error_of_eager() -> None:
    exact = torch.zeros(4, dtype=torch.float64)
    for factor, allowed in ((1.99, True), (2.01, False)):
        eager = torch.tensor([0.0, 0.0, 1e-3, 0.0])
        element, _ = errors(factor * eager, eager, exact)
        assert element.allowed == allowed


def test_copies_are_compared_bit_by_bit() -> None:
    call = next(call for call in op_calls() if call.op == "gather_patches")

    def one_ulp(*arguments: Any) -> tuple[Tensor, Tensor]:
        patches, positions = reference.gather_patches(*arguments)
        patches.flatten()[0] = patches.flatten()[0].nextafter(torch.tensor(torch.inf))
        return patches, positions

    with pytest.raises(WrongResult, match="isn't a copy"):
        call.check(SimpleNamespace(gather_patches=one_ulp), torch.float32)


def test_share_of_a_budget_of_zero() -> None:
    assert Error("element", 0.0, 0.0).share == 0.0
    assert Error("element", 1e-9, 0.0).share == float("inf")


def test_strided_and_expanded_arguments_keep_their_layout() -> None:
    tensor = torch.randn(2, 3, 4)
    assert torch.equal(strided(tensor), tensor) and strided(tensor).stride() == (2, 4, 12)
    call = OpCall("", "total_variation", (expanded(tensor),))
    assert call.converted(torch.float16).tensors[0].stride()[0] == 0


def test_grid_is_the_same_every_time_and_has_every_op() -> None:
    first, second = op_calls(), op_calls()
    assert len({str(call) for call in first}) == len(first)
    for one, two in zip(first, second, strict=True):
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(one.tensors, two.tensors, **exactly)
    with_gradient = {op for name in backends.OPS for op in (name, f"{name}_backward")}
    assert {call.op for call in first} == with_gradient - {"adam_clamp__backward"}


def test_reduced_selection_reaches_every_op() -> None:
    for elements, layouts in ((10_000, False), (100_000, True)):
        chosen = reduced(op_calls(), elements, layouts)
        assert {call.op for call in chosen} == {call.op for call in op_calls()}
        assert layouts == any(call.label.startswith("strided") for call in chosen)
        assert max(tensor.numel() for call in chosen for tensor in call.tensors) <= elements


def test_types_in_turn_give_every_op_each_type() -> None:
    for elements, layouts in ((8_000, False), (100_000, True)):
        pairs = in_turn(reduced(op_calls(), elements, layouts))
        assert {(call.op, dtype) for call, dtype in pairs} == {
            (call.op, dtype) for call in op_calls() for dtype in FLOATS
        }
