"""The specification of the engine's steps in plain PyTorch, forward and backward.

A step is an operation of a block between two matrix products. Each function defines what the
engine's kernels compute. All tensors are contiguous.

What matrix products read and write may be bfloat16. It is then computed in float32, the data type
of the other arguments (the residual stream, biases, rstd, rotations), and rounded once.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from smi_fast.ops.reference import gather_attention, gather_attention_backward, sum_dtype

# Slope and cubic coefficient of v in the approximations of gelu_().
_SIGMOIDS = {"sigmoid": (1.702, 0.0), "tanh": (math.sqrt(8 / math.pi), 0.044715)}


def add_normalize_(
    x: Tensor,
    added: Tensor | None,
    bias: Tensor | None,
    eps: float,
    normalized: Tensor,
    rstd: Tensor,
    centred: bool = True,
) -> None:
    """Add a residual, x += added + bias, and normalize x [rows, D] as LayerNorm without weights.

    It writes normalized [rows, D] and rstd [rows], the reciprocal standard deviation. ``added``
    [rows, D] may be None, and with it ``bias`` [D]: x then stays as it is. Where ``centred`` is
    false it is RMSNorm: the mean counts as 0, here and in rstd.
    """
    if bias is not None:
        x += bias if added is None else added + bias
    apart = x - x.mean(dim=1, keepdim=True) if centred else x
    rstd.copy_((apart.square().mean(dim=1) + eps).rsqrt())
    normalized.copy_(apart * rstd[:, None])


def normalize_backward_(
    gradient: Tensor,
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    copy: Tensor | None,
    centred: bool = True,
) -> None:
    """Add to gradient [rows, D] the gradient of x in :func:`add_normalize_`.

    With dn = grad, the gradient of n = normalized:
    dx = rstd (dn − mean(dn) − n mean(dn ∘ n)), without mean(dn) unless ``centred``. Unless it is
    None, copy [rows, D] gets the sum.
    """
    d, n = grad.to(rstd.dtype), normalized.to(rstd.dtype)
    slope = (d * n).mean(dim=1, keepdim=True)
    mean = d.mean(dim=1, keepdim=True) if centred else 0
    gradient += rstd[:, None] * (d - mean - n * slope)
    if copy is not None:
        copy.copy_(gradient)


def add_normalize_rows_(
    x: Tensor,
    added: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    centred: bool = True,
) -> None:
    """:func:`add_normalize_` of the first rows of images, x [B, R, D], which don't change.

    The rows of an image follow each other; those of the next one may be further away. ``out``
    [B·R, D] gets the sum.
    """
    out.copy_(x.flatten(0, 1))
    add_normalize_(out, added, bias, eps, normalized, rstd, centred)


def normalize_backward_rows_(
    of_rows: Tensor,
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    centred: bool = True,
) -> None:
    """:func:`normalize_backward_` where only the first rows of images pass a gradient by the norm.

    That is of_rows [B, R, D]; gradient [B·N, D] is written, whatever it was.
    """
    images = gradient.unflatten(0, (len(of_rows), len(gradient) // max(1, len(of_rows))))
    images.zero_()
    images[:, : of_rows.shape[1]] = of_rows
    normalize_backward_(gradient, grad, normalized, rstd, copy, centred)


def final_norm_(
    x: Tensor,
    added: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    normalized: Tensor,
    rstd: Tensor,
    out: Tensor,
    centred: bool = True,
) -> None:
    """The norm behind the blocks: out = normalized * weight + shift.

    ``normalized`` is that of x + added + bias, see :func:`add_normalize_`; x doesn't change.
    """
    add_normalize_(x + added, None, bias, eps, normalized, rstd, centred)
    out.copy_(normalized * weight if shift is None else normalized * weight + shift)


def final_norm_backward_(
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    centred: bool = True,
) -> None:
    """Write the gradient of x in :func:`final_norm_` into gradient, and into copy if there is one,
    all [rows, D], from grad, that of out.
    """
    gradient.zero_()
    normalize_backward_(gradient, grad * weight, normalized, rstd, copy, centred)


def gelu_(x: Tensor, bias: Tensor, out: Tensor, approximate: str = "none") -> None:
    """out = gelu(x + bias) for x [rows, F]; then x becomes the derivative there.

    The derivative of gelu at y is Φ(y) + y φ(y). Approximations have s = sigmoid(v) in the place of
    Φ(y): "sigmoid", quick GELU, with v = 1.702 y; and "tanh", as torch's, with
    v = 2 √(2/π) (y + 0.044715 y³). The derivative is then s + y s (1 - s) dv/dy.
    """
    y = x + bias
    if approximate != "none":
        slope, cubic = _SIGMOIDS[approximate]
        s = (slope * (y + cubic * y**3)).sigmoid()
        out.copy_(y * s)
        x.copy_(s + y * s * (1 - s) * slope * (1 + 3 * cubic * y.square()))
        return
    cdf = torch.special.ndtr(y)
    out.copy_(y * cdf)
    x.copy_(cdf + y * torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi))


def multiply_(x: Tensor, factors: Tensor) -> None:
    """x *= factors, element by element, of the same shape."""
    x *= factors


def linear_gelu_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    derivative: Tensor,
    out: Tensor,
    approximate: str = "none",
    side: int = 0,
) -> None:
    """:func:`gelu_` of the product x weightᵀ [rows, F], which isn't rounded before.

    ``x`` is [rows, D] and ``weight`` [F, D]. ``out`` gets gelu, ``derivative`` its derivative. A
    kernel may divide the result into tiles with this side; 0 leaves it the choice.
    """
    y = x.to(bias.dtype) @ weight.to(bias.dtype).T
    gelu_(y, bias, out, approximate)
    derivative.copy_(y)


def multiplied_product_(
    grad: Tensor, weight: Tensor, factors: Tensor, out: Tensor, side: int = 0
) -> None:
    """out = (grad weight) ∘ factors, for grad [rows, D] and weight [D, F], rounded once.

    ``side`` is that of :func:`linear_gelu_`.
    """
    computed = sum_dtype(grad.dtype)
    out.copy_(grad.to(computed) @ weight.to(computed) * factors)


def swiglu_(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up, where gate, up = (x + bias).chunk(2, 1) and x is [rows, 2F].

    Then x becomes the derivatives there. With s = sigmoid(g), that of silu at g is s + g s (1 - s).
    """
    gate, up = (x + bias).chunk(2, dim=1)
    s = gate.sigmoid()
    silu = gate * s
    out.copy_(silu * up)
    x.copy_(torch.cat([up * (s + silu * (1 - s)), silu], dim=1))


