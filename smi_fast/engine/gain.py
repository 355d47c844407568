"""What bfloat16 would give on this processor, measured on one block."""

from __future__ import annotations

import time

import torch
from timm.models.vision_transformer import Block

from smi_fast.engine.cpu import FoldedRun
from smi_fast.engine.precision import BFLOAT16, FLOAT32, ON_CPU, stored_type
from smi_fast.ops import native

# A block of DeiT-S on 46 patches and a class token, the rest of 196 patches after four stops.
IMAGES, TOKENS, WIDTH, HEADS = 8, 47, 384, 6
SECONDS = 0.8


def instructions() -> list[str]:
    """The instructions of this processor that multiply bfloat16."""
    known = {
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported,
        "AMX": torch.cpu._is_amx_tile_supported,
    }
    return [name for name, supported in known.items() if supported()]


@torch.random.fork_rng(devices=[])
def times(seconds: float = SECONDS) -> dict[str, float]:
    """Seconds that a block takes in each precision, forward and backward: the shortest time of
    passes that take turns.

    Args:
        seconds: how long they take turns; each runs at least once.
    """
    block = Block(WIDTH, HEADS, qkv_bias=True).requires_grad_(False).eval()
    tokens = torch.randn(IMAGES, TOKENS, WIDTH, requires_grad=True)
    runs = {name: FoldedRun([block], stored=stored_type(name)) for name in ON_CPU}
    shortest = dict.fromkeys(ON_CPU, float("inf"))
    end = time.perf_counter() + seconds
    while True:
        for name, run in runs.items():
            start = time.perf_counter()
            torch.autograd.grad(run(tokens).sum(), tokens)
            shortest[name] = min(shortest[name], time.perf_counter() - start)
        if time.perf_counter() >= end:
            return shortest


def in_words() -> str:
    """What ``smi-fast info`` says about bfloat16 on the CPU; it takes a second."""
    if native.WHY_NO_CPU is not None:
        return f"no engine multiplies it: {native.WHY_NO_CPU}"
    found = times()
    share, names = found[BFLOAT16] / found[FLOAT32], " and ".join(instructions())
    how = f"multiplied by {names}" if names else "no instructions of this processor multiply it"
    measured = f"a block of DeiT-S takes {share:.2f} of its time in float32"
    return f"{how}; {measured} with {TOKENS - 1} patches"
