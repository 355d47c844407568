"""The Triton kernels, executed on the CPU: values, bounds, races and bytes.

They run on Triton's interpreter with the corrections of :mod:`triton_guard`, in a process of their
own, because triton decides at its import whether kernels are interpreted.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import triton_cases as cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or importlib.util.find_spec("smi_fast.kernels") is None,
    reason="needs triton and the installed smi_fast.kernels",
)
Call = Callable[..., Any]
BOTH = ("float32", "bfloat16")
COUNTS = (1, 2, 46, 47, 66, 137, 196, 197)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """Calls a function of :mod:`triton_cases` where kernels are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *args, **named: pool.submit(function, *args, **named).result()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 7), ("bfloat16", 4), ("float32", 16)])
@pytest.mark.parametrize(
    ("shift", "flip"), [((0, 0), False), ((-5, 30), True), ((13, -83), False), ((8, 8), True)]
)
def test_gather_patches(
    interpreted: Call, dtype: str, size: int, shift: tuple[int, int], flip: bool
) -> None:
    interpreted(cases.gather_patches, dtype, 5, size, shift, flip)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_gather_patches_of_strided_images(interpreted: Call, count: int) -> None:
    interpreted(cases.gather_patches, "float32", count, 4, (3, -2), True, strided=True)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("count", [None, 1, 7, 12])
def test_total_variation(interpreted: Call, dtype: str, count: int | None) -> None:
    interpreted(cases.total_variation, dtype, count, (2, 3, 42, 56), 14)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 9), (2, 1, 9, 1), (1, 1, 80, 81)])
def test_total_variation_of_odd_images(
    interpreted: Call, dtype: str, shape: tuple[int, int, int, int]
) -> None:
    interpreted(cases.total_variation, dtype, None, shape, 1)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 7), (2, 2, 50, 50), (9, 1, 33, 31)])
def test_batch_norm_matching(
    interpreted: Call, dtype: str, shape: tuple[int, int, int, int]
) -> None:
    interpreted(cases.batch_norm_matching, dtype, shape)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("count", "size"), [(None, 1), (1, 14), (7, 14), (5, 16)])
def test_adam_clamp(interpreted: Call, dtype: str, count: int | None, size: int) -> None:
    interpreted(
        cases.adam_clamp, dtype, count, (2, 3, 3 * size, 4 * size + 7 * (count is None)), size
    )


@pytest.mark.parametrize("betas", [(0.5, 0.99), (0.9, 0.999), (0.5, 0.0)])
@pytest.mark.parametrize("step", [1, 2, 40, 4000])
def test_adam_clamp_corrects_its_bias_from_first_to_last(
    interpreted: Call, step: int, betas: tuple[float, float]
) -> None:
    interpreted(cases.adam_clamp, "float32", None, (2, 3, 8, 9), 1, step=step, betas=betas)


def test_strided_and_expanded_pixels(interpreted: Call) -> None:
    interpreted(cases.total_variation, "float32", 5, (2, 3, 12, 16), 4, strided=True)
    interpreted(cases.batch_norm_matching, "float32", (2, 3, 9, 5), strided=True)
    interpreted(cases.adam_clamp, "float32", 5, (2, 3, 12, 16), 4, strided=True)
    interpreted(cases.adam_clamp, "float32", None, (2, 3, 12, 16), 1, strided=True)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("count", COUNTS)
def test_gather_attention(interpreted: Call, dtype: str, count: int) -> None:
    interpreted(cases.gather_attention, dtype, count, 64, batch=1 if count > 66 else 2)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("count", "width"), [(2, 32), (47, 72), (66, 80), (197, 32), (137, 72)])
def test_gather_attention_of_other_widths(
    interpreted: Call, dtype: str, count: int, width: int
) -> None:
    interpreted(cases.gather_attention, dtype, count, width, batch=1)


@pytest.mark.parametrize("count", [1, 47, 197])
def test_gather_attention_in_float16(interpreted: Call, count: int) -> None:
    interpreted(cases.gather_attention, "float16", count, 64, batch=1)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", BOTH)
def test_gather_attention_of_ragged_sets(interpreted: Call, dtype: str, gathered: bool) -> None:
    interpreted(
        cases.gather_attention, dtype, 19, 32, batch=4, lengths=(19, 0, 1, 40), gathered=gathered
    )


@pytest.mark.parametrize("count", [21, 300])
def test_gather_attention_of_strided_qkv(interpreted: Call, count: int) -> None:
    interpreted(cases.gather_attention, "float32", count, 24, gathered=False, strided=True)


def test_more_tokens_than_a_program_holds(interpreted: Call) -> None:
    interpreted(cases.gather_attention, "float32", 300, 16, batch=3, lengths=(300, 0, 12))


def test_empty_batches(interpreted: Call) -> None:
    interpreted(cases.empty)


def test_same_bytes_again(interpreted: Call) -> None:
    interpreted(cases.deterministic)


@pytest.mark.parametrize(
    "op",
    [
        "gather_patches",
        "gather_patches_backward",
        "total_variation",
        "total_variation_backward",
        "batch_norm_matching",
        "batch_norm_matching_backward",
        "adam_clamp_",
        "gather_attention",
        "gather_attention_backward",
    ],
)
def test_bytes_moved(interpreted: Call, op: str) -> None:
    moved, floor = interpreted(cases.traffic, op)
    assert floor <= moved <= 1.15 * floor


def test_guard_rounds_as_the_hardware_does(interpreted: Call) -> None:
    interpreted(cases.rounding)


def test_guard_catches_an_index_out_of_bounds(interpreted: Call) -> None:
    assert interpreted(cases.out_of_bounds_index).startswith("OutOfBoundsError")


ATTENTION = ("gather_attention.py", "gather_attention", ("float32", 19, 32))
VARIATION = ("total_variation.py", "total_variation", ("float32", None, (2, 3, 9, 7), 1))


@pytest.mark.parametrize(
    ("kernel", "old", "new", "caught"),
    [
        # A mask dropped in softmax gives wrong values; in a store, it reaches into a neighbour.
        (ATTENTION, 'tl.where(valid[None, :], scores, -float("inf"))', "scores", "AssertionError"),
        (ATTENTION, "tl.where(valid[:, None], scores, -1e38)", "scores", "AssertionError"),
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
            "AssertionError",
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
        # Sums in a lower precision than float32, as a forgotten conversion gives.
        (ATTENTION, '"ieee" if full else "tf32"', '"tf32"', "AssertionError"),
    ],
)
def test_harness_catches(
    interpreted: Call, kernel: tuple[str, str, tuple[Any, ...]], old: str, new: str, caught: str
) -> None:
    file, case, arguments = kernel
    said = interpreted(cases.planted_fault, file, old, new, case, *arguments)
    assert any(said.startswith(name) for name in caught.strip("()").split("|")), said
