"""The tables of backends, made from the code: ``python docs/_backends.py`` prints them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from smi_fast.ops import backends, native
from smi_fast.ops.limits import most_tokens

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
DEVICES = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu", "reference": "cpu"}
# Bytes of shared memory that one block can have: sharedMemPerBlockOptin of each GPU.
SHARED_MEMORY = {"A100": 163 * 1024, "H100": 227 * 1024}
WIDTHS = (32, 64, 80, 128)


def ops() -> list[str]:
    """Which data types each backend takes for each op, wherever that backend is installed."""
    # The table is the same on every machine: each backend counts as installed.
    native.WHY_NO_CPU = native.WHY_NO_CUDA = None
    backends._HAS_TRITON = True
    columns = [backend.name for backend in backends.BACKENDS]
    rows = (
        (f"`{op}`", *(_dtypes(op, backend) for backend in backends.BACKENDS)) for op in backends.OPS
    )
    return table(("op", *(f"`{name}`" for name in columns)), rows)


def _dtypes(op: str, backend: backends.Backend) -> str:
    device = torch.device(DEVICES[backend.name])
    takes = (name for name, dtype in DTYPES.items() if not backend.why_not(op, device, dtype))
    return " ".join(takes)


def on_gpu() -> list[str]:
    """What "auto" prefers on a GPU."""
    rows = ((f"`{op}`", f"`{name}`", why) for op, (name, why) in backends.ON_GPU.items())
    return table(("op", "first choice", "because it"), rows)


def attention() -> list[str]:
    """The most tokens that the CUDA kernel of attention holds, without and with gradient."""
    rows = []
    for gpu, memory in SHARED_MEMORY.items():
        for name, size in (("f32", 4), ("bf16, f16", 2)):
            rows.append((gpu, name, *(_most(width, size, memory) for width in WIDTHS)))
    return table(("GPU", "data type", *(f"D = {width}" for width in WIDTHS)), rows)


def _most(width: int, size: int, memory: int) -> str:
    return " / ".join(str(most_tokens(width, size, gradient, memory)) for gradient in (False, True))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table in Markdown, line by line."""
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    for lines in (ops(), on_gpu(), attention()):
        print(*lines, "", sep="\n")
