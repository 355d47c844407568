"""What the emulated kernels must do, as checks that raise an error.

``python check.py MODULE`` runs a short selection, for modules that need a process of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from smi_fast.ops import reference
from smi_fast.ops.limits import too_large_for_cuda
from smi_fast.verify.call_grid import FLOATS, in_turn, op_calls, reduced
from smi_fast.verify.cases import OpCall
from tests.backends.cuda.emulation.backend import Emulated

# What the emulation offers to one block, as compute capability 9.0 does.
SHARED_MEMORY = 227 * 1024
BOUNDS = (torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([0.5, 1.0, 0.25]))
RATES = (torch.tensor(1), torch.tensor(0.1, dtype=torch.float64), 0.5, 0.9, 0.0)


def selection(elements: int) -> list[OpCall]:
    """Calls with dense arguments: the bindings make any others dense before a launch."""
    return reduced(op_calls(), elements, layouts=False)


def fits(call: OpCall, dtype: torch.dtype) -> bool:
    """Whether the kernel can hold the call in shared memory."""
    return call.size is None or too_large_for_cuda(call.size, dtype, SHARED_MEMORY) is None


def check_missing_tokens(backend: Emulated, dtype: torch.dtype) -> None:
    """A token index outside of the rows reads as NaN, and nothing outside is touched."""
    qkv = torch.randn(2, 6, 3, 1, 32).to(dtype)
    index = torch.tensor([[1, 2, 5], [0, 6, -1]])
    out, importance = backend.gather_attention(qkv, index, None, True)
    expected, _ = reference.gather_attention(qkv[:1].double(), index[:1], None, True)
    assert out[1].isnan().all() and importance[1].isnan().all()
    torch.testing.assert_close(out[:1].double(), expected, rtol=0.02, atol=0.02)
    gradient = backend.gather_attention_backward(torch.ones_like(out), qkv, index, None)
    assert not gradient[1, 1:].any() and gradient[0].isfinite().all()


def check_missing_patches(backend: Emulated) -> None:
    """A patch outside of the grid reads as NaN at -1, and every other op passes over it."""
    images, kept = torch.randn(1, 3, 8, 8), torch.tensor([[1, 4, -1]])
    jitter = (torch.tensor([[3, -2]]), torch.tensor([False]), 4)
    patches, positions = backend.gather_patches(images, kept, *jitter)
    assert patches[0, 1:].isnan().all() and positions[0, 1:].tolist() == [-1, -1]
    assert torch.equal(patches[:, :1], reference.gather_patches(images, kept[:, :1], *jitter)[0])
    gradient = backend.gather_patches_backward(torch.ones_like(patches), kept, *jitter, 8, 8)
    assert gradient.sum() == 3 * 16
    space, frozen = (torch.zeros(3), torch.full((3,), 0.25)), torch.zeros(1, 2, 2).bool()
    patches, positions = backend.gather_sigmoid_patches(
        *(images, kept, *jitter[:2], *space, images, frozen, 4),
    )
    assert patches[0, 1:].isnan().all() and positions[0, 1:].tolist() == [-1, -1]
    assert patches[0, 0].isfinite().all()
    gradient = backend.gather_sigmoid_patches_backward(
        *(torch.ones_like(patches), torch.zeros_like(images), kept, *jitter[:2], space[1], None, 4),
    )
    assert gradient.sum() == 3 * 16  # a slope of 1/4 over a deviation of 1/4
    sums = [backend.total_variation(images, active, 4) for active in (kept, kept[:, :1])]
    assert torch.equal(*sums)
    grads = torch.tensor(0.7), torch.tensor(-1.3)
    gradients = [
        backend.total_variation_backward(*grads, images, active, 4, sums[0])
        for active in (kept, kept[:, :1])
    ]
    assert torch.equal(*gradients)
    state = [torch.zeros(1, 3, 8, 8) for _ in range(4)]
    state[1].fill_(1.0)
    backend.adam_clamp_(*state, *RATES, *BOUNDS, kept, 4)
    assert state[0].count_nonzero() == 3 * 16


def short_selection(backend: Emulated) -> None:
    """Small calls that still reach every branch."""
    for dtype in FLOATS:
        check_missing_tokens(backend, dtype)
    for call, dtype in in_turn(selection(elements=8_000)):
        if fits(call, dtype):
            call.check(backend, dtype)
    check_missing_patches(backend)


if __name__ == "__main__":
    from tests.backends.cuda.emulation.build import load

    torch.manual_seed(0)
    torch.set_num_threads(1)
    short_selection(Emulated(load(Path(sys.argv[1]))))
