"""The ops as torch sees them: schemas, fakes, tracing and backends."""

from __future__ import annotations

import pytest
import torch

from smi_fast import ops
from smi_fast.ops import backends
from smi_fast.verify.cases import random_kept

SHIFT, FLIP = torch.tensor([3, -5]), torch.tensor(True)


def op_samples() -> dict[str, tuple]:
    images, kept = torch.randn(2, 3, 8, 12), random_kept(2, 4, 6)
    qkv, rows = torch.randn(2, 6, 3, 2, 4), random_kept(2, 4, 6)
    channels = [torch.rand(3) for _ in range(4)]
    frozen = torch.rand(2, 2, 3) < 0.5
    one, jitter = torch.ones(()), (SHIFT.expand(2, 2), FLIP.expand(2))
    return {
        "gather_patches": (images, kept, *jitter, 4),
        "gather_patches_backward": (torch.randn(2, 4, 48), kept, *jitter, 4, 8, 12),
        "gather_sigmoid_patches": (images, kept, *jitter, *channels[:2], images, frozen, 4),
        "gather_sigmoid_patches_backward": (
            *(torch.randn(2, 4, 48), images, kept, *jitter, channels[0], frozen, 4),
        ),
        "gather_attention": (qkv, rows, torch.tensor([4, 2]), True),
        "gather_attention_backward": (torch.randn(2, 4, 8), qkv, rows, None),
        "total_variation": (images, kept, 4),
        "total_variation_backward": (one, one, images, kept, 4, torch.rand(3, 4) + 1),
        "batch_norm_matching": (images, *channels, 1e-5),
        "batch_norm_matching_backward": (images, images, *channels[:2], 1e-5, *channels[2:]),
        "adam_clamp_": (
            *(torch.rand(2, 3, 8, 12) for _ in range(4)),
            *(torch.tensor(1), one.double(), 0.5, 0.99, 0.1),
            *(-torch.ones(3), torch.ones(3), kept, 4),
        ),
    }


@pytest.mark.parametrize("name", op_samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.smi_fast, name), op_samples()[name])


def test_every_op_of_the_table_has_a_schema_and_a_reference() -> None:
    for op in backends.OPS:
        assert hasattr(torch.ops.smi_fast, op) and callable(getattr(ops, op))


def test_compiles_into_one_graph() -> None:
    kept = random_kept(2, 4, 6)
    images = torch.randn(2, 3, 8, 12, requires_grad=True)
    qkv = torch.randn(2, 6, 3, 2, 4, requires_grad=True)

    def step(images: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        patches, _ = ops.gather_patches(images, kept, SHIFT, FLIP, patch_size=4)
        windows, _ = ops.gather_sigmoid_patches(
            *(images, kept, SHIFT, FLIP), mean=torch.zeros(3), std=torch.ones(3), patch_size=4
        )
        out, importance = ops.gather_attention(qkv, importance=True)
        l1, l2 = ops.total_variation(images, kept, patch_size=4)
        y, loss = ops.batch_norm_matching(images, *(torch.ones(3) for _ in range(4)))
        terms = (
            patches.square().sum(),
            windows.square().sum(),
            out.square().sum(),
            importance.sum(),
            l1,
            l2,
            y.sum(),
            loss,
        )
        return torch.stack(terms).sum()

    eager = torch.autograd.grad(step(images, qkv), (images, qkv))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(images, qkv), (images, qkv))
    torch.testing.assert_close(traced, eager)


def test_named_backend_that_is_missing_or_cannot_run_says_so() -> None:
    images, kept = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(backends.BackendUnavailable, match=r"among auto, .*reference, got 'cpu'"):
        ops.gather_patches(images, kept, patch_size=4, backend="cpu")
    with pytest.raises(
        backends.BackendUnavailable, match=r"reference: .* floating point, got torch.int32"
    ):
        ops.gather_patches(images.int(), kept, patch_size=4, backend="reference")


def test_backend_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "nonesuch")
    with pytest.raises(backends.BackendUnavailable, match="nonesuch"):
        ops.total_variation(torch.zeros(1, 3, 8, 8))
    assert ops.total_variation(torch.zeros(1, 3, 8, 8), backend="reference")[0] == 0
