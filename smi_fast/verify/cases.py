"""One call of an op, run by any backend and held to the error budget.

The C++ kernels, the emulated CUDA kernels, the interpreted Triton kernels and ``smi-fast verify``
all run the calls of :mod:`smi_fast.verify.call_grid` through :meth:`OpCall.check`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from smi_fast.engine import iteration_reference
from smi_fast.engine import reference as engine_reference
from smi_fast.ops import reference
from smi_fast.ops.backends import Backend
from smi_fast.ops.limits import AttentionSize
from smi_fast.verify.budget import NOISE, SDPA_NOISE, Error, errors

# The specification of every op, by the name of the op.
SPECIFICATION = SimpleNamespace(
    **{**vars(engine_reference), **vars(iteration_reference), **vars(reference)}
)

# Ops that copy numbers: every bit of a result is compared.
EXACT = ("gather_patches", "gather_patches_backward", "rows_at")

# The arguments that an op changes in place, by position.
CHANGED = {
    "adam_clamp_": (0, 2, 3),
    "add_normalize_": (0, 4, 5),
    "normalize_backward_": (0, 4),
    "add_normalize_rows_": (4, 5, 6),
    "normalize_backward_rows_": (4, 5),
    "final_norm_": (6, 7, 8),
    "final_norm_backward_": (4, 5),
    "gelu_": (0, 2),
    "multiply_": (0,),
    "linear_gelu_": (3, 4),
    "multiplied_product_": (3,),
    "swiglu_": (0, 2),
    "swiglu_backward_": (2,),
    "rotate_": (0,),
    "rotate_backward_": (0,),
    "attend_": (2,),
    "attend_backward_": (3,),
}

# The arguments whose data type is that of statistics, see reference.sum_dtype, by position. Of the
# engine's steps these are all that no matrix product reads or writes.
STATISTICS = {
    "total_variation_backward": (0, 1, 5),
    "batch_norm_matching_backward": (5, 6),
    "add_normalize_": (0, 2, 5),
    "normalize_backward_": (0, 3),
    "pixel_gradient": (4, 5, 8),
    "add_normalize_rows_": (0, 2, 4, 6),
    "normalize_backward_rows_": (0, 3, 4),
    "final_norm_": (0, 2, 3, 4, 7, 8),
    "final_norm_backward_": (0, 2, 3, 4),
    "gelu_": (1,),
    "linear_gelu_": (2,),
    "swiglu_": (1,),
    "rotate_": (1, 2),
    "rotate_backward_": (2,),
    "attend_": (1,),
    "attend_backward_": (2,),
    "attend_rows": (0, 1, 2),
    "attend_rows_backward": (0, 1, 2, 3, 4),
}

# The arguments that are float64 whatever the data type of the others, by position.
DOUBLE = {"adam_clamp_": (5,), "rows_at": (2,)}

# The dimension along which a result stacks quantities of different size; each has its own budget.
STACKED = {"total_variation": 0, "gather_attention_backward": 2, "attend_backward_": 2}


class WrongResult(ArithmeticError):
    """A kernel computes something else than the reference."""


@dataclass(frozen=True)
class OpCall:
    """One call of an op.

    Attributes:
        label: tells calls of the same op apart.
        op: name of the op; the gradient of an op has a name of its own.
        arguments: of the op, on the CPU; floating point tensors are float32, or of :data:`DOUBLE`.
    """

    label: str
    op: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self.arguments if isinstance(value, Tensor)]

    @property
    def size(self) -> AttentionSize | None:
        """The size of a call of gather_attention, which backends may have limits for."""
        if not self.op.startswith("gather_attention"):
            return None
        gradient = self.op.endswith("_backward")
        qkv, token_index = self.arguments[gradient : gradient + 2]
        tokens = (qkv if token_index is None else token_index).shape[1]
        return AttentionSize(tokens, qkv.shape[4], gradient)

    def fits(self, backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a backend that runs the op can hold this call."""
        size = self.size
        return size is None or backend.too_large(size, device, dtype) is None

    def noise(self, backend: Backend, device: torch.device, dtype: torch.dtype) -> float:
        """The noise of float32 sums that the budget allows a backend that runs the call.

        Triton leaves sets of tokens that one program can't hold to PyTorch's fused attention.
        """
        if backend.name != "triton" or self.size is None:
            return NOISE
        kernels = importlib.import_module("smi_fast.kernels.gather_attention")
        gradient = self.size.gradient
        qkv, token_index = self.arguments[gradient : gradient + 2]
        like = torch.empty_like(qkv, dtype=dtype, device=device)
        return NOISE if kernels.fits(like, token_index, backward=gradient) else SDPA_NOISE

    def converted(self, dtype: torch.dtype, device: str = "cpu") -> OpCall:
        """The call for tensors of another data type."""
        types = dict.fromkeys(STATISTICS.get(self.op, ()), reference.sum_dtype(dtype))
        types |= dict.fromkeys(DOUBLE.get(self.op, ()), torch.float64)
        arguments = tuple(
            _convert(value, types.get(i, dtype), device) for i, value in enumerate(self.arguments)
        )
        return replace(self, arguments=arguments)

    def run(self, functions: Any) -> list[Tensor]:
        """The results, or the new values of the arguments that the op changes."""
        arguments = list(self.arguments)
        changed = CHANGED.get(self.op)
        if changed:
            arguments = [_copy(value) for value in arguments]
        results = getattr(functions, self.op)(*arguments)
        if changed:
            return [arguments[index] for index in changed if arguments[index] is not None]
        return [results] if isinstance(results, Tensor) else list(results)

    def errors(
        self, functions: Any, dtype: torch.dtype, device: str = "cpu", noise: float = NOISE
    ) -> Iterator[Error]:
        """The errors of all results; the exact results come from the rounded arguments.

        Raises:
            WrongResult: a result of another shape or data type, or a copy that isn't one.
        """
        rounded = self.converted(dtype, device)
        results = zip(
            rounded.run(functions),
            rounded.run(SPECIFICATION),
            rounded.converted(torch.float64, device).run(SPECIFICATION),
            strict=True,
        )
        for ours, eager, exact in results:
            if ours.shape != exact.shape or ours.dtype != eager.dtype:
                raise WrongResult(
                    f"{self}: expected {eager.dtype} {list(exact.shape)}, "
                    f"got {ours.dtype} {list(ours.shape)}"
                )
            if self.op in EXACT or not ours.is_floating_point():
                if not torch.equal(ours, eager):
                    raise WrongResult(f"{self} isn't a copy")
            elif exact.numel():
                stacked = zip(*map(self._parts, (ours, eager, exact)), strict=True)
                for our_part, eager_part, exact_part in stacked:
                    yield from errors(our_part, eager_part, exact_part, noise)

    def _parts(self, result: Tensor) -> tuple[Tensor, ...]:
        dimension = STACKED.get(self.op)
        return (result,) if dimension is None else result.unbind(dimension)

    def check(self, functions: Any, dtype: torch.dtype, device: str = "cpu") -> None:
        """Compares the results with the reference.

        Raises:
            WrongResult: a result is out of its budget.
        """
        for error in self.errors(functions, dtype, device):
            if not error.allowed:
                raise WrongResult(f"{self} in {dtype}: {error}")


def _convert(value: Any, dtype: torch.dtype, device: str) -> Any:
    """The value in another data type and place; an expanded tensor stays expanded."""
    if not isinstance(value, Tensor):
        return value
    wanted = dtype if value.is_floating_point() else value.dtype
    if value.numel() and 0 in value.stride():
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
        return value[once].to(device, wanted).expand_as(value)
    return value.to(device, wanted)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def random_kept(batch: int, count: int, total: int) -> Tensor:
    """Ascending distinct patches [batch, count], another set for each image."""
    return torch.stack([torch.randperm(total)[:count].sort().values for _ in range(batch)])


def strided(tensor: Tensor) -> Tensor:
    """The same values with the dimensions reversed in memory, and NaN or -1 between elements."""
    first, *others = tensor.shape
    filler = torch.nan if tensor.is_floating_point() else -1
    memory = tensor.new_full((*reversed(others), 2 * first), filler)
    return memory[..., 1::2].permute(*reversed(range(tensor.dim()))).copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """Equal images of a batch that share their memory."""
    return tensor[:1].expand_as(tensor)
