"""Read the graph of an ONNX file: ports, operations, and where each weight lies; no weights.

A small reader of the protobuf wire format, which trusts nothing: every length is checked against what is there, every
weight against the size of its file. Source: `onnx.proto3` of the ONNX project.
"""

from __future__ import annotations

import math
import mmap
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgelm.errors import ModelFileError, ModelNotFound, UnsupportedModel
from edgelm.files.errors import BadHeader, BadTensor, MissingPart, NotAModelFile, TruncatedFile
from edgelm.files.graph import ITEM_BITS, Graph, Node, Port, Weight

_TYPES = (
    "", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16", "float64",
    "uint32", "uint64", "complex64", "complex128", "bfloat16", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2",
    "float8e5m2fnuz", "uint4", "int4", "float4e2m1", "float8e8m0", "uint2", "int2",
)  # fmt: skip
MAX_NODES, MAX_DEPTH = 200_000, 8
MAX_ITEMS = 2**40
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TYPED_DATA_BYTES = {4: 4, 5: 1, 7: 1, 10: 8, 11: 1}
"""Fields with numbers of a tensor, and the fewest bytes that one of them takes."""
Field = int | memoryview
_HINT = "download the whole folder"


class _Damaged(Exception):
    """The bytes contradict themselves; the message says how."""


def read_graph(path: Path) -> Graph:
    """Return the graph of the ONNX file at `path`.

    Raises `ModelNotFound`, `UnsupportedModel`, or a subclass of `ModelFileError` that says what is wrong.
    """
    data = _mapped(path)
    try:
        graphs = [_message(value) for number, value in _fields(data) if number == 7]
        if len(graphs) != 1:
            raise NotAModelFile(path, f"this is not an ONNX model: it holds {len(graphs)} graphs", _HINT)
        return _Reader(path).graph(graphs[0])
    except _Damaged as error:
        raise BadHeader(path, f"the graph is damaged ({error})") from None


def _mapped(path: Path) -> memoryview:
    """Map a file for reading: of a file with the weights inside, only the pages around them are touched."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise NotAModelFile(path, "this is not a file", _HINT)
        if status.st_size == 0:
            raise NotAModelFile(path, "the file is empty (0 bytes)")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: there is no such file; {_HINT}") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"the file cannot be read: {error}", "check the path and its permissions") from None


def _fields(data: memoryview) -> Iterator[tuple[int, Field]]:
    """Yield number and value of each field of a message; groups are refused."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        value: Field
        if kind == _VARINT:
            value, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if size > end - at:
                raise _Damaged(f"{size} bytes are promised where {end - at} are left")
            value, at = data[at : at + size], at + size
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            if size > end - at:
                raise _Damaged("it ends inside a number")
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        else:
            raise _Damaged(f"a field is of the unknown kind {kind}")
        yield tag >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Damaged("it ends inside a number" if at >= len(data) else "a number is too long")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


class _External(NamedTuple):
    location: str
    offset: int
    length: int | None


