"""The CUDA kernels, emulated on the CPU: values, memory, races, and that faults are caught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_emulation import build, cases
from cuda_emulation.backend import Emulated
from cuda_emulation.build import Fault

from smi_fast.ops import backends

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

FAULTS = (
    Fault(
        "out_of_bounds",
        "memory",
        "gather_attention.cuh",
        "if (source >= 0 && source < rows)",
        "if (source >= 0)",
        "gather_attention_fwd.cu",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Fault(
        "shared_memory_too_small",
        "memory",
        "gather_attention.cuh",
        ": 3 * row);",
        ": 3 * row - 2);",
        "gather_attention_fwd.cu",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Fault(
        "missing_barrier",
        "races",
        "gather_attention_bwd.cu",
        "  }\n  __syncthreads();\n",
        "  }\n",
        "gather_attention_bwd.cu",
        "race: a read after a write",
    ),
    Fault(
        "missing_barrier_of_sum",
        "races",
        "common.cuh",
        "  __syncthreads();\n",
        "",
        "batch_norm_matching.cu",
        "race: a read after a write",
    ),
    Fault(
        "barrier_of_one_warp",
        "plain",
        "gather_attention_bwd.cu",
        "  }\n  __syncthreads();\n",
        "  }\n  if (warp() == 0) __syncthreads();\n",
        "gather_attention_bwd.cu",
        "deadlock|exited",
    ),
    Fault(
        "wrong_lane",
        "plain",
        "warp_tiles.cuh",
        "b + (lane() / 16 * 8 + lane() % 8) * kRow",
        "b + lane() % 16 * kRow",
        "gather_attention_fwd.cu",
        "AssertionError",
    ),
    Fault(
        "missing_wait",
        "plain",
        "gather_attention_fwd.cu",
        "  wait_for_copies();\n",
        "",
        "gather_attention_fwd.cu",
        "AssertionError",
    ),
    Fault(
        "unwritten_output",
        "plain",
        "total_variation.cu",
        "x < plane.width; x += kWarp) {\n      const bool kept = plane.kept(y, x);\n"
        "      const float here = plane.at(y, x);\n      float",
        "x + 1 < plane.width; x += kWarp) {\n      const bool kept = plane.kept(y, x);\n"
        "      const float here = plane.at(y, x);\n      float",
        "total_variation.cu",
        "AssertionError: error nan",
    ),
)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build.build(build.VARIANTS, FAULTS)


@pytest.fixture(scope="module")
def backend(_built: None) -> Emulated:
    return Emulated(build.load(build.module_path("plain")))


def run_alone(module: Path, variant: str) -> subprocess.CompletedProcess[str]:
    """Runs the reduced grid in a process that has the libraries of sanitizers from its start."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if variant == "memory":
        libraries = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment["LD_PRELOAD"] = " ".join(libraries)
        # Fibers have stacks of their own, and Python never frees all it has.
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    return subprocess.run(
        [sys.executable, cases.__file__, str(module)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )


Run = Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, _built: None) -> Iterator[dict[str | Fault, Run]]:
    """Runs of the modules that the selected tests ask for, two at a time."""
    items = [item for item in request.session.items if item.path == request.path]
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    variants = {p["variant"] for p in parameters if "variant" in p}
    faults = {p["fault"] for p in parameters if "fault" in p}
    with ThreadPoolExecutor(2) as pool:
        yield {
            **{v: pool.submit(run_alone, build.module_path(v), v) for v in variants},
            **{
                f: pool.submit(run_alone, build.module_path(f.variant, f), f.variant)
                for f in faults
            },
        }


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_reduced_grid_is_clean(runs: dict[str | Fault, Run], variant: str) -> None:
    done = runs[variant].result()
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(runs: dict[str | Fault, Run], fault: Fault) -> None:
    done = runs[fault].result()
    assert done.returncode != 0
    assert re.search(fault.caught, done.stderr), done.stderr[-4000:]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("width", [32, 64, 72, 80])
@pytest.mark.parametrize("count", [1, 2, 46, 47, 66, 137, 196, 197])
def test_attention(backend: Emulated, count: int, width: int, dtype: torch.dtype) -> None:
    # Four matrices of float32 as wide as 80, for 13 tiles of tokens, are more than 227 KiB.
    fits = dtype != torch.float32 or width <= 64 or count <= 160
    cases.check_attention(backend, 1, 1, count, width, dtype, gathered=count != 197, backward=fits)


def test_gradient_that_does_not_fit_is_refused(backend: Emulated) -> None:
    qkv, grad = torch.randn(1, 161, 3, 1, 80), torch.randn(1, 161, 80)
    with pytest.raises(RuntimeError, match="no GPU accepts"):
        backend.gather_attention_backward(grad, qkv, None, None)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("gradient", [False, True])
