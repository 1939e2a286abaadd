"""What the work of a pass costs on a device of the table: *simulated* times. Pure."""

from __future__ import annotations

from typing import NamedTuple

from edgelm.engine.backend import PassShape
from edgelm.engine.ir import AttendSpec, Op, Segment
from edgelm_npu.devices import NpuDevice
from edgelm_npu.lowering import Stage, Work, padded, stages, work_of
from edgelm_npu.numbers import n_outliers
from edgelm_npu.schedule import Task, in_order, out_of_order

FLOAT_BYTES, HALF_BYTES = 4, 2
OPERATIONS = 10
"""Float operations for each number of a norm, an activation or a rotation."""


def tasks(
    work: tuple[Work, ...], parts: tuple[Stage, ...], segment: Segment, shape: PassShape, device: NpuDevice
) -> list[Task]:
    """Return what each piece of work costs, for `schedule`."""
    known: dict[tuple[int, str, int], float] = {}
    priced = []
    for one in work:
        key = one.stage, one.part, one.rows
        if key not in known:
            known[key] = sum(_seconds(op, one, segment, shape, device) for op in parts[one.stage].ops)
            known[key] += device.start_s if one.part == "npu" else 0.0
        priced.append(Task("npu" if one.part == "npu" else "cpu", known[key], one.after))
    return priced


def _seconds(op: Op, work: Work, segment: Segment, shape: PassShape, device: NpuDevice) -> float:
    rows = work.rows
    if op.kind == "linear":
        width, outputs = op.weights[0].width, op.weights[0].rows
        if work.part == "npu":
            return device.product_s(padded(rows), width, outputs)
        channels = n_outliers(width)
        read = min(rows * channels, width) * outputs  # each row has channels of its own
        return device.float_s(2.0 * rows * channels * outputs, FLOAT_BYTES * rows * outputs + read)
    numbers = rows * sum(segment.values[value].width for value in (*op.inputs, op.output))
    if isinstance(op.params, AttendSpec):
        spec, length = op.params, shape.groups[op.params.group].length
        dims = spec.head_dim_k + spec.head_dim_v
        operations = 2.0 * rows * length * spec.n_heads * dims
        return device.float_s(operations, HALF_BYTES * length * spec.n_kv_heads * dims + FLOAT_BYTES * numbers)
    return device.float_s(OPERATIONS * numbers, FLOAT_BYTES * numbers)


class Prediction(NamedTuple):
    """Simulated seconds of a pass, with tasks in the order given and out of order, and how long each side is busy."""

    in_order_s: float
    seconds: float
    npu_s: float
    cpu_s: float


def predict(segment: Segment, shape: PassShape, device: NpuDevice) -> Prediction:
    """Return how long a pass would take on a device of the table, every weight in memory."""
    parts = stages(segment)
    priced = tasks(work_of(parts, shape.n_tokens, shape.n_outputs), parts, segment, shape, device)
    npu_s, cpu_s = (sum(task.seconds for task in priced if task.processor == name) for name in ("npu", "cpu"))
    before_s, after_s = (schedule(priced, device.sync_s).seconds for schedule in (in_order, out_of_order))
    return Prediction(before_s, after_s, npu_s, cpu_s)
