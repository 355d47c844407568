"""Reads the weights of an ONNX file: the few fields of its protocol buffers that hold them.

A message is a sequence of fields, each with a number and a value: a whole number, or bytes, which
may be a message again. The numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_KIND = 1, 2, 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_INTS, TENSOR_NAME, TENSOR_RAW = 1, 2, 4, 5, 8, 9
FLOAT, INT8 = 1, 3
DTYPES = {FLOAT: torch.float32, INT8: torch.int8}

Value = int | memoryview
Message = dict[int, list[Value]]


def read(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a graph whose linear layers are quantised to int8.

    Returns:
        the tensors of float32 and int8 by name; and for each integer product, the name of its
        output and that of its weight.
    """
    (graph,) = map(_message, _bytes(_message(memoryview(data))[MODEL_GRAPH]))
    tensors = dict(
        named for part in _bytes(graph[GRAPH_INITIALIZER]) if (named := _tensor(_message(part)))
    )
    nodes = map(_message, _bytes(graph[GRAPH_NODE]))
    products = {
        _text(node[NODE_OUTPUT][0]): _text(node[NODE_INPUT][1])
        for node in nodes
        if _text(node[NODE_KIND][0]) == "MatMulInteger"
    }
    return tensors, products


def _tensor(message: Message) -> tuple[str, Tensor] | None:
    """Name and value, or None for a data type that no weight has."""
    (kind,) = message[TENSOR_TYPE]
    if kind not in DTYPES:
        return None
    shape = [size for size in message[TENSOR_DIMS] if isinstance(size, int)]
    if message[TENSOR_RAW]:
        (raw,) = _bytes(message[TENSOR_RAW])
        value = torch.frombuffer(bytearray(raw), dtype=DTYPES[kind])
    elif kind == FLOAT:
        floats = b"".join(_bytes(message[TENSOR_FLOATS]))
        value = torch.frombuffer(bytearray(floats), dtype=torch.float32)
    else:
        value = torch.tensor([_signed(n) for n in _numbers(message[TENSOR_INTS])]).to(torch.int8)
    return _text(message[TENSOR_NAME][0]), value.reshape(shape)


def _message(data: memoryview) -> Message:
    """The fields of a message by number."""
    found: Message = defaultdict(list)
    for number, value in _fields(data):
        found[number].append(value)
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    number = shift = 0
    while True:
        group, at = data[at], at + 1
        number |= (group & 0x7F) << shift
        shift += 7
        if group < 0x80:
            return number, at


def _numbers(values: list[Value]) -> Iterator[int]:
    """Whole numbers, which may be packed into bytes."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _bytes(values: list[Value]) -> list[memoryview]:
    return [value for value in values if isinstance(value, memoryview)]


def _text(value: Value) -> str:
    assert isinstance(value, memoryview)
    return bytes(value).decode()
