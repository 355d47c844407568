"""The public ops: checked inputs, a backend chosen by :mod:`smi_fast.backends`, and gradients.

The docstring of each op has the one PyTorch expression that it equals; :mod:`smi_fast.reference` is
that expression without its detours. Gradients are first order only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_fast.backends import AUTO, Attention, Backend, choose


def gather_patches(
    images: Tensor,
    kept: Tensor,
    shift: Tensor | tuple[int, int] = (0, 0),
    flip: Tensor | bool = False,
    *,
    patch_size: int,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """The kept patches of jittered images, without jittering the images.

    A kept patch follows the shift to the nearest cell of the grid (a half rounds up) and then the
    flip; that cell shows a displaced, wrapped-around window of the original image. Equal to::

        jittered = images.roll((shift[0], shift[1]), (2, 3))
        jittered = jittered.flip(3) if flip else jittered
        patches = unfold(jittered, patch_size, stride=patch_size).mT
        patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[2]))

    Args:
        images: [B, C, H, W], H and W multiples of ``patch_size``.
        kept: int64 [B, K], distinct patches of the un-jittered grid, row by row from 0.
        shift: pixels (rows, columns) that all images are rolled by; a tensor is int64 [2].
        flip: whether all images are mirrored left to right afterwards; a tensor is bool [].
        patch_size: side P of a patch in pixels.
        backend: see :mod:`smi_fast.backends`.

    Returns:
        patches [B, K, C·P·P], pixels in the order of a convolution's weight, and positions int64
        [B, K], the grid cell that each one has in the jittered image.

    Raises:
        ValueError: wrong shape, data type or device.
        BackendUnavailable: the backend can't run here.
    """
    _expect(images.dim() == 4, "images [B, C, H, W]", images)
    _expect_patches(images, patch_size)
    _expect_kept(kept, images)
    shift = torch.as_tensor(shift, device=images.device)
    flip = torch.as_tensor(flip, device=images.device)
    _expect(shift.shape == (2,) and shift.dtype == torch.int64, "shift int64 [2]", shift)
    _expect(flip.dim() == 0 and flip.dtype == torch.bool, "flip bool []", flip)
    chosen = choose("gather_patches", images.device, images.dtype, backend)
    patches, positions = _GatherPatches.apply(images, kept, shift, flip, patch_size, chosen)
    return patches, positions


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        kept: Tensor,
        shift: Tensor,
        flip: Tensor,
        patch_size: int,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kept, shift, flip)
        ctx.patch_size, ctx.side, ctx.backend = patch_size, images.shape[-2:], backend
        patches, positions = backend.functions.gather_patches(images, kept, shift, flip, patch_size)
        ctx.mark_non_differentiable(positions)
        ctx.set_materialize_grads(False)
        return patches, positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None:
            gradient = ctx.backend.functions.gather_patches_backward(
                grad, *ctx.saved_tensors, ctx.patch_size, *ctx.side
            )
        return gradient, None, None, None, None, None


def gather_attention(
    qkv: Tensor,
    kept: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    importance: bool = False,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention among kept tokens, from the QKV projection's layout to the output
    projection's.

    With ``rows = qkv if kept is None else qkv.gather(1, kept…)`` equal to::

        q, k, v = rows.permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.mT / D**0.5).softmax(-1)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        importance = probabilities[:, :, 0].mean(1)

    Args:
        qkv: [B, N, 3, H, D], any strides.
        kept: int64 [B, K], distinct rows of ``qkv`` to attend among; None takes all of them in
            order.
        lengths: int64 [B], the tokens of each image that count; the rows after them are zero.
        importance: also return how much the first kept token attends to each; it has no gradient.
        backend: see :mod:`smi_fast.backends`.

    Returns:
        out [B, K, H·D], and importance [B, K] or None.

    Raises:
        ValueError: wrong shape, data type or device.
        BackendUnavailable: the backend can't run here.
    """
    _expect(qkv.dim() == 5 and qkv.shape[2] == 3, "qkv [B, N, 3, H, D]", qkv)
    if kept is not None:
        _expect_kept(kept, qkv)
    if lengths is not None:
        fits = lengths.shape == (len(qkv),) and lengths.dtype == torch.int64
        _expect(fits, f"lengths int64 [{len(qkv)}]", lengths)
        _expect_device(lengths, qkv)
    tokens = qkv.shape[1] if kept is None else kept.shape[1]
    gradient = qkv.requires_grad and torch.is_grad_enabled()
    size = Attention(tokens, qkv.shape[4], gradient)
    chosen = choose("gather_attention", qkv.device, qkv.dtype, backend, size)
    out, row = _GatherAttention.apply(qkv, kept, lengths, importance, chosen)
    return out, row if importance else None


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        kept: Tensor | None,
        lengths: Tensor | None,
        importance: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(qkv, kept, lengths)
        ctx.backend = backend
        out, row = backend.functions.gather_attention(qkv, kept, lengths, importance)
        ctx.mark_non_differentiable(row)
        ctx.set_materialize_grads(False)
        return out, row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None:
            gradient = ctx.backend.functions.gather_attention_backward(grad, *ctx.saved_tensors)
        return gradient, None, None, None, None