class _Reader:
    """Collects what one file says. Weights of inner graphs and constants count among the others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, tuple[int, Path, int]] = {}
        self._weights: dict[str, Weight] = {}
        self._nodes: list[Node] = []

    def graph(self, data: memoryview) -> Graph:
        inputs, outputs = self._walk(data, 0)
        # older files list their weights among the inputs
        ports = {name: port for name, port in inputs.items() if name not in self._weights}
        files = tuple(path for _, path, _ in self._files.values())
        return Graph(self._path, ports, outputs, self._weights, tuple(self._nodes), files)

    def _walk(self, data: memoryview, depth: int) -> tuple[dict[str, Port], dict[str, Port]]:
        if depth > MAX_DEPTH:
            raise _Damaged(f"graphs are nested more than {MAX_DEPTH} deep")
        inputs: dict[str, Port] = {}
        outputs: dict[str, Port] = {}
        for number, value in _fields(data):
            if number not in (1, 5, 11, 12, 15):
                continue
            message = _message(value)
            if number == 1:
                self._node(message, depth)
            elif number == 5:
                self._weight(message)
            elif number == 15:
                raise UnsupportedModel(f"{self._path}: the graph holds sparse weights, which edgelm does not run")
            else:
                port = _port(message)
                (inputs if number == 11 else outputs)[port.name] = port
        return inputs, outputs

    def _node(self, data: memoryview, depth: int) -> None:
        names: dict[int, list[str]] = {1: [], 2: []}
        op, numbers = "", {}
        attributes: list[memoryview] = []
        for number, value in _fields(data):
            if number in names:
                names[number].append(_text(value))
            elif number == 4:
                op = _text(value)
            elif number == 5:
                attributes.append(_message(value))
        for attribute in attributes:
            name, whole, tensor, graphs = _attribute(attribute)
            if whole is not None:
                numbers[name] = whole
            if tensor is not None and op == "Constant" and names[2]:
                self._weight(tensor, names[2][0])
            for inner in graphs:
                self._walk(inner, depth + 1)
        if len(self._nodes) >= MAX_NODES:
            raise _Damaged(f"the graph has more than {MAX_NODES} operations")
        self._nodes.append(Node(op, tuple(names[1]), tuple(names[2]), numbers))

    def _weight(self, data: memoryview, name: str = "") -> None:
        shape: list[int] = []
        kind, raw, typed, location = 0, None, 0, 0
        external: dict[str, str] = {}
        for number, value in _fields(data):
            if number == 1:
                shape.extend(_integers(value))
            elif number == 2:
                kind = _whole(value)
            elif number == 8:
                name = name or _text(value)
            elif number == 9:
                raw = _message(value)
            elif number == 13:
                external.update([_entry(_message(value))])
            elif number == 14:
                location = _whole(value)
            elif number in _TYPED_DATA_BYTES:
                typed += len(value) // _TYPED_DATA_BYTES[number] if isinstance(value, memoryview) else 1
        type_name = _type(kind)
        if type_name not in ITEM_BITS:
            if type_name == "string":
                return  # of attributes only: no operation computes with texts as weights
            raise BadTensor(self._path, f"the weight {name[:80]!r} is of the unknown type {kind}")
        n_items = math.prod(shape)
        if min(shape, default=1) < 0 or n_items > MAX_ITEMS:
            raise BadTensor(self._path, f"the weight {name[:80]!r} has an impossible shape")
        n_bytes = -(-n_items * ITEM_BITS[type_name] // 8)
        file, offset = -1, 0
        if location == 1 or external:
            file, offset = self._placed(name, external, n_bytes)
        elif (raw is not None and len(raw) != n_bytes) or (raw is None and typed < min(n_items, 1)):
            held = len(raw) if raw is not None else 0
            raise BadTensor(self._path, f"the weight {name[:80]!r} needs {n_bytes} bytes and the file holds {held}")
        if name in self._weights:
            raise BadTensor(self._path, f"two weights have the name {name[:80]!r}")
        self._weights[name] = Weight(name, type_name, tuple(shape), n_bytes, file, offset)

    def _placed(self, name: str, external: dict[str, str], n_bytes: int) -> tuple[int, int]:
        """Return file number and offset of a weight in another file, both checked."""
        try:
            offset, length = (int(external.get(key, default)) for key, default in (("offset", "0"), ("length", "-1")))
        except ValueError:
            raise BadTensor(self._path, f"the place of the weight {name[:80]!r} is not a number") from None
        number, path, file_bytes = self._file(external.get("location", ""))
        if length not in (-1, n_bytes):
            raise BadTensor(self._path, f"the weight {name[:80]!r} needs {n_bytes} bytes and {length} are promised")
        if offset < 0 or offset + n_bytes > file_bytes:
            raise TruncatedFile(
                path, f"the file has {file_bytes} bytes, the weight {name[:80]!r} ends at {offset + n_bytes}"
            )
        return number, offset

    def _file(self, location: str) -> tuple[int, Path, int]:
        if location not in self._files:
            if not location or Path(location).name != location or "\\" in location or ":" in location:
                raise BadHeader(self._path, f"weights are said to be in {location[:80]!r}, not a file of this folder")
            path = self._path.with_name(location)
            try:
                status = path.stat()
            except (OSError, ValueError):
                raise MissingPart(self._path, f"its weights are in {location}, which is not beside it", _HINT) from None
            if not stat.S_ISREG(status.st_mode):
                raise NotAModelFile(path, "this is not a file", _HINT)
            self._files[location] = len(self._files), path, status.st_size
        return self._files[location]


def _attribute(data: memoryview) -> tuple[str, int | None, memoryview | None, list[memoryview]]:
    """Return name, whole number, tensor and graphs of an attribute, as far as it has them."""
    name, whole, tensor = "", None, None
    graphs: list[memoryview] = []
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 3:
            whole = _signed(_whole(value))
        elif number == 5:
            tensor = _message(value)
        elif number in (6, 11):
            graphs.append(_message(value))
    return name, whole, tensor, graphs


def _port(data: memoryview) -> Port:
    name, kind = "", 0
    shape: list[int] = []
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for _, tensor in (field for field in _fields(_message(value)) if field[0] == 1):
                for part, content in _fields(_message(tensor)):
                    if part == 1:
                        kind = _whole(content)
                    elif part == 2:
                        shape = [_dimension(_message(dim)) for at, dim in _fields(_message(content)) if at == 1]
    return Port(name, _type(kind), tuple(shape))


def _dimension(data: memoryview) -> int:
    return max((_signed(_whole(value)) for number, value in _fields(data) if number == 1), default=0)


def _entry(data: memoryview) -> tuple[str, str]:
    texts = {number: _text(value) for number, value in _fields(data)}
    return texts.get(1, ""), texts.get(2, "")


def _integers(value: Field) -> list[int]:
    """Return the numbers of a field that may be packed."""
    if isinstance(value, int):
        return [_signed(value)]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(_signed(number))
    return numbers


def _type(kind: int) -> str:
    return _TYPES[kind] if 0 <= kind < len(_TYPES) else ""


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _whole(value: Field) -> int:
    if not isinstance(value, int):
        raise _Damaged("text stands where a number belongs")
    return value


def _message(value: Field) -> memoryview:
    if not isinstance(value, memoryview):
        raise _Damaged("a number stands where a part of the graph belongs")
    return value


def _text(value: Field) -> str:
    try:
        return bytes(_message(value)).decode()
    except UnicodeDecodeError:
        raise _Damaged("a name is not UTF-8 text") from None
