"""The specification of every op in plain PyTorch, forward and backward.

Each function defines what the kernels of every backend compute. It runs on every device and in
float64, and is itself the backend ``reference``. :mod:`smi_fast.ops` has checked the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smi_fast.ops.grid import NEIGHBOURS, pixel_mask, spread, window_indices

ADAM_EPS = 1e-8


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The data type of sums and statistics of tensors of ``dtype``: float32 or float64.

    A sum over the pixels of an image exceeds the largest float16.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """Gradient [B, C, H, W] of the images. Windows don't overlap, so a scatter adds nothing up."""
    channels = grad.shape[2] // patch_size**2
    pixels, _ = window_indices(kept, shift, flip, patch_size, height, width)
    flat = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    windows = grad.unflatten(2, (channels, patch_size**2)).transpose(1, 2).flatten(2)
    images = grad.new_zeros(len(grad), channels, height * width).scatter(2, flat, windows)
    return images.view(len(grad), channels, height, width)


def gather_sigmoid_patches(
    field: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    mean: Tensor,
    std: Tensor,
    background: Tensor | None,
    frozen: Tensor | None,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_sigmoid_patches`."""
    images = (torch.sigmoid(field) - mean[:, None, None]) / std[:, None, None]
    if frozen is not None and background is not None:
        images = torch.where(spread(frozen, patch_size), background, images)
    return gather_patches(images, kept, shift, flip, patch_size)


def gather_sigmoid_patches_backward(
    grad: Tensor,
    field: Tensor,
    kept: Tensor,
    shift: Tensor,
    flip: Tensor,
    std: Tensor,
    frozen: Tensor | None,
    patch_size: int,
) -> Tensor:
    """Gradient [B, C, H, W] of the field: that of the images times the sigmoid's slope over std."""
    height, width = field.shape[-2:]
    images = gather_patches_backward(grad, kept, shift, flip, patch_size, height, width)
    # 1 - sigmoid(field) would lose its digits where a pixel is nearly white.
    slope = torch.sigmoid(field) * torch.sigmoid(-field)
    gradient = images * slope / std[:, None, None]
    if frozen is not None:
        gradient = gradient.masked_fill(spread(frozen, patch_size), 0)
    # Where no window lies it is zero even if the field isn't finite.
    windows = torch.ones_like(grad)
    covered = gather_patches_backward(windows, kept, shift, flip, patch_size, height, width)
    return gradient.masked_fill(covered == 0, 0)


def _rows(qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The chosen rows of qkv [B, N, 3, H, D] as [3, B, H, K, D]; zeros from ``lengths`` on."""
    if token_index is not None:
        qkv = qkv.gather(1, token_index[:, :, None, None, None].expand(-1, -1, *qkv.shape[2:]))
    return _cut(qkv, lengths).permute(2, 0, 3, 1, 4)


def _cut(rows: Tensor, lengths: Tensor | None) -> Tensor:
    """Rows [B, K, ...] with zeros from ``lengths`` on, where a NaN would pass a product with 0."""
    if lengths is None:
        return rows
    beyond = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]
    return rows.masked_fill(beyond.reshape(*beyond.shape, *[1] * (rows.dim() - 2)), 0)


def _probabilities(q: Tensor, k: Tensor, lengths: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D) [B, H, K, K], with zeros in rows and columns from ``lengths`` on."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if lengths is None:
        return scores.softmax(dim=-1)
    valid = torch.arange(k.shape[-2], device=k.device) < lengths[:, None, None, None]
    probabilities = scores.masked_fill(~valid, -torch.inf).softmax(dim=-1)
    # In an image without tokens every score is -inf and every softmax NaN: the mask removes them.
    return probabilities.masked_fill(~(valid & valid.transpose(-2, -1)), 0.0)


def gather_attention(
    qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None, importance: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`smi_fast.ops.gather_attention`; without ``importance`` the second is [B, 0]."""
    q, k, v = _rows(qkv, token_index, lengths)
    probabilities = _probabilities(q, k, lengths)
    out = (probabilities @ v).transpose(1, 2).flatten(2)
    if importance:
        return out, probabilities[:, :, :1].mean(dim=(1, 2))
    return out, qkv.new_empty(len(qkv), 0)


def gather_attention_backward(
    grad: Tensor, qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Gradient [B, N, 3, H, D] of ``qkv``; rows outside of ``token_index`` get zero.

    It computes P again, and then
    dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = dS K / √D, dK = dSᵀ Q / √D.
    """
    q, k, v = _rows(qkv, token_index, lengths)
    probabilities = _probabilities(q, k, lengths)
    grad = _cut(grad, lengths)
    grad = grad.unflatten(2, q.shape[1::2]).transpose(1, 2)
    d_probabilities = grad @ v.transpose(-2, -1)
    weighted = probabilities * d_probabilities
    d_scores = (weighted - probabilities * weighted.sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    gradients = (
        d_scores @ k,
        d_scores.transpose(-2, -1) @ q,
        probabilities.transpose(-2, -1) @ grad,
    )
    rows = torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2)
    if token_index is None:
        return rows
    index = token_index[:, :, None, None, None].expand(-1, -1, *rows.shape[2:])
    return torch.zeros_like(qkv, memory_format=torch.contiguous_format).scatter(1, index, rows)


def _pair(images: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two views: the pixels that have a neighbour at an offset, and these neighbours."""
    down, right = offset
    height, width = images.shape[-2:]
    here = images[..., : height - down, max(-right, 0) : width - max(right, 0)]
    there = images[..., down:, max(right, 0) : width - max(-right, 0)]
    return here, there


def _counted(mask: Tensor, offset: tuple[int, int]) -> Tensor:
    """Which differences have at least one active pixel."""
    here, there = _pair(mask, offset)
    return here | there


def total_variation(images: Tensor, active: Tensor | None, patch_size: int) -> Tensor:
    """The sums [3, 4] of :func:`smi_fast.ops.total_variation`.

    The columns are the four directions of :data:`smi_fast.ops.grid.NEIGHBOURS`. The rows are the
    sum of absolute differences, their Frobenius norm, and the number of differences that count.
    Their data type is :func:`sum_dtype` of the images'.
    """
    images = images.to(sum_dtype(images.dtype))
    mask = None if active is None else pixel_mask(active, patch_size, *images.shape[-2:])
    sums = []
    for offset in NEIGHBOURS:
        here, there = _pair(images, offset)
        difference = here - there
        count = images.new_full((), difference.numel())
        if mask is not None:
            counted = _counted(mask, offset)
            difference = difference.masked_fill(~counted, 0)
            count = counted.sum().to(images.dtype) * images.shape[1]
        sums.append(torch.stack([difference.abs().sum(), difference.square().sum().sqrt(), count]))
    return torch.stack(sums, dim=1)


def total_variation_backward(
    grad_l1: Tensor,
    grad_l2: Tensor,
    images: Tensor,
    active: Tensor | None,
    patch_size: int,
    sums: Tensor,
) -> Tensor:
    """Gradient [B, C, H, W] of the images.

    Each difference d = here − there adds the slope grad_l1 sign(d)/count + grad_l2 d/norm to here
    and subtracts it from there. A norm of zero has the subgradient zero.
    """
    dtype = images.dtype
    images = images.to(sums.dtype)
    mask = None if active is None else pixel_mask(active, patch_size, *images.shape[-2:])
    result = torch.zeros_like(images, memory_format=torch.contiguous_format)
    for offset, (_, norm, count) in zip(NEIGHBOURS, sums.unbind(1), strict=True):
        here, there = _pair(images, offset)
        difference = here - there
        per_norm = torch.where(norm > 0, grad_l2 / norm, 0.0)
        per_count = torch.where(count > 0, grad_l1 / count, 0.0)
        slope = difference * per_norm + difference.sign() * per_count
        if mask is not None:
            slope = slope.masked_fill(~_counted(mask, offset), 0)
        to_here, to_there = _pair(result, offset)
        to_here.add_(slope)
        to_there.sub_(slope)
    return result.to(dtype)


def batch_norm_matching(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in eval mode of x [B, C, H, W], and the mean and biased variance [C] of x.

    The data type of the mean and the variance is :func:`sum_dtype` of that of x.
    """
    scale = weight * (running_var + eps).rsqrt()
    y = x * scale[:, None, None] + (bias - running_mean * scale)[:, None, None]
    var, mean = torch.var_mean(x.to(sum_dtype(x.dtype)), dim=(0, 2, 3), correction=0)
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
    """Gradient [B, C, H, W] of x: grad · weight/√(running_var + eps) + offset + slope · x.

    ``offset`` and ``slope`` [C] come from the gradient of the loss, in the data type of statistics.
    """
    scale = weight * (running_var + eps).rsqrt()
    per_channel = (t[:, None, None] for t in (scale, offset, slope))
    scale, offset, slope = per_channel
    return (grad * scale + offset + slope * x).to(x.dtype)


def adam_clamp_(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    low: Tensor,
    high: Tensor,
    active: Tensor | None,
    patch_size: int,
) -> None:
    """See :func:`smi_fast.ops.adam_clamp_`."""
    tensors = (images, grad, exp_avg, exp_avg_sq)
    bounds = (low[:, None, None], high[:, None, None])
    if active is None:
        _adam_clamp_(tensors, step, lr, beta1, beta2, weight_decay, *bounds)
        return
    columns = images.shape[3] // patch_size
    # As [B, rows, columns, C, P, P], so that an index of the first three axes copies only active
    # patches.
    cells = [
        t.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
        for t in tensors
    ]
    where = (
        torch.arange(len(active), device=active.device)[:, None],
        active // columns,
        active % columns,
    )
    picked = [cell[where] for cell in cells]
    _adam_clamp_(picked, step, lr, beta1, beta2, weight_decay, *bounds)
    for cell, values in zip((cells[0], *cells[2:]), (picked[0], *picked[2:]), strict=True):
        cell[where] = values


def _adam_clamp_(
    tensors: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    low: Tensor,
    high: Tensor,
) -> None:
    # In float16 ADAM_EPS would be zero, and a pixel without gradient 0 / 0.
    dtype = sum_dtype(tensors[0].dtype)
    pixels, grad, exp_avg, exp_avg_sq = (tensor.to(dtype) for tensor in tensors)
    taken = step.double()
    exp_avg.add_(grad - exp_avg, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (exp_avg_sq.sqrt() / (1 - beta2**taken) ** 0.5).add_(ADAM_EPS)
    if weight_decay:
        pixels.mul_(1 - lr * weight_decay)
    pixels.add_(exp_avg * (-lr / (1 - beta1**taken)) / root)
    torch.clamp(pixels, low.to(dtype), high.to(dtype), out=pixels)
    for tensor, values in zip(tensors, (pixels, grad, exp_avg, exp_avg_sq), strict=True):
        if values is not tensor:
            tensor.copy_(values)