def total_variation(
    images: Tensor, kept: Tensor | None = None, *, patch_size: int = 1, backend: str = AUTO
) -> tuple[Tensor, Tensor]:
    """Total variation of a batch over horizontal, vertical and both diagonal neighbours.

    With the four differences ``d`` of neighbouring pixels of the whole batch equal to::

        l1 = sum(d.abs().mean() for d in differences)
        l2 = sum(torch.linalg.vector_norm(d) for d in differences)

    as DeepInversion (arXiv 1912.08795) and SMI (arXiv 2510.27186) use it. With ``kept``, only
    differences count that have at least one pixel in a kept patch: the others are constant while
    the background is frozen.

    Args:
        images: [B, C, H, W].
        kept: int64 [B, K], distinct patches of the grid; None counts every difference.
        patch_size: side of a patch in pixels; needed with ``kept`` only.
        backend: see :mod:`smi_fast.backends`.

    Returns:
        l1 and l2, scalars of the images' data type.

    Raises:
        ValueError: wrong shape, data type or device.
        BackendUnavailable: the backend can't run here.
    """
    _expect(images.dim() == 4, "images [B, C, H, W]", images)
    if kept is not None:
        _expect_patches(images, patch_size)
        _expect_kept(kept, images)
    chosen = choose("total_variation", images.device, images.dtype, backend)
    l1, l2 = _TotalVariation.apply(images, kept, patch_size, chosen)
    return l1, l2


class _TotalVariation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, kept: Tensor | None, patch_size: int, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        parts = backend.functions.total_variation(images, kept, patch_size)
        ctx.save_for_backward(images, kept, parts)
        ctx.patch_size, ctx.backend = patch_size, backend
        sums, norms, counts = parts
        return (sums / counts.clamp(min=1)).sum(), norms.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_l1: Tensor, grad_l2: Tensor) -> tuple[Tensor | None, ...]:
        images, kept, parts = ctx.saved_tensors
        gradient = ctx.backend.functions.total_variation_backward(
            grad_l1, grad_l2, images, kept, ctx.patch_size, parts
        )
        return gradient, None, None, None


def batch_norm_matching(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode together with DeepInversion's statistic-matching term for its input.

    Equal to::

        y = F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        loss = torch.dist(var, running_var) + torch.dist(mean, running_mean)

    Source: DeepInversion (arXiv 1912.08795), equation 4. Only ``x`` gets a gradient.

    Args:
        x: [B, C, H, W], not empty.
        running_mean: [C], as are running_var, weight and bias.
        running_var: recorded variance.
        weight: scale of the layer.
        bias: offset of the layer.
        eps: added to the variance.
        backend: see :mod:`smi_fast.backends`.

    Returns:
        y [B, C, H, W] and loss, a scalar.

    Raises:
        ValueError: wrong shape, data type or device.
        BackendUnavailable: the backend can't run here.
    """
    _expect(x.dim() == 4 and x.numel() > 0, "x [B, C, H, W], not empty", x)
    named = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, tensor in named.items():
        fits = tensor.shape == (x.shape[1],) and tensor.dtype == x.dtype
        _expect(fits, f"{name} {x.dtype} [{x.shape[1]}]", tensor)
        _expect_device(tensor, x)
    chosen = choose("batch_norm_matching", x.device, x.dtype, backend)
    y, loss = _BatchNormMatching.apply(x, running_mean, running_var, weight, bias, eps, chosen)
    return y, loss


class _BatchNormMatching(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        y, mean, var = backend.functions.batch_norm_matching(
            x, running_mean, running_var, weight, bias, eps
        )
        ctx.save_for_backward(x, running_mean, running_var, weight, mean, var)
        ctx.eps, ctx.backend = eps, backend
        return y, torch.dist(var, running_var) + torch.dist(mean, running_mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, running_mean, running_var, weight, mean, var = ctx.saved_tensors
        # d mean / dx = 1/n and d var / dx = 2 (x - mean)/n, so the term's gradient is linear in x.
        count = x.numel() // x.shape[1]
        to_mean = grad_loss * _direction(mean - running_mean) / count
        to_var = grad_loss * _direction(var - running_var) / count
        gradient = ctx.backend.functions.batch_norm_matching_backward(
            grad_y, x, running_var, weight, ctx.eps, to_mean - 2 * to_var * mean, 2 * to_var
        )
        return gradient, None, None, None, None, None, None


def _direction(difference: Tensor) -> Tensor:
    """Gradient of a vector's norm; zero for the zero vector."""
    norm = torch.linalg.vector_norm(difference)
    return torch.where(norm > 0, difference / norm, 0.0)


@torch.no_grad()
def adam_clamp_(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    low: Tensor,
    high: Tensor,
    kept: Tensor | None = None,
    patch_size: int = 1,
    backend: str = AUTO,
) -> None:
    """One step of Adam (arXiv 1412.6980, eps 1e-8) on pixels, then a clamp of each channel; in
    place.

    Equal to ``torch.optim.Adam`` followed by ``images.clamp_(low[:, None, None], high[:, None,
    None])``, on all pixels or on those of kept patches.

    Args:
        images: [B, C, H, W], changed.
        grad: [B, C, H, W].
        exp_avg: [B, C, H, W], running mean of the gradient, changed.
        exp_avg_sq: [B, C, H, W], running mean of its square, changed.
        step: the number of this step, from 1; a tensor is int64 [], and its value isn't checked,
            for that would wait for the device.
        lr: learning rate.
        betas: decay of both means, each in [0, 1).
        low: [C], least value of each channel.
        high: [C], greatest value of each channel.
        kept: int64 [B, K], distinct patches of the grid to touch; None touches every pixel.
        patch_size: side of a patch in pixels; needed with ``kept`` only.
        backend: see :mod:`smi_fast.backends`.

    Raises:
        ValueError: wrong shape, data type, device or step.
        BackendUnavailable: the backend can't run here.
    """
    _expect(images.dim() == 4, "images [B, C, H, W]", images)
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        fits = tensor.shape == images.shape and tensor.dtype == images.dtype
        _expect(fits, f"{name} like images, {images.dtype} {list(images.shape)}", tensor)
        _expect_device(tensor, images)
    for name, bound in (("low", low), ("high", high)):
        fits = bound.shape == (images.shape[1],) and bound.dtype == images.dtype
        _expect(fits, f"{name} {images.dtype} [{images.shape[1]}]", bound)
        _expect_device(bound, images)
    if not isinstance(step, Tensor):
        if step < 1:
            raise ValueError(f"expected step >= 1, got {step}")
        step = torch.tensor(step, device=images.device)
    _expect(step.dim() == 0 and step.dtype == torch.int64, "step int64 []", step)
    _expect_device(step, images)
    if kept is not None:
        _expect_patches(images, patch_size)
        _expect_kept(kept, images)
    functions = choose("adam_clamp_", images.device, images.dtype, backend).functions
    moments = (exp_avg, exp_avg_sq)
    functions.adam_clamp_(images, grad, *moments, step, lr, *betas, low, high, kept, patch_size)


def _expect(holds: bool, expected: str, got: Tensor) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, got {got.dtype} {list(got.shape)}")


def _expect_device(tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"expected all tensors on {like.device}, got one on {tensor.device}")


def _expect_patches(images: Tensor, patch_size: int) -> None:
    height, width = images.shape[-2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"expected image sides that are multiples of the patch size {patch_size}, "
            f"got {height} x {width}"
        )


def _expect_kept(kept: Tensor, like: Tensor) -> None:
    fits = kept.dim() == 2 and len(kept) == len(like) and kept.dtype == torch.int64
    _expect(fits, f"kept int64 [{len(like)}, K]", kept)
    _expect_device(kept, like)