def test_limit_of_tokens_is_known_before_the_launch(
    backend: Emulated, gradient: bool, dtype: torch.dtype
) -> None:
    for width in range(8, 129, 8):
        most = backends.most_tokens(width, dtype.itemsize, gradient, 227 * 1024)
        assert most == backend.max_tokens(dtype, width, gradient)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("lengths", [[5, 0, 40], [39, 16, 1], [17, -3, 41]])
def test_attention_of_ragged_images(
    backend: Emulated, lengths: list[int], dtype: torch.dtype
) -> None:
    within = [min(max(length, 0), 40) for length in lengths]
    cases.check_attention(backend, 3, 2, 40, 32, dtype, lengths=within)
    qkv = torch.randn(3, 40, 3, 2, 32).to(dtype)
    outputs = [
        backend.gather_attention(qkv, None, torch.tensor(given), True)
        for given in (lengths, within)
    ]
    assert all(map(torch.equal, *outputs))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_tokens_outside_of_the_rows_read_as_nan(backend: Emulated, dtype: torch.dtype) -> None:
    cases.check_missing_tokens(backend, dtype)


def test_wide_heads(backend: Emulated) -> None:
    for dtype in cases.DTYPES:
        cases.check_attention(backend, 1, 2, 20, 128, dtype)
        cases.check_attention(backend, 1, 2, 20, 8, dtype)


def test_no_token_kept(backend: Emulated) -> None:
    qkv, kept = torch.randn(2, 5, 3, 2, 32), torch.empty(2, 0, dtype=torch.int64)
    out, importance = backend.gather_attention(qkv, kept, None, True)
    assert out.shape == (2, 0, 64) and importance.shape == (2, 0)
    assert not backend.gather_attention_backward(out, qkv, kept, None).any()


@pytest.mark.parametrize("shape", [(1, 300, 3, 1, 128), (1, 5, 3, 1, 12), (1, 5, 3, 1, 136)])
def test_what_does_not_fit_is_refused(backend: Emulated, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"cudaError_t|no GPU accepts"):
        backend.gather_attention(torch.randn(shape), None, None, False)


@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.float64])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("size", "patch"), [((8, 8), 8), ((21, 35), 7), ((28, 14), 14), ((32, 96), 16)]
)
def test_patches(
    backend: Emulated, size: tuple[int, int], patch: int, flip: bool, dtype: torch.dtype
) -> None:
    for shift in ((0, 0), (patch // 2, -patch // 2), (-1, 1), (3 * size[0] + 5, -2 * size[1] - 9)):
        cases.check_patches(backend, size, patch, shift, flip, dtype)


def test_patches_outside_of_the_grid(backend: Emulated) -> None:
    cases.check_missing_patches(backend)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 5), (2, 3, 33, 37), (3, 3, 64, 64)])
def test_total_variation(backend: Emulated, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check_variation(backend, shape, None, 0, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("count", [0, 1, 6, 12])
def test_total_variation_of_kept_patches(backend: Emulated, count: int, dtype: torch.dtype) -> None:
    cases.check_variation(backend, (2, 3, 21, 28), 7, count, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 7), (2, 3, 80, 80), (4, 300, 2, 1)])
def test_batch_norm_matching(
    backend: Emulated, shape: tuple[int, ...], mean: float, dtype: torch.dtype
) -> None:
    cases.check_norm(backend, shape, mean, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("patch", "count"), [(None, 0), (4, 0), (4, 5), (7, 6)])
def test_adam_clamp(backend: Emulated, patch: int | None, count: int, dtype: torch.dtype) -> None:
    cases.check_adam(backend, (28, 56) if patch == 7 else (12, 20), patch, count, dtype)


def test_adam_clamp_lets_nan_through(backend: Emulated) -> None:
    state = [torch.zeros(1, 3, 4, 4) for _ in range(4)]
    state[1][0, 0, 0, 0] = torch.nan
    backend.adam_clamp_(*state, torch.tensor(1), 0.1, 0.5, 0.9, *cases.BOUNDS, None, 1)
    assert state[0].isnan().sum() == 1


def test_runs_repeat_bit_for_bit(backend: Emulated) -> None:
    qkv, images = torch.randn(1, 47, 3, 1, 32).bfloat16(), torch.randn(2, 3, 33, 37)
    outputs = [
        (*backend.gather_attention(qkv, None, None, True), backend.total_variation(images, None, 1))
        for _ in range(2)
    ]
    assert all(map(torch.equal, *outputs))
