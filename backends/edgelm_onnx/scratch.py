"""The temporary memory of a pass: where values between pieces lie, and what ONNX Runtime allocates inside one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from edgelm.engine.backend import PassShape
from edgelm.engine.ir import Segment
from edgelm_onnx.kernels import ALIGNMENT, Form
from edgelm_onnx.layout import floats_bytes
from edgelm_onnx.lowering import Lowered
from edgelm_onnx.memory import SEARCH_BYTES, Bytes
from edgelm_onnx.pieces import Piece, Pieces
from edgelm_onnx.runtime import ARENA_BYTES, ARENA_SHARE

FRAGMENTED = 8
"""One part in so many of what a run allocates is lost between blocks."""
BLOCK_BYTES = 128
"""What an allocation takes beside its bytes."""


class Places(NamedTuple):
    """Offsets of the values that pieces hand to each other, in one block of `n_bytes`."""

    offsets: Mapping[int, int]
    n_bytes: int


def places(pieces: Pieces, segment: Segment, shape: PassShape) -> Places:
    """Give every value that lives between two pieces a place that no other value needs meanwhile."""
    bound = {*segment.inputs, *segment.outputs}
    last = {value: i for i, piece in enumerate(pieces.pieces) for value in piece.inputs}
    offsets: dict[int, int] = {}
    living: list[tuple[int, int, int]] = []  # offset, end, value
    total = 0
    for i, piece in enumerate(pieces.pieces):
        for value in piece.outputs:
            if value in bound:
                continue
            described = pieces.values[value]
            size = aligned(4 * shape.rows(described.per) * described.width)
            start = 0
            for other_start, other_end, _ in sorted(living):
                if start + size <= other_start:
                    break
                start = max(start, other_end)
            offsets[value] = start
            living.append((start, start + size, value))
            total = max(total, start + size)
        living = [place for place in living if last.get(place[2], -1) > i]
    return Places(offsets, total)


def graph_bytes(piece: Piece, lowered: Lowered | None, shape: PassShape) -> int:
    """Return what a piece needs beside the values that are bound: to run, or once to be made, whichever is more.

    `lowered` is None for pieces that NumPy computes.
    """
    op = piece.segment.ops[0]
    if op.kind == "left_over":
        return 8 * op.weights[0].rows * op.weights[0].width
    if lowered is None:
        return 12 * piece.segment.values[op.output].width * (_ROWS_AT_ONCE if op.kind == "embed" else 0)
    running = _running_bytes(lowered, shape)
    running += running // FRAGMENTED + max(ARENA_BYTES, 2 * running) // ARENA_SHARE
    return max(running, _making_bytes(lowered))


_ROWS_AT_ONCE = 64


def _running_bytes(lowered: Lowered, shape: PassShape) -> int:
    sizes = {name: of(shape) + BLOCK_BYTES for name, of in lowered.temporaries.items()}
    last = {name: i for i, node in enumerate(lowered.nodes) for name in (*node.outputs, *node.inputs)}
    live: dict[str, int] = {}
    most = 0
    for i, node in enumerate(lowered.nodes):
        for name in node.outputs:
            live[name] = sizes.get(name, 0)
        most = max(most, sum(live.values()) + sum(sizes.get(f"{name}!", 0) for name in node.outputs))
        live = {name: size for name, size in live.items() if last[name] > i}
    return most


def _making_bytes(lowered: Lowered) -> int:
    """Return what packing the stand-ins of all products takes, before it is given back.

    ONNX Runtime copies the codes before it packs them; then packed bytes are copied to be recognized.
    """
    forms = [product.form for product in lowered.products.values()]
    if not forms:
        return 0
    codes, floats = sum(form.code_bytes for form in forms), sum(_floats(form) for form in forms)
    searching = 2 * max(form.code_bytes for form in forms) + SEARCH_BYTES
    return codes + floats + sum({4 * form.n_scales for form in forms}) + max(codes, searching)


def _floats(form: Form) -> int:
    return form.n_scales * floats_bytes(form.bits, form.block)


class Scratch:
    """One block of memory that programs share."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)

    def at_least(self, n_bytes: int) -> int:
        """Return the address of the block, which moves when it must grow."""
        if len(self._memory) < n_bytes + ALIGNMENT:
            self._memory = np.empty(n_bytes + ALIGNMENT, np.uint8)
        address = int(self._memory.ctypes.data)
        return address + -address % ALIGNMENT

    def release(self) -> None:
        self._memory = np.empty(0, np.uint8)


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
