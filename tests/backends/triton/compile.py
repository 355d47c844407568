"""What :mod:`test_aot` runs in processes of its own: compilation for absent GPUs.

A driver that only knows its target lets the real launchers run on CPU tensors. Each kernel is
compiled with the constants and divisibilities of its launch, and its machine code is read.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# DeiT-T/S/B at 224 px: tokens that the paper's schedule keeps, without and with the class token.
COUNTS = (46, 47, 66, 67, 95, 96, 137, 138, 196, 197)
HEADS = (3, 6, 12)
WIDTH = 64
SIDE, PATCH = 224, 16


@dataclass(frozen=True)
class Machine:
    """Limits of a streaming multiprocessor; shared memory in bytes."""

    shared: int
    shared_of_block: int
    warps: int
    blocks: int = 32
    registers: int = 65536


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
MACHINES = {
    80: Machine(164 * 1024, 163 * 1024, 64),
    90: Machine(228 * 1024, 227 * 1024, 64),
    100: Machine(228 * 1024, 227 * 1024, 64),
    120: Machine(100 * 1024, 99 * 1024, 48, blocks=24),
}


@dataclass(frozen=True)
class Compiled:
    """Resources and instructions of the machine code of one kernel."""

    kernel: str
    constants: str
    registers: int
    stack: int
    shared: int
    warps: int
    mnemonics: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.mnemonics.items() if re.match(pattern, name))

    def resident_warps(self, machine: Machine) -> int:
        """Warps that a multiprocessor holds at once; a warp's registers come in lots of 256."""
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = machine.registers // of_warp // self.warps
        by_shared = machine.shared // (self.shared + 1024)
        return self.warps * min(
            by_registers, by_shared, machine.warps // self.warps, machine.blocks
        )


