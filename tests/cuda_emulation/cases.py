"""What an emulated kernel has to do, as checks that raise AssertionError.

``python cases.py MODULE`` runs a reduced grid, for modules that need a process of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from conftest import random_kept  # noqa: E402

from cuda_emulation.backend import Emulated  # noqa: E402
from smi_fast.ops import reference  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = (torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([0.5, 1.0, 0.25]))


def within_budget(ours: Iterable[Tensor], eager: Iterable[Tensor], exact: Iterable[Tensor]) -> None:
    """The error in this type is at most twice what eager PyTorch has, and one rounding."""
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == true.shape
        if true.numel() == 0:
            continue
        error, allowed = ((x.double() - true).abs().max().item() for x in (mine, theirs))
        rounding = torch.finfo(mine.dtype).eps * (1 + true.abs().max().item())
        assert error <= 2 * allowed + rounding, f"error {error:.3g}, eager has {allowed:.3g}"


def check_patches(
    backend: Emulated,
    size: tuple[int, int],
    patch: int,
    shift: tuple[int, int],
    flip: bool,
    dtype: torch.dtype,
) -> None:
    """Gather and its gradient, bit for bit."""
    rows, columns = size[0] // patch, size[1] // patch
    images = torch.randn(2, 3, *size).to(dtype)
    kept = random_kept(2, max(1, rows * columns // 2), rows * columns)
    jitter = (kept, torch.tensor(shift), torch.tensor(flip), patch)
    ours, expected = (b.gather_patches(images, *jitter) for b in (backend, reference))
    assert all(map(torch.equal, ours, expected))
    grad = torch.randn(expected[0].shape).to(dtype)
    gradients = [b.gather_patches_backward(grad, *jitter, *size) for b in (backend, reference)]
    assert torch.equal(*gradients)


def check_attention(
    backend: Emulated,
    images: int,
    heads: int,
    count: int,
    width: int,
    dtype: torch.dtype,
    gathered: bool = True,
    lengths: list[int] | None = None,
    backward: bool = True,
) -> None:
    """Output, importance and, unless it doesn't fit, gradient within the error budget."""
    rows = count + 3 if gathered else count
    qkv = torch.randn(images, rows, 3, heads, width).to(dtype)
    kept = random_kept(images, count, rows) if gathered else None
    valid = None if lengths is None else torch.tensor(lengths)
    grad = torch.randn(images, count, heads * width).to(dtype)

    def run(functions: object, qkv: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        forward = functions.gather_attention(qkv, kept, valid, True)  # type: ignore[attr-defined]
        if not backward:
            return tuple(forward)
        gradient = functions.gather_attention_backward(grad, qkv, kept, valid)  # type: ignore[attr-defined]
        return *forward, gradient

    within_budget(
        run(backend, qkv, grad),
        run(reference, qkv, grad),
        run(reference, qkv.double(), grad.double()),
    )


def check_missing_tokens(backend: Emulated, dtype: torch.dtype) -> None:
    """A kept index outside of the rows is read as NaN, and nothing outside is touched."""
    qkv = torch.randn(2, 6, 3, 1, 32).to(dtype)
    kept = torch.tensor([[1, 2, 5], [0, 6, -1]])
    out, importance = backend.gather_attention(qkv, kept, None, True)
    expected, _ = reference.gather_attention(qkv[:1].double(), kept[:1], None, True)
    assert out[1].isnan().all() and importance[1].isnan().all()
    torch.testing.assert_close(out[:1].double(), expected, rtol=0.02, atol=0.02)
    gradient = backend.gather_attention_backward(torch.ones_like(out), qkv, kept, None)
    assert not gradient[1, 1:].any() and gradient[0].isfinite().all()


def check_missing_patches(backend: Emulated) -> None:
    """A patch outside of the grid reads as NaN at -1, and every other op passes over it."""
    images, kept = torch.randn(1, 3, 8, 8), torch.tensor([[1, 4, -1]])
    jitter = (torch.tensor([3, -2]), torch.tensor(False), 4)
    patches, positions = backend.gather_patches(images, kept, *jitter)
    assert patches[0, 1:].isnan().all() and positions[0, 1:].tolist() == [-1, -1]
    assert torch.equal(patches[:, :1], reference.gather_patches(images, kept[:, :1], *jitter)[0])
    gradient = backend.gather_patches_backward(torch.ones_like(patches), kept, *jitter, 8, 8)
    assert gradient.sum() == 3 * 16
    parts = [backend.total_variation(images, k, 4) for k in (kept, kept[:, :1])]
    assert torch.equal(*parts)
    state = [torch.zeros(1, 3, 8, 8) for _ in range(4)]
    state[1].fill_(1.0)
    backend.adam_clamp_(*state, torch.tensor(1), 0.1, 0.5, 0.9, *BOUNDS, kept, 4)
    assert state[0].count_nonzero() == 3 * 16


def check_variation(
    backend: Emulated, shape: tuple[int, ...], patch: int | None, count: int, dtype: torch.dtype
) -> None:
    """The twelve parts and the gradient within the error budget."""
    images = torch.randn(shape).to(dtype)
    size = patch or 1
    total = shape[2] // size * (shape[3] // size)
    kept = random_kept(shape[0], count, total) if patch else None
    parts = reference.total_variation(images.double(), kept, size)
    eager = reference.total_variation(images, kept, size)
    within_budget(backend.total_variation(images, kept, size), eager, parts)
    weights = torch.tensor([0.7, 0.3]).to(dtype)

    def gradient(functions: object, images: Tensor) -> Tensor:
        given = (*weights.to(images.dtype), images, kept, size, parts.to(images.dtype))
        return functions.total_variation_backward(*given)  # type: ignore[attr-defined, no-any-return]

    exact = gradient(reference, images.double())
    within_budget([gradient(backend, images)], [gradient(reference, images)], [exact])


def check_norm(backend: Emulated, shape: tuple[int, ...], mean: float, dtype: torch.dtype) -> None:
    """Output, statistics and gradient within the error budget; the mean may be far from zero."""
    channels = shape[1]
    x = (torch.randn(shape) + mean).to(dtype)
    given = (torch.randn(channels) + mean, torch.rand(channels) + 0.5, *torch.randn(2, channels))
    running = [t.to(dtype) for t in given]
    other = (torch.randn(shape).to(dtype), *(t.to(dtype) for t in torch.randn(2, channels)))

    def run(functions: object, convert: type | torch.dtype) -> tuple[Tensor, ...]:
        at, stats = x.to(convert), [t.to(convert) for t in running]
        grad, offset, slope = (t.to(convert) for t in other)
        forward = functions.batch_norm_matching(at, *stats, 1e-3)  # type: ignore[attr-defined]
        given = (grad, at, stats[1], stats[2], 1e-3, offset, slope)
        return *forward, functions.batch_norm_matching_backward(*given)  # type: ignore[attr-defined]

    within_budget(run(backend, dtype), run(reference, dtype), run(reference, torch.float64))


def check_adam(
    backend: Emulated, size: tuple[int, int], patch: int | None, count: int, dtype: torch.dtype
) -> None:
    """Pixels and moments within the error budget, after two steps."""
    state = [torch.randn(2, 3, *size).to(dtype) for _ in range(4)]
    state[3].square_()
    total = size[0] // (patch or 1) * (size[1] // (patch or 1))
    kept = random_kept(2, count, total) if patch else None
    runs = []
    for functions, convert in ((backend, dtype), (reference, dtype), (reference, torch.float64)):
        own = [t.to(convert, copy=True) for t in state]
        bounds = [b.to(convert) for b in BOUNDS]
        for step in (3, 4):
            functions.adam_clamp_(
                *own, torch.tensor(step), 0.25, 0.5, 0.99, *bounds, kept, patch or 1
            )
        runs.append(own)
    within_budget(*runs)


def reduced_grid(backend: Emulated) -> None:
    """Every kernel once or twice, on inputs that still reach every branch."""
    check_patches(backend, (12, 20), 4, (5, -3), True, torch.float32)
    check_patches(backend, (6, 9), 3, (-2, 40), False, torch.bfloat16)
    check_missing_patches(backend)
    for dtype in DTYPES:
        check_missing_tokens(backend, dtype)
        check_attention(backend, 2, 2, 18, 32, dtype, lengths=[17, 0])
        check_attention(backend, 1, 1, 47, 72, dtype, gathered=False)
    check_attention(backend, 1, 1, 137, 32, torch.float16)
    check_variation(backend, (2, 3, 9, 35), None, 0, torch.float32)
    check_variation(backend, (2, 1, 8, 12), 4, 3, torch.float16)
    check_norm(backend, (3, 2, 7, 7), 3.0, torch.float32)
    check_adam(backend, (8, 12), None, 0, torch.float32)
    check_adam(backend, (8, 12), 4, 3, torch.bfloat16)


if __name__ == "__main__":
    from cuda_emulation.build import load

    torch.manual_seed(0)
    reduced_grid(Emulated(load(Path(sys.argv[1]))))