def swiglu_backward_(grad: Tensor, factors: Tensor, d_x: Tensor) -> None:
    """Write the gradient of x + bias in :func:`swiglu_` into d_x [rows, 2F], from that of out.

    ``factors`` is what x has become.
    """
    d_x.copy_((factors.unflatten(1, (2, -1)) * grad[:, None]).flatten(1))


def rotate_(x: Tensor, bias: Tensor, rotation: Tensor, half: bool) -> None:
    """Add a bias to queries and keys, or to keys alone, and rotate those of patches.

    Args:
        x: [B, N, parts, H, D]; with qkv the first two parts change, with k and v the first one.
        bias: [parts that change, H, D], flat.
        rotation: of patches, the last K tokens: sines and cosines [B, K, 1 or H, 2D].
        half: whether channels i and i + D/2 are rotated against each other, or neighbours.
    """
    changed = x[:, :, : bias.numel() // x[0, 0, 0].numel()]
    changed += bias.view(changed.shape[2:])
    patches = changed[:, x.shape[1] - rotation.shape[1] :]
    sine, cosine = rotation.unsqueeze(2).chunk(2, dim=-1)
    patches.copy_(patches * cosine + _turned(patches, half) * sine)


def rotate_backward_(gradient: Tensor, parts: int, rotation: Tensor, half: bool) -> None:
    """Turn the gradient of x after :func:`rotate_` into that before it: rotate it back."""
    patches = gradient[:, gradient.shape[1] - rotation.shape[1] :, :parts]
    sine, cosine = rotation.unsqueeze(2).chunk(2, dim=-1)
    patches.copy_(patches * cosine - _turned(patches * sine, half))


def _turned(x: Tensor, half: bool) -> Tensor:
    """Each pair (a, b) of the last axis as (-b, a)."""
    if half:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def attend_(qkv: Tensor, q_bias: Tensor, out: Tensor, offsets: Tensor | None = None) -> None:
    """Write the attention of qkv [B, N, 3, H, D] into out; its queries get q_bias [H·D].

    With ``offsets`` int64 [images + 1] the tokens of all images are concatenated: those of image b
    are from ``offsets[b]`` up to ``offsets[b + 1]``. Tokens attend to those of their own image.
    """
    outputs = _images(out.view(qkv[:, :, 0].shape), offsets)
    for own, to in zip(_images(qkv, offsets), outputs, strict=True):
        to.copy_(gather_attention(_biased(own, q_bias), None, None, False)[0].view_as(to))


def attend_backward_(
    grad: Tensor, qkv: Tensor, q_bias: Tensor, d_qkv: Tensor, offsets: Tensor | None = None
) -> None:
    """Write the gradient of qkv in :func:`attend_` into d_qkv, from the gradient of out."""
    rows = grad.view(*qkv.shape[:2], q_bias.numel()).to(q_bias.dtype)
    every = (_images(x, offsets) for x in (qkv, rows, d_qkv.view(qkv.shape)))
    for own, d_out, to in zip(*every, strict=True):
        to.copy_(gather_attention_backward(d_out, _biased(own, q_bias), None, None))


def _images(x: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Views [B, N, ...] or, with offsets, [1, n, ...] of each image that has tokens."""
    if offsets is None:
        return [x]
    parts = x.flatten(0, 1)[None].split(offsets.diff().tolist(), dim=1)
    return [part for part in parts if part.shape[1]]


def attend_rows(
    q: Tensor, q_bias: Tensor, kv: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries q + q_bias [B, R, H·D] among kv [B, N, 2, H, D].

    With ``offsets``, as in :func:`attend_`, kv [1, N, 2, H, D] concatenates the tokens of all
    images, at least one of each.

    Returns out [B, R, H·D], and the attention probabilities [B, H, R, N]; with ``offsets``
    [1, H, R, N], where row r of a token's column is query r of the token's own image.
    """
    if offsets is not None:
        out, every = torch.empty_like(q), q.new_empty(1, kv.shape[3], q.shape[1], kv.shape[1])
        for i, (begin, end) in enumerate(pairwise(offsets.tolist())):
            found = attend_rows(q[i : i + 1], q_bias, kv[:, begin:end])
            out[i : i + 1], every[..., begin:end] = found
        return out, every
    keys, values = kv.permute(2, 0, 3, 1, 4)
    probabilities = (_queries(q, q_bias, kv) @ keys.mT).softmax(dim=-1)
    return (probabilities @ values).transpose(1, 2).flatten(2), probabilities


def attend_rows_backward(
    grad: Tensor,
    q: Tensor,
    q_bias: Tensor,
    kv: Tensor,
    probabilities: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of q and kv in :func:`attend_rows`, from the gradient of out."""
    if offsets is not None:
        d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
        for i, (begin, end) in enumerate(pairwise(offsets.tolist())):
            one, own = slice(i, i + 1), (slice(None), slice(begin, end))
            d_q[one], d_kv[own] = attend_rows_backward(
                grad[one], q[one], q_bias, kv[own], probabilities[..., begin:end]
            )
        return d_q, d_kv
    keys, values = kv.permute(2, 0, 3, 1, 4)
    d_out = grad.unflatten(2, kv.shape[3:]).transpose(1, 2)
    d_probabilities = d_out @ values.mT
    d_scores = probabilities * (
        d_probabilities - (probabilities * d_probabilities).sum(dim=-1, keepdim=True)
    )
    d_q = (d_scores @ keys).transpose(1, 2).flatten(2) / kv.shape[4] ** 0.5
    d_keys, d_values = d_scores.mT @ _queries(q, q_bias, kv), probabilities.mT @ d_out
    return d_q, torch.stack([d_keys, d_values]).permute(1, 3, 0, 2, 4).contiguous()


def _queries(q: Tensor, q_bias: Tensor, kv: Tensor) -> Tensor:
    """(q + q_bias) / √D as [B, H, R, D]."""
    queries: Tensor = (q + q_bias).unflatten(2, kv.shape[3:]).transpose(1, 2)
    return queries / math.sqrt(kv.shape[4])


def _biased(qkv: Tensor, q_bias: Tensor) -> Tensor:
    """qkv with q_bias added to its queries, in the data type of q_bias."""
    q, k, v = qkv.to(q_bias.dtype).unbind(2)
    return torch.stack([q + q_bias.view(qkv.shape[3:]), k, v], dim=2)
