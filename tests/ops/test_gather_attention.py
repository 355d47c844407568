"""gather_attention against scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast import ops
from smi_fast.verify.cases import random_kept

pytestmark = pytest.mark.usefixtures("each_backend")


def sdpa(rows: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*rows.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)


def take(qkv: Tensor, kept: Tensor) -> Tensor:
    return torch.stack([image[index] for image, index in zip(qkv, kept, strict=True)])


@pytest.mark.parametrize("count", [1, 2, 46, 47, 197])
@pytest.mark.parametrize("width", [8, 64, 72])
def test_equals_scaled_dot_product_attention(count: int, width: int) -> None:
    qkv = torch.randn(2, 197, 3, 3, width, dtype=torch.float64)
    kept = random_kept(2, count, 197)
    out, importance = ops.gather_attention(qkv, kept)
    assert importance is None
    torch.testing.assert_close(out, sdpa(take(qkv, kept)))
    if count == 197:
        torch.testing.assert_close(ops.gather_attention(qkv)[0], sdpa(qkv))


def test_importance_is_the_first_row_averaged_over_heads() -> None:
    qkv = torch.randn(2, 9, 3, 4, 8, dtype=torch.float64)
    kept = random_kept(2, 5, 9)
    _, importance = ops.gather_attention(qkv, kept, importance=True)
    for image in range(2):
        q, k, _ = take(qkv, kept)[image].unbind(1)
        rows = [(q[0, h] @ k[:, h].T / 8**0.5).softmax(0) for h in range(4)]
        torch.testing.assert_close(importance[image], torch.stack(rows).mean(0))


def test_lengths_equal_shorter_sequences() -> None:
    qkv, lengths = torch.randn(4, 7, 3, 2, 8, dtype=torch.float64), torch.tensor([7, 1, 0, 4])
    qkv[1, 1:] = 1e30  # however large, rows after the length must not matter
    out, importance = ops.gather_attention(qkv, lengths=lengths, importance=True)
    for image, length in enumerate(lengths.tolist()):
        alone = qkv[image : image + 1, :length]
        if length:
            expected, row = ops.gather_attention(alone, importance=True)
            torch.testing.assert_close(out[image, :length], expected[0])
            torch.testing.assert_close(importance[image, :length], row[0])
        assert not out[image, length:].any() and not importance[image, length:].any()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradient(gathered: bool, ragged: bool) -> None:
    qkv = torch.randn(2, 6, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    kept = random_kept(2, 4, 6) if gathered else None
    lengths = torch.tensor([4, 2]) if ragged else None
    assert torch.autograd.gradcheck(
        lambda x: ops.gather_attention(x, kept, lengths, importance=True)[0], qkv
    )


def test_strided_qkv_and_expanded_gradient() -> None:
    base = torch.randn(3, 2, 5, 4, 2, dtype=torch.float64)
    qkv = base.permute(1, 2, 0, 4, 3).detach().requires_grad_()
    assert not qkv.is_contiguous()
    ops.gather_attention(qkv)[0].sum().backward()
    expected = qkv.detach().clone().requires_grad_()
    sdpa(expected).sum().backward()
    torch.testing.assert_close(qkv.grad, expected.grad)


def test_float32_error_is_that_of_eager_float32() -> None:
    qkv = torch.randn(2, 197, 3, 3, 64, dtype=torch.float64)
    exact = sdpa(qkv)
    ours = (ops.gather_attention(qkv.float())[0] - exact).abs().max()
    eager = (sdpa(qkv.float()) - exact).abs().max()
    assert ours <= 2 * eager + 1e-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": torch.zeros(2, 5, 2, 3, 8)},
            r"expected qkv \[B, N, 3, H, D\], got .*\[2, 5, 2, 3, 8\]",
        ),
        (
            {"token_index": torch.zeros(2, 3)},
            r"token_index int64 \[2, K\], got torch.float32",
        ),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths int64 \[2\], got .*\[3\]"),
        ({"lengths": torch.zeros(2)}, r"lengths int64 \[2\], got torch.float32"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gather_attention(**({"qkv": torch.zeros(2, 5, 3, 3, 8)} | change))
