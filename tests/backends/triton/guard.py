"""Triton's interpreter made trustworthy: what a kernel computes and touches, checked on the CPU.

The stock interpreter of Triton 3.8 computes bfloat16 on its raw bits and reads out of bounds in
silence. :func:`install` corrects it, where triton was first imported with ``TRITON_INTERPRET=1``:

* bfloat16 values are held in float32, and each new value is rounded to nearest even;
* a tf32 product of float32 operands loses the mantissa bits that the hardware drops;
* ``tl.dot`` refuses the shapes that a real target refuses;
* a lane that is masked out of a load without ``other`` is poison, not zero;
* every lane must fall on an element of a tensor argument;
* no program may store to an element that another program loads or stores, and no store may write
  an element twice; atomics are refused, because their order isn't fixed;
* the bytes that each program fetches and stores are counted, an element once for each program.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
NO_PROGRAM, SEVERAL = -1, -2
TF32_DROPPED = np.uint32(0x1FFF)


class OutOfBoundsError(IndexError):
    """A lane that isn't masked is outside of every tensor argument, or between two elements."""


class RaceError(RuntimeError):
    """The result depends on the order in which programs or lanes run."""


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16, ties to even; the result is float32."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32))


def drop_tf32(values: np.ndarray) -> np.ndarray:
    """Truncates the mantissa of float32 to the ten bits that tf32 keeps."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits & ~TF32_DROPPED).view(np.float32)


def _is_bfloat16(dtype: Any) -> bool:
    return not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16


@dataclass
class Shadow:
    """The programs that touched each byte of a range of memory in one launch."""

    start: int
    stop: int
    reader: np.ndarray = field(init=False)
    writer: np.ndarray = field(init=False)
    fetcher: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        # One entry a byte, so that tensors of two types can share a range.
        self.reader = np.full(self.stop - self.start, NO_PROGRAM, np.int32)
        self.writer = self.reader.copy()
        self.fetcher = self.reader.copy()


@dataclass
class Traffic:
    """Bytes that the programs of one launch fetched and stored."""

    kernel: str
    loaded: int = 0
    stored: int = 0


class Memory:
    """The tensor arguments of the running launch; ``launches`` holds the traffic of all of them."""

    def __init__(self) -> None:
        self.launches: list[Traffic] = []
        self.shadows: list[Shadow] = []
        self.patched: set[int] = set()

    def open(self, kernel: str, arguments: list[Any]) -> None:
        self.patched.clear()
        spans = sorted(_span(a) for a in arguments if isinstance(a, torch.Tensor) and a.numel())
        merged: list[list[int]] = []
        for start, stop in spans:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(stop, merged[-1][1])
            else:
                merged.append([start, stop])
        self.shadows = [Shadow(*span) for span in merged]
        self.launches.append(Traffic(kernel))

    def touch(self, pointers: Any, mask: np.ndarray, *, store: bool) -> None:
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        size = 2 if pointers.get_element_ty() == tl.bfloat16 else size
        lanes = np.broadcast_to(mask, pointers.data.shape)
        addresses = pointers.data[lanes].astype(np.int64)
        distinct = np.unique(addresses)
        if store and len(distinct) != len(addresses):
            raise RaceError("two lanes of one store write the same element")
        inside = 0
        for shadow in self.shadows:
            here = distinct[(distinct >= shadow.start) & (distinct + size <= shadow.stop)]
            inside += len(here)
            self._check(shadow, here - shadow.start, size, store)
        if inside != len(distinct):
            raise OutOfBoundsError(
                f"{len(distinct) - inside} elements out of bounds in "
                f"a {'store' if store else 'load'} of program {_program()}"
            )

    def _check(self, shadow: Shadow, at: np.ndarray, size: int, store: bool) -> None:
        if (at % size).any():
            raise OutOfBoundsError("an address lies between two elements")
        me = _program()
        readers, writers = shadow.reader[at], shadow.writer[at]
        clash = (writers != NO_PROGRAM) & (writers != me)
        if store:
            clash |= (readers != NO_PROGRAM) & (readers != me)
        if clash.any():
            raise RaceError(
                f"program {me} shares {clash.sum()} elements with a program that stores to them"
            )
        traffic = self.launches[-1]
        if store:
            traffic.stored += size * int((writers != me).sum())
            shadow.writer[at] = me
        else:
            # Programs run one after the other, so the last to fetch an element tells whether I did.
            traffic.loaded += size * int((shadow.fetcher[at] != me).sum())
            shadow.fetcher[at] = me
            shadow.reader[at] = np.where((readers == NO_PROGRAM) | (readers == me), me, SEVERAL)


MEMORY = Memory()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _program() -> int:
    (x, y, z), (_, ny, nz) = (
        interpreter.interpreter_builder.grid_idx,
        interpreter.interpreter_builder.grid_dim,
    )
    return int((x * ny + y) * nz + z)


def _masked_load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
    MEMORY.touch(pointers, mask.data, store=False)
    dtype = pointers.get_element_ty()
    stored = np.dtype(np.uint16) if dtype == tl.bfloat16 else interpreter._get_np_dtype(dtype)
    zeros = np.zeros(pointers.data.shape, stored)
    values = interpreter._interpreter.load(pointers.data, mask.data, zeros, stored)
    if dtype == tl.bfloat16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if other is not None:
        values = np.where(mask.data, values, other.data)
    elif not mask.data.all():
        floating = np.issubdtype(values.dtype, np.floating)
        poison = np.nan if floating else values.dtype == bool or np.iinfo(values.dtype).max
        values = np.where(mask.data, values, np.asarray(poison, values.dtype))
    return Handle(values.astype(interpreter._get_np_dtype(dtype), copy=False), dtype)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
    MEMORY.touch(pointers, mask.data, store=True)
    values = value.data
    if pointers.get_element_ty() == tl.bfloat16:
        values = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return interpreter._interpreter.store(pointers.data, values, mask.data)


def _atomic(self: Any, *_: Any) -> Any:
    raise RaceError(
        "an atomic: its order isn't fixed, so sums of floats would change from run to run"
    )


def _cast(self: Any, value: Any, dtype: Any, *_: Any) -> Any:
    return Handle(value.data.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)


def _bitcast(self: Any, value: Any, dtype: Any) -> Any:
    if _is_bfloat16(value.dtype) or _is_bfloat16(dtype):
        raise NotImplementedError("bitcast of bfloat16, which is held in float32 here")
    return Handle(value.data.view(interpreter._get_np_dtype(dtype)), dtype.scalar)


def _call(self: Any, *arguments: Any, **constants: Any) -> Any:
    # The stock one patches the language at every call, which is most of its time; once is enough.
    if id(self.fn.__globals__) not in MEMORY.patched:
        MEMORY.patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **constants)


def _dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, _: Any) -> Any:
    if min(*a.data.shape, b.data.shape[-1]) < 16:
        raise ValueError(f"tl.dot of {a.data.shape} and {b.data.shape}: sides are 16 at least")
    left, right = a.data.astype(np.float32), b.data.astype(np.float32)
    if a.dtype.scalar == tl.float32 and "IEEE" not in str(precision).upper():
        left, right = drop_tf32(left), drop_tf32(right)
    return Handle(np.matmul(left, right) + accumulator.data, accumulator.dtype.scalar)


def install() -> Memory:
    """Corrects the interpreter of this process for good."""
    np_dtype, check_size = interpreter._get_np_dtype, interpreter._validate_np_data_size
    make, run = Handle.__post_init__, interpreter.GridExecutor.__call__

    def np_dtype_of(dtype: Any) -> np.dtype:
        return np.dtype(np.float32) if _is_bfloat16(dtype) else np_dtype(dtype)

    def check_size_of(values: np.ndarray, dtype: Any) -> bool:
        return (_is_bfloat16(dtype) and values.itemsize <= 4) or check_size(values, dtype)

    def make_rounded(handle: Any) -> None:
        if _is_bfloat16(handle.dtype):
            handle.data = round_to_bfloat16(handle.data)
        make(handle)

    def run_guarded(executor: Any, *arguments: Any, **constants: Any) -> None:
        MEMORY.open(executor.fn.__name__, [*arguments, *constants.values()])
        with np.errstate(all="ignore"):
            run(executor, *arguments, **constants)

    interpreter._get_np_dtype, interpreter._validate_np_data_size = np_dtype_of, check_size_of
    Handle.__post_init__, interpreter.GridExecutor.__call__ = make_rounded, run_guarded
    Builder.create_masked_load, Builder.create_masked_store = _masked_load, _masked_store
    Builder.create_atomic_rmw = Builder.create_atomic_cas = _atomic
    Builder.cast_impl = Builder.create_fp_to_fp = _cast
    Builder.create_bitcast = Builder.create_int_to_ptr = Builder.create_ptr_to_int = _bitcast
    Builder.create_fabs = lambda self, value: self.unary_op(value, np.abs)
    Builder.create_dot = _dot
    interpreter.InterpretedFunction.__call__ = _call
    return MEMORY
