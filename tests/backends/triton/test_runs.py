"""Whole inversions on the Triton kernels, and how many kernels an iteration launches."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from smi_fast import ops
from smi_fast.ops import backends
from tests.backends.triton import runs

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "smi_fast.kernels")),
    reason="needs triton and the installed smi_fast.kernels",
)


@contextmanager
def process(interpret: str) -> Iterator[Callable[..., Any]]:
    """Calls functions where triton, from its import on, interprets kernels or doesn't."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", interpret)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *args: pool.submit(function, *args).result()


def test_inversion_gives_the_images_of_the_reference() -> None:
    with process("1") as call:
        error = call(runs.inversion)
    # Twice the error of eager PyTorch, as single kernels, or a few roundings of a pixel below 3.
    assert error["triton"] <= max(2 * error["eager"], 3e-6), error


@pytest.mark.parametrize(
    ("kept", "precision", "most"),
    [(196, "float32", 249), (46, "float32", 214), (46, "tf32", 190), (46, "bfloat16", 190)],
)
def test_kernels_of_an_iteration(kept: int, precision: str, most: int) -> None:
    with process("0") as call:
        ours = call(runs.launches, "triton", kept, precision)
        theirs = call(runs.launches, "reference", kept)
    once = "_adam_clamp", "_gather_patches_fwd", "_cross_entropy", "_rows_at"
    once += ("_active_variation_bwd",) if kept < 196 else ("_total_variation_bwd",)
    assert all(ours[name] == 1 for name in once) and (
        kept == 196 or not ours["_gather_patches_bwd"]
    )
    assert ours.total() <= most and 2 * ours.total() <= theirs.total()


def test_ops_beside_those_of_other_backends_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.compile and torch.export see them: with a schema and a fake, and nothing inside."""
    (triton,) = (backend for backend in backends.BACKENDS if backend.name == "triton")
    monkeypatch.setitem(triton.__dict__, "why_not", lambda *_: None)

    class Model(torch.nn.Module):
        def forward(self, images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            patches, _ = ops.gather_patches(images, kept, patch_size=4, backend="triton")
            return ops.total_variation(images, kept, patch_size=4, backend="triton")[1] + patches

    arguments = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        graph = torch.export.export(Model(), arguments).graph
    called = {str(node.target) for node in graph.nodes if "smi_fast" in str(node.target)}
    assert called == {
        "smi_fast.gather_patches_triton.default",
        "smi_fast.total_variation_triton.default",
    }
