"""The specification of every op in plain PyTorch, forward and backward.

Each function is what a kernel of any backend must compute. It runs on every device and in float64,
and it is the backend called ``reference``. Inputs are taken as valid: :mod:`smi_fast.ops` checks
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Neighbour offsets (rows, columns) of the four differences: horizontal, vertical and both
# diagonals.
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
ADAM_EPS = 1e-8


def nearest_cells(shift: Tensor, patch_size: int) -> Tensor:
    """Whole patches in a shift of pixels: rounded to the nearest, half upwards."""
    return torch.div(2 * shift + patch_size, 2 * patch_size, rounding_mode="floor")


def window_indices(
    kept: Tensor, shift: Tensor, flip: Tensor, patch_size: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Where the pixels of each kept patch come from under jitter, and which cell it lands on.

    Args:
        kept: int64 [B, K], patches of the un-jittered grid.
        shift: int64 [2], pixels that the image is rolled by, (rows, columns).
        flip: bool [], whether the rolled image is mirrored left to right.
        patch_size: side of a patch, in pixels.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        pixels int64 [B, K, P, P], flat positions in an image plane, and cells int64 [B, K], the
        patch of the jittered grid.
    """
    rows, columns = height // patch_size, width // patch_size
    moved = nearest_cells(shift, patch_size)
    row = (kept // columns + moved[0]) % rows
    column = (kept % columns + moved[1]) % columns
    inside = torch.arange(patch_size, device=kept.device)
    y = (row[..., None] * patch_size + inside - shift[0]) % height
    # In a mirrored patch the pixels run from right to left.
    across = torch.where(flip, patch_size - 1 - inside, inside)
    x = (column[..., None] * patch_size + across - shift[1]) % width
    cells = row * columns + torch.where(flip, columns - 1 - column, column)
    return y[..., :, None] * width + x[..., None, :], cells


def gather_patches(
    images: Tensor, kept: Tensor, shift: Tensor, flip: Tensor, patch_size: int
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_patches`."""
    channels, height, width = images.shape[1:]
    pixels, cells = window_indices(kept, shift, flip, patch_size, height, width)
    flat = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    windows = images.flatten(2).gather(2, flat).unflatten(2, (kept.shape[1], patch_size**2))
    return windows.transpose(1, 2).flatten(2), cells


def gather_patches_backward(
    grad: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    patch_size: int,
    height: int,
    width: int,
) -> Tensor:
    """Gradient [B, C, H, W] of the images: windows never overlap, so a scatter without sums."""
    channels = grad.shape[2] // patch_size**2
    pixels, _ = window_indices(kept, shift, flip, patch_size, height, width)
    flat = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    windows = grad.unflatten(2, (channels, patch_size**2)).transpose(1, 2).flatten(2)
    images = grad.new_zeros(len(grad), channels, height * width).scatter(2, flat, windows)
    return images.view(len(grad), channels, height, width)


def _rows(qkv: Tensor, kept: Tensor | None) -> Tensor:
    """The kept rows of [B, N, 3, H, D] as [3, B, H, K, D]."""
    if kept is not None:
        qkv = qkv.gather(1, kept[:, :, None, None, None].expand(-1, -1, *qkv.shape[2:]))
    return qkv.permute(2, 0, 3, 1, 4)


def _probabilities(q: Tensor, k: Tensor, lengths: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D) [B, H, K, K]; rows and columns from ``lengths`` on are zero."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if lengths is None:
        return scores.softmax(dim=-1)
    valid = torch.arange(k.shape[-2], device=k.device) < lengths[:, None, None, None]
    probabilities = scores.masked_fill(~valid, -torch.inf).softmax(dim=-1)
    # A row of an image without any token is all -inf, its softmax nan: masked like the other rows.
    return probabilities.masked_fill(~(valid & valid.transpose(-2, -1)), 0.0)


def gather_attention(
    qkv: Tensor, kept: Tensor | None, lengths: Tensor | None, importance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_attention`; importance is [B, 0] when it isn't wanted."""
    q, k, v = _rows(qkv, kept)
    probabilities = _probabilities(q, k, lengths)
    out = (probabilities @ v).transpose(1, 2).flatten(2)
    if importance:
        return out, probabilities[:, :, 0].mean(dim=1)
    return out, qkv.new_empty(len(qkv), 0)


def gather_attention_backward(
    grad: Tensor, qkv: Tensor, kept: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Gradient [B, N, 3, H, D] of ``qkv``; rows that aren't kept get zero. P is computed again.

    dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = dS K / √D, dK = dSᵀ Q / √D.
    """
    q, k, v = _rows(qkv, kept)
    probabilities = _probabilities(q, k, lengths)
    grad = grad.unflatten(2, q.shape[1::2]).transpose(1, 2)
    d_probabilities = grad @ v.transpose(-2, -1)
    weighted = probabilities * d_probabilities
    d_scores = (weighted - probabilities * weighted.sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    parts = (d_scores @ k, d_scores.transpose(-2, -1) @ q, probabilities.transpose(-2, -1) @ grad)
    rows = torch.stack([part.transpose(1, 2) for part in parts], dim=2)
    if kept is None:
        return rows
    index = kept[:, :, None, None, None].expand(-1, -1, *rows.shape[2:])
    return torch.zeros_like(qkv, memory_format=torch.contiguous_format).scatter(1, index, rows)


def patch_mask(kept: Tensor, rows: int, columns: int) -> Tensor:
    """Which patches are kept, as bool [B, rows, columns]."""
    flat = torch.zeros(len(kept), rows * columns, dtype=torch.bool, device=kept.device)
    return flat.scatter(1, kept, True).reshape(-1, rows, columns)


def pixel_mask(kept: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Which pixels belong to kept patches, as bool [B, 1, height, width]."""
    patches = patch_mask(kept, height // patch_size, width // patch_size)
    return patches.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]


def _pair(images: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Views of all pixels that have a neighbour at an offset, and of those neighbours."""
    down, right = offset
    height, width = images.shape[-2:]
    here = images[..., : height - down, max(-right, 0) : width - max(right, 0)]
    there = images[..., down:, max(right, 0) : width - max(-right, 0)]
    return here, there


def _counted(mask: Tensor, offset: tuple[int, int]) -> Tensor:
    here, there = _pair(mask, offset)
    return here | there


def total_variation(images: Tensor, kept: Tensor | None, patch_size: int) -> Tensor:
    """The parts of :func:`smi_fast.ops.total_variation`: [3, 4], for each of the four differences
    the sum of absolute values, the Frobenius norm, and the number of differences that count."""
    mask = None if kept is None else pixel_mask(kept, patch_size, *images.shape[-2:])
    parts = []
    for offset in NEIGHBOURS:
        here, there = _pair(images, offset)
        difference = here - there
        count = images.new_full((), difference.numel())
        if mask is not None:
            counted = _counted(mask, offset)
            difference = difference * counted
            count = counted.sum().to(images.dtype) * images.shape[1]
        parts.append(torch.stack([difference.abs().sum(), difference.square().sum().sqrt(), count]))
    return torch.stack(parts, dim=1)


def total_variation_backward(
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    kept: Tensor | None,
    patch_size: int,
    parts: Tensor,
) -> Tensor:
    """Gradient of the images: for each difference d, sign(d)/count and d/norm, plus here, minus
    there.

    A norm of zero has the subgradient zero.
    """
    mask = None if kept is None else pixel_mask(kept, patch_size, *images.shape[-2:])
    result = torch.zeros_like(images, memory_format=torch.contiguous_format)
    for offset, (_, norm, count) in zip(NEIGHBOURS, parts.unbind(1), strict=True):
        here, there = _pair(images, offset)
        difference = here - there
        per_norm = torch.where(norm > 0, grad_l2 / norm, 0.0)
        per_count = torch.where(count > 0, grad_l1 / count, 0.0)
        slope = difference * per_norm + difference.sign() * per_count
        if mask is not None:
            slope = slope * _counted(mask, offset)
        to_here, to_there = _pair(result, offset)
        to_here.add_(slope)
        to_there.sub_(slope)
    return result


def batch_norm_matching(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in eval mode of x [B, C, H, W]; the mean and biased variance [C] of x itself."""
    scale = weight * (running_var + eps).rsqrt()
    y = x * scale[:, None, None] + (bias - running_mean * scale)[:, None, None]
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return y, mean, var


def batch_norm_matching_backward(
    grad: Tensor,
    x: Tensor,
    running_var: Tensor,
    weight: Tensor,
    eps: float,
    offset: Tensor,
    slope: Tensor,
) -> Tensor:
    """Gradient of x: grad·w/√(running_var + eps) + offset_c + slope_c·x, offset and slope [C]."""
    scale = weight * (running_var + eps).rsqrt()
    per_channel = (t[:, None, None] for t in (scale, offset, slope))
    scale, offset, slope = per_channel
    return grad * scale + offset + slope * x


def adam_clamp_(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    low: Tensor,
    high: Tensor,
    kept: Tensor | None,
    patch_size: int,
) -> None:
    """See :func:`smi_fast.ops.adam_clamp_`."""
    tensors = (images, grad, exp_avg, exp_avg_sq)
    bounds = (low[:, None, None], high[:, None, None])
    if kept is None:
        _adam_clamp_(tensors, step, lr, beta1, beta2, *bounds)
        return
    columns = images.shape[3] // patch_size
    # As [B, rows, columns, C, P, P], so that indexing the first three copies only kept patches.
    cells = [
        t.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
        for t in tensors
    ]
    where = (torch.arange(len(kept), device=kept.device)[:, None], kept // columns, kept % columns)
    picked = [cell[where] for cell in cells]
    _adam_clamp_(picked, step, lr, beta1, beta2, *bounds)
    for cell, values in zip((cells[0], *cells[2:]), (picked[0], *picked[2:]), strict=True):
        cell[where] = values


def _adam_clamp_(
    tensors: Sequence[Tensor],
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    low: Tensor,
    high: Tensor,
) -> None:
    pixels, grad, exp_avg, exp_avg_sq = tensors
    taken = step.double()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (exp_avg_sq.sqrt() / (1 - beta2**taken) ** 0.5).add_(ADAM_EPS)
    pixels.add_(exp_avg * (-lr / (1 - beta1**taken)) / root)
    torch.clamp(pixels, low, high, out=pixels)


def add_normalize_(
    x: Tensor,
    added: Tensor | None,
    bias: Tensor | None,
    eps: float,
    normalized: Tensor,
    rstd: Tensor,
) -> None:
    """LayerNorm without its affine part, of rows x [rows, D] += added + bias.

    Writes normalized [rows, D] and rstd [rows], one over the standard deviation.
    """
    if added is not None and bias is not None:
        x += added + bias
    centred = x - x.mean(dim=1, keepdim=True)
    rstd.copy_((centred.square().mean(dim=1) + eps).rsqrt())
    normalized.copy_(centred * rstd[:, None])


def normalize_backward_(gradient: Tensor, grad: Tensor, normalized: Tensor, rstd: Tensor) -> None:
    """Adds to gradient [rows, D] that of x in :func:`add_normalize_`, with n = normalized.

    dx = rstd (dn − mean(dn) − n mean(dn ∘ n)).
    """
    slope = (grad * normalized).mean(dim=1, keepdim=True)
    gradient += rstd[:, None] * (grad - grad.mean(dim=1, keepdim=True) - normalized * slope)


def gelu_(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = gelu(x + bias) for x [rows, F], which becomes the derivative there: Φ(x) + x φ(x)."""
    x += bias
    cdf = torch.special.ndtr(x)
    out.copy_(x * cdf)
    x.copy_(cdf + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi))


def multiply_(x: Tensor, factors: Tensor) -> None:
    """x *= factors of the same shape."""
    x *= factors


def attend_(qkv: Tensor, q_bias: Tensor, out: Tensor) -> None:
    """Attention of qkv [B, N, 3, H, D] into out, q_bias [H·D] added to the queries."""
    out.copy_(gather_attention(_biased(qkv, q_bias), None, None, False)[0].view_as(out))


def attend_backward_(grad: Tensor, qkv: Tensor, q_bias: Tensor, d_qkv: Tensor) -> None:
    """The gradient of qkv in :func:`attend_` into d_qkv, from that of its out."""
    rows = grad.view(*qkv.shape[:2], q_bias.numel())
    d_qkv.copy_(gather_attention_backward(rows, _biased(qkv, q_bias), None, None).view_as(d_qkv))


def attend_rows(q: Tensor, q_bias: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries q + q_bias [B, R, H·D] among kv [B, N, 2, H, D].

    Returns out [B, R, H·D] and the shares [B, H, R, N] of the values in it.
    """
    keys, values = kv.permute(2, 0, 3, 1, 4)
    shares = (_queries(q, q_bias, kv) @ keys.mT).softmax(dim=-1)
    return (shares @ values).transpose(1, 2).flatten(2), shares


def attend_rows_backward(
    grad: Tensor, q: Tensor, q_bias: Tensor, kv: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of q and kv in :func:`attend_rows`, from that of its out."""
    keys, values = kv.permute(2, 0, 3, 1, 4)
    d_out = grad.unflatten(2, kv.shape[3:]).transpose(1, 2)
    d_shares = d_out @ values.mT
    d_scores = shares * (d_shares - (shares * d_shares).sum(dim=-1, keepdim=True))
    d_q = (d_scores @ keys).transpose(1, 2).flatten(2) / kv.shape[4] ** 0.5
    d_keys, d_values = d_scores.mT @ _queries(q, q_bias, kv), shares.mT @ d_out
    return d_q, torch.stack([d_keys, d_values]).permute(1, 3, 0, 2, 4).contiguous()


def _queries(q: Tensor, q_bias: Tensor, kv: Tensor) -> Tensor:
    """[B, H, R, D], biased and scaled."""
    queries: Tensor = (q + q_bias).unflatten(2, kv.shape[3:]).transpose(1, 2)
    return queries / math.sqrt(kv.shape[4])


def _biased(qkv: Tensor, q_bias: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    return torch.stack([q + q_bias.view(qkv.shape[3:]), k, v], dim=2)