class Target:
    """The part of a driver that compilation needs; its device number keeps caches apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _launches(op: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Arguments of every real configuration of an op."""
    x, channel = torch.empty(2, 3, SIDE, SIDE, dtype=dtype), torch.ones(3, dtype=dtype)
    jitter = torch.zeros(2, dtype=torch.int64).expand(2, 2), torch.tensor(False).expand(2)
    activations = torch.empty(2, 64, 56, 56, dtype=dtype)
    statistics = [torch.ones(64, dtype=dtype)] * 4
    one, sums, offset_and_slope = torch.ones(()), torch.ones(3, 4), torch.ones(2, 64)
    if op == "batch_norm_matching":
        yield activations, *statistics, 1e-5
    if op == "batch_norm_matching_backward":
        yield activations, activations, *statistics[:2], 1e-5, *offset_and_slope
    for count in COUNTS[::2]:
        kept = torch.arange(count).expand(2, -1)
        if op == "gather_patches":
            yield x, kept, *jitter, PATCH
        if op == "gather_patches_backward":
            patches = torch.empty(2, count, 3 * PATCH**2, dtype=dtype)
            yield patches, kept, *jitter, PATCH, SIDE, SIDE
        for still in (None, torch.zeros(2, SIDE // PATCH, SIDE // PATCH, dtype=torch.bool)):
            background = None if still is None else x
            if op == "gather_sigmoid_patches":
                yield x, kept, *jitter, channel, channel, background, still, PATCH
            if op == "gather_sigmoid_patches_backward":
                patches = torch.empty(2, count, 3 * PATCH**2, dtype=dtype)
                yield patches, x, kept, *jitter, channel, still, PATCH
        for some in (None, kept):
            if op == "total_variation":
                yield x, some, PATCH
            if op == "total_variation_backward":
                yield one, one, x, some, PATCH, sums
            if op == "pixel_gradient" and some is not None:  # pixels are float32 in any precision
                patches = torch.empty(2, count + 1, 3 * PATCH**2)[:, 1:]
                yield patches, some, *jitter, one, one, x.float(), PATCH, sums
            if op == "adam_clamp_":
                rates = torch.tensor(1), one.double(), 0.5, 0.9, 0.0
                yield x, x, x, x, *rates, channel, channel, some, PATCH
    for count in COUNTS:
        # A gathered set takes more registers: it is compiled where they are scarcest.
        gathered = torch.arange(count).expand(2, -1) if count == 138 else None
        for heads in HEADS:
            for tokens, kept in ((count, None), (197, gathered))[: 2 if count == 138 else 1]:
                qkv = torch.empty(2, tokens, 3, heads, WIDTH, dtype=dtype)
                if op == "gather_attention":
                    yield qkv, kept, None, kept is None
                if op == "gather_attention_backward":
                    yield torch.empty(2, count, heads * WIDTH, dtype=dtype), qkv, kept, None


def _steps(op: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Arguments of a step of the engine on 8 images, and on as many as fill a GPU."""
    for heads, batch in zip(HEADS, (8, 8, 128), strict=True):
        count, width = 47, heads * WIDTH
        rows = batch * count
        x, rstd, bias = torch.empty(rows, width), torch.empty(rows), torch.empty(width)
        a, b = torch.empty(2, rows, width, dtype=dtype)
        hidden, derivative = torch.empty(2, rows, 4 * width, dtype=dtype)
        q, kv = (
            torch.empty(batch, 1, width, dtype=dtype),
            torch.empty(batch, count, 2, heads, WIDTH),
        )
        kv, probabilities = kv.to(dtype), torch.empty(batch, heads, 1, count)
        weight, hidden_bias = torch.empty(4 * width, width, dtype=dtype), torch.empty(4 * width)
        if op == "add_normalize_":
            yield x, a, bias, 1e-6, b, rstd
            yield x, None, None, 1e-6, b, rstd
        if op == "normalize_backward_":
            yield x, a, b, rstd, None if dtype == x.dtype else a
        last, of_rows = torch.empty(batch, width), torch.empty(batch, 1, width)
        if op == "add_normalize_rows_":
            yield x.view(batch, count, -1), a, bias, 1e-6, torch.empty_like(x), b, rstd
            yield x.view(batch, count, -1)[:, :1], q[:, 0], bias, 1e-6, last, q[:, 0], rstd[:batch]
        if op == "normalize_backward_rows_":
            yield of_rows, a, b, rstd, x, None if dtype == x.dtype else a
        if op == "final_norm_":
            yield last, q[:, 0], bias, bias, bias, 1e-6, last, rstd[:batch], last
        if op == "final_norm_backward_":
            yield last, last, rstd[:batch], bias, last, None if dtype == x.dtype else q[:, 0]
        if op == "gelu_":
            yield derivative, hidden_bias, hidden
            yield derivative, hidden_bias, hidden, "tanh"
        if op == "multiply_":
            yield derivative, hidden
        if op == "swiglu_":
            yield derivative, hidden_bias, hidden.view(2 * rows, -1)[:rows]
        if op == "swiglu_backward_":
            yield hidden.view(2 * rows, -1)[:rows], derivative, torch.empty_like(derivative)
        for half in (True, False):
            rotation = torch.empty(batch, count - 1, 1, 2 * WIDTH)
            qkv = torch.empty(batch, count, 3, heads, WIDTH, dtype=dtype)
            if op == "rotate_":
                yield qkv, torch.empty(2 * width), rotation, half
            if op == "rotate_backward_":
                yield qkv, 2, rotation, half
        if op == "attend_rows":
            yield q, bias, kv
        if op == "attend_rows_backward":
            yield q, q, bias, kv, probabilities
        if op == "embed_tokens":
            first, table = torch.empty(1, 1, width), torch.empty(196, width)
            yield (
                x.view(batch, count, -1),
                bias,
                first,
                first,
                table,
                torch.zeros(batch, count).long(),
            )
        if op == "rows_at":
            tables = torch.zeros(9, batch, 2).long(), torch.zeros(9, batch).bool()
            yield *tables, torch.zeros(9).double(), torch.zeros(1).long()
        if op == "cross_entropy":
            yield torch.empty(batch, 1000, dtype=dtype), torch.zeros(batch, dtype=torch.int64)
        if op == "linear_gelu_":
            for side in (0, 64, 128):
                yield a, weight, hidden_bias, derivative, hidden, "none", side
        if op == "multiplied_product_":
            transposed = weight.T if dtype == x.dtype else weight.T.contiguous()
            for side in (0, 64, 128):
                yield a, transposed, derivative, hidden, side


def compile_op(capability: int, op: str, dtype: str) -> list[Compiled]:
    """Compiles every distinct kernel that the real configurations of an op start on a target."""
    import triton
    from triton.runtime.jit import JITFunction

    from smi_fast import kernels

    found: dict[str, Compiled] = {}

    def compile_only(function: Any, grid: Any) -> Any:
        def start(*arguments: Any, **constants: Any) -> None:
            kernel = function.warmup(*arguments, grid=grid, **constants)
            if kernel.hash not in found:
                shown = {k: v for k, v in constants.items() if k.startswith(("BLOCK", "WITH"))}
                found[kernel.hash] = _read(kernel, capability, str(shown))

        return start

    triton.runtime.driver.set_active(Target(capability))
    attention = sys.modules["smi_fast.kernels.gather_attention"]
    attention.shared_memory = lambda _: MACHINES[capability].shared_of_block  # type: ignore[attr-defined]
    JITFunction.__getitem__ = compile_only
    # Products of float32 with a step are for tensor cores, which have TF32.
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for arguments in (*_launches(op, DTYPES[dtype]), *_steps(op, DTYPES[dtype])):
        getattr(kernels, op)(*arguments)
    return list(found.values())


def _read(kernel: Any, capability: int, constants: str) -> Compiled:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        code = _tool(knobs.nvidia.nvdisasm.path, "-c", cubin)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used, usage
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.M)
    return Compiled(
        kernel.metadata.name,
        constants,
        int(used[1]),
        int(used[2]),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        Counter(names),
    )


def _tool(program: str, *arguments: object) -> str:
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr
