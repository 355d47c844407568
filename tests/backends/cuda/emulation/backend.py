"""The emulated kernels with the signatures of :mod:`smi_fast.ops.reference`.

Outputs and scratch start as NaN, which shows any element that a kernel leaves out.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def _poisoned(
    shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(85)


def _at(tensor: Tensor | None) -> int:
    """The address of a tensor: 0 for None, and never 0 for a tensor without elements."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr() if tensor.numel() else 1


class Emulated:
    """The kernels of one built module as a backend."""

    def __init__(self, module: ModuleType) -> None:
        self.kernels = module

    def _type(self, tensor: Tensor) -> object:
        return getattr(self.kernels.Type, str(tensor.dtype).removeprefix("torch."))

    def _image_shape(self, images: Tensor, patches: Tensor | None, patch_size: int) -> object:
        count = 0 if patches is None else patches.shape[1]
        return self.kernels.ImageShape(*images.shape, count, patch_size)

    def _jitter(self, shift: Tensor, flip: Tensor) -> object:
        places = (shift.data_ptr(), flip.data_ptr())
        return self.kernels.Jitter(*places, *shift.stride(), *flip.stride())

    def gather_patches(
        self, images: Tensor, kept: Tensor, shift: Tensor, flip: Tensor, patch_size: int
    ) -> tuple[Tensor, Tensor]:
        patches = _poisoned((*kept.shape, images.shape[1] * patch_size**2), images)
        positions = _poisoned(kept.shape, kept)
        shape = self._image_shape(images, kept, patch_size)
        inputs = (_at(images), _at(kept), self._jitter(shift, flip))
        outputs = (_at(patches), _at(positions))
        self.kernels.gather_patches_fwd(images.element_size(), *inputs, *outputs, shape, 0)
        return patches, positions

    def gather_patches_backward(
        self,
        grad: Tensor,
        kept: Tensor,
        shift: Tensor,
        flip: Tensor,
        patch_size: int,
        height: int,
        width: int,
    ) -> Tensor:
        channels = grad.shape[2] // patch_size**2
        images = _poisoned((len(grad), channels, height, width), grad)
        shape = self._image_shape(images, kept, patch_size)
        inputs = (_at(grad), _at(kept), self._jitter(shift, flip))
        self.kernels.gather_patches_bwd(grad.element_size(), *inputs, _at(images), shape, 0)
        return images

    def gather_sigmoid_patches(
        self,
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
        patches = _poisoned((*kept.shape, field.shape[1] * patch_size**2), field)
        positions = _poisoned(kept.shape, kept)
        shape = self._image_shape(field, kept, patch_size)
        inputs = (_at(field), _at(kept), self._jitter(shift, flip), _at(mean), _at(std))
        still = (_at(background), _at(frozen))
        outputs = (_at(patches), _at(positions))
        self.kernels.gather_sigmoid_patches_fwd(
            self._type(field), *inputs, *still, *outputs, shape, 0
        )
        return patches, positions

    def gather_sigmoid_patches_backward(
        self,
        grad: Tensor,
        field: Tensor,
        kept: Tensor,
        shift: Tensor,
        flip: Tensor,
        std: Tensor,
        frozen: Tensor | None,
        patch_size: int,
    ) -> Tensor:
        result = _poisoned(field.shape, field)
        shape = self._image_shape(field, kept, patch_size)
        inputs = (_at(grad), _at(field), _at(kept), self._jitter(shift, flip), _at(std))
        self.kernels.gather_sigmoid_patches_bwd(
            self._type(grad), *inputs, _at(frozen), _at(result), shape, 0
        )
        return result

    def gather_attention(
        self, qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None, importance: bool
    ) -> tuple[Tensor, Tensor]:
        batch, rows, _, heads, width = qkv.shape
        count = rows if token_index is None else token_index.shape[1]
        out = _poisoned((batch, count, heads * width), qkv)
        row = _poisoned((batch, count if importance else 0), qkv)
        scratch = _poisoned((batch, heads, count), qkv, torch.float32)
        shape = self.kernels.AttentionShape(batch, rows, count, heads, width)
        inputs = (_at(qkv), _at(token_index), _at(lengths))
        outputs = (_at(out), _at(scratch), _at(row) if importance else 0)
        self.kernels.gather_attention_fwd(self._type(qkv), *inputs, *outputs, shape, 0)
        return out, row

    def gather_attention_backward(
        self, grad: Tensor, qkv: Tensor, token_index: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        batch, rows, _, heads, width = qkv.shape
        result = _poisoned(qkv.shape, qkv)
        shape = self.kernels.AttentionShape(batch, rows, grad.shape[1], heads, width)
        inputs = (_at(grad), _at(qkv), _at(token_index), _at(lengths))
        self.kernels.gather_attention_bwd(self._type(qkv), *inputs, _at(result), shape, 0)
        return result

    def max_tokens(self, dtype: torch.dtype, width: int, backward: bool) -> int:
        tokens = torch.zeros((), dtype=torch.int64)
        kind = self._type(torch.empty(0, dtype=dtype))
        self.kernels.max_tokens(kind, width, backward, _at(tokens))
        return int(tokens)

    def total_variation(self, images: Tensor, active: Tensor | None, patch_size: int) -> Tensor:
        sums = _poisoned((3, 4), images, torch.float32)
        scratch = _poisoned((self.kernels.VARIATION_SCRATCH,), images, torch.float64)
        shape = self._image_shape(images, active, patch_size)
        mask = self._mask(images, active, patch_size)
        inputs = (_at(images), _at(active))
        outputs = (_at(mask), _at(scratch), _at(sums))
        self.kernels.total_variation_fwd(self._type(images), *inputs, *outputs, shape, 0)
        return sums

    def total_variation_backward(
        self,
        grad_l1: Tensor,
        grad_l2: Tensor,
        images: Tensor,
        active: Tensor | None,
        patch_size: int,
        sums: Tensor,
    ) -> Tensor:
        result = _poisoned(images.shape, images)
        shape = self._image_shape(images, active, patch_size)
        inputs = (_at(grad_l1), _at(grad_l2), _at(images), _at(active))
        mask = self._mask(images, active, patch_size)
        outputs = (_at(mask), _at(sums), _at(result))
        self.kernels.total_variation_bwd(self._type(images), *inputs, *outputs, shape, 0)
        return result

    def batch_norm_matching(
        self,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = _poisoned(x.shape, x)
        mean, var = (_poisoned(running_mean.shape, x, torch.float32) for _ in range(2))
        scratch = _poisoned((x.shape[1] * self.kernels.NORM_SPLITS * 2,), x, torch.float64)
        inputs = [_at(t) for t in (x, running_mean, running_var, weight, bias)]
        outputs = [_at(t) for t in (scratch, y, mean, var)]
        shape = self._norm_shape(x)
        self.kernels.batch_norm_matching_fwd(self._type(x), *inputs, eps, *outputs, shape, 0)
        return y, mean, var

    def batch_norm_matching_backward(
        self,
        grad: Tensor,
        x: Tensor,
        running_var: Tensor,
        weight: Tensor,
        eps: float,
        offset: Tensor,
        slope: Tensor,
    ) -> Tensor:
        result = _poisoned(x.shape, x)
        inputs = [_at(t) for t in (grad, x, running_var, weight)]
        outputs = [_at(t) for t in (offset, slope, result)]
        shape = self._norm_shape(x)
        self.kernels.batch_norm_matching_bwd(self._type(x), *inputs, eps, *outputs, shape, 0)
        return result

    def adam_clamp_(
        self,
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
        state = [_at(t) for t in (images, grad, exp_avg, exp_avg_sq)]
        adam = self.kernels.AdamStep(_at(step), _at(lr), beta1, beta2, weight_decay)
        shape = self._image_shape(images, active, patch_size)
        bounds = (_at(low), _at(high), _at(active))
        self.kernels.adam_clamp(self._type(images), *state, adam, *bounds, shape, 0)

    @staticmethod
    def _mask(images: Tensor, active: Tensor | None, patch_size: int) -> Tensor | None:
        if active is None:
            return None
        patches = images.shape[2] // patch_size * (images.shape[3] // patch_size)
        return _poisoned((len(images), patches), images, torch.uint8)

    def _norm_shape(self, x: Tensor) -> object:
        return self.kernels.NormShape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
