"""Write ONNX models as protobuf bytes: the few fields that graphs for one runtime need.

A writer of our own because the package `onnx` costs 25 MB of memory and a quarter of a second; tests compare the two.
Knows no operator. Field numbers: `onnx.proto` of ONNX, IR version 10.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IR_VERSION = 10
OPSETS = {"": 21, "com.microsoft": 1}

FLOAT, UINT8, INT32, INT64, FLOAT16, BFLOAT16 = 1, 2, 6, 7, 10, 16
"""Element types, as ONNX numbers them."""
_ELEMENT_OF = {"float32": FLOAT, "uint8": UINT8, "int32": INT32, "int64": INT64, "float16": FLOAT16}

Attribute = int | float | str | Sequence[int]
Dim = int | str


class Node(NamedTuple):
    """One operator. `domain` is "" for ONNX's own."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = {}
    domain: str = ""


class Port(NamedTuple):
    """An input or output of the graph; a dimension may be a name."""

    name: str
    element: int
    shape: tuple[Dim, ...]


class Stand(NamedTuple):
    """A constant whose bytes are given to the session apart from the model."""

    name: str
    element: int
    shape: tuple[int, ...]
    n_bytes: int


def model(
    nodes: Iterable[Node],
    inputs: Iterable[Port],
    outputs: Iterable[Port],
    constants: Mapping[str, NDArray[np.generic]],
    stands: Iterable[Stand],
) -> bytes:
    """Return a model of one graph. `constants` are written into it, `stands` only by name and shape."""
    graph = b"".join(_field(1, _node(node)) for node in nodes) + _text(2, "edgelm")
    graph += b"".join(_field(5, _tensor(name, array)) for name, array in constants.items())
    graph += b"".join(_field(5, _stand(stand)) for stand in stands)
    graph += b"".join(_field(11, _port(port)) for port in inputs)
    graph += b"".join(_field(12, _port(port)) for port in outputs)
    opsets = b"".join(_field(8, _text(1, domain) + _int(2, version)) for domain, version in OPSETS.items())
    return _int(1, IR_VERSION) + opsets + _field(7, graph)


def _node(node: Node) -> bytes:
    parts = [_text(1, name) for name in node.inputs]
    parts += [_text(2, name) for name in node.outputs]
    parts += [_text(4, node.op)]
    parts += [_field(5, _attribute(name, value)) for name, value in node.attributes.items()]
    parts += [_text(7, node.domain)]
    return b"".join(parts)


def _attribute(name: str, value: Attribute) -> bytes:
    head = _text(1, name)
    if isinstance(value, int):
        return head + _int(3, value) + _int(20, 2)
    if isinstance(value, float):
        return head + b"\x15" + struct.pack("<f", value) + _int(20, 1)
    if isinstance(value, str):
        return head + _text(4, value) + _int(20, 3)
    return head + b"".join(_int(8, item) for item in value) + _int(20, 7)


def _tensor(name: str, array: NDArray[np.generic]) -> bytes:
    dims = b"".join(_int(1, dim) for dim in array.shape)
    return dims + _int(2, _ELEMENT_OF[array.dtype.name]) + _text(8, name) + _field(9, array.tobytes())


def _stand(stand: Stand) -> bytes:
    dims = b"".join(_int(1, dim) for dim in stand.shape)
    where = {"location": "edgelm", "offset": "0", "length": str(stand.n_bytes)}
    entries = b"".join(_field(13, _text(1, key) + _text(2, value)) for key, value in where.items())
    return dims + _int(2, stand.element) + _text(8, stand.name) + entries + _int(14, 1)


def _port(port: Port) -> bytes:
    dims = (_text(2, dim) if isinstance(dim, str) else _int(1, dim) for dim in port.shape)
    shape = b"".join(_field(1, dim) for dim in dims)
    return _text(1, port.name) + _field(2, _field(1, _int(1, port.element) + _field(2, shape)))


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode())


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
