"""Decide which weights stay in memory, which are streamed, and where every byte of the budget goes.

Pure: no file, clock or thread. The window carries a plan out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.files.gguf import TensorInfo
from edgelm.memory.units import Unit, make_units, smallest_slot
from edgelm.sizes import MB, human

N_SLOTS = 4
SLOT_SHARE = 0.0125
"""Share of the weight budget that one slot takes: four of them take 5 %."""
CHUNK_SHARE = 0.04
"""Share of the free budget that wider prompt passes may take from the weights: a few dozen tokens hide the reads."""
RESIDENT_CHUNK = 16
"""Keeping everything is not worth prompt passes narrower than this."""
MIN_SLOT_BYTES, MAX_SLOT_BYTES = 1 * MB, 8 * MB


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device was measured to do: bytes a second from flash, and of weights through the kernels.

    `pass_overhead_s`: what a pass of one token takes beside its weights. `simulated`: the device whose flash it is, if
    not this one's.
    """

    flash_bytes_per_s: float
    compute_bytes_per_s: float
    pass_overhead_s: float = 0.0
    simulated: str | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """Everything but matrices that lives in memory, in bytes. `scratch` etc. belong to passes of `chunk` tokens."""

    process_bytes: int
    constants_bytes: int
    kv_bytes: int
    chunk: int
    scratch_bytes: int
    state_bytes: int
    reserve_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(n_bytes for _, n_bytes in self.items())

    def items(self) -> tuple[tuple[str, int], ...]:
        return (
            ("interpreter, libraries and tokenizer", self.process_bytes),
            ("norms and biases", self.constants_bytes),
            ("KV cache", self.kv_bytes),
            ("scratch of the backend", self.scratch_bytes),
            ("activations, masks and logits", self.state_bytes),
            ("reserve", self.reserve_bytes),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays, what streams, and where every byte goes.

    `pinned` and `streamed` index `units`, which are in pass order. A decode pass uses `pass_bytes` of weights and
    reads `streamed_bytes` of them from flash. `predicted_decode_tps` is the smaller of what compute and flash allow,
    0 if the device was not measured. `simulated` names the device that was simulated, if any.
    """

    budget_bytes: int
    context: int
    demand: Demand
    units: tuple[Unit, ...]
    pinned: frozenset[int]
    slot_bytes: int
    n_slots: int
    predicted_decode_tps: float = 0.0
    simulated: str | None = None

    def __post_init__(self) -> None:
        if self.planned_bytes > self.budget_bytes:
            raise ConfigError(f"a plan of {self.planned_bytes} bytes exceeds its budget of {self.budget_bytes}")

    @property
    def chunk(self) -> int:
        """Tokens a prompt pass takes at the most."""
        return self.demand.chunk

    @property
    def streamed(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.units)) if i not in self.pinned)

    @property
    def pinned_bytes(self) -> int:
        return sum(self.units[i].span_bytes for i in self.pinned)

    @property
    def slots_bytes(self) -> int:
        return self.slot_bytes * self.n_slots

    @property
    def pass_bytes(self) -> int:
        return sum(unit.n_bytes for unit in self.units)

    @property
    def streamed_bytes(self) -> int:
        return sum(self.units[i].span_bytes for i in self.streamed)

    @property
    def planned_bytes(self) -> int:
        return self.demand.total_bytes + self.pinned_bytes + self.slots_bytes

    def items(self) -> tuple[tuple[str, int], ...]:
        """Every part of the budget by name; what is left is `unused`."""
        items = (*self.demand.items(), ("weights pinned", self.pinned_bytes), ("slots for streaming", self.slots_bytes))
        return (*items, ("unused", self.budget_bytes - self.planned_bytes))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "budget_bytes": self.budget_bytes,
            "context": self.context,
            "chunk": self.chunk,
            "items": dict(self.items()),
            "pass_bytes": self.pass_bytes,
            "pinned_bytes": self.pinned_bytes,
            "streamed_bytes_per_pass": self.streamed_bytes,
            "slot_bytes": self.slot_bytes,
            "n_slots": self.n_slots,
            "units": len(self.units),
            "units_pinned": len(self.pinned),
            "predicted_decode_tps": self.predicted_decode_tps,
            "simulated": self.simulated,
        }

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.items())
        lines = [f"budget {human(self.budget_bytes)}, context {self.context}, prompt passes of {self.chunk} tokens", ""]
        lines += [f"  {name:<{width}}  {human(n_bytes):>8}" for name, n_bytes in self.items()]
        kept = sum(self.units[i].n_bytes for i in self.pinned)
        share = 100 * kept / self.pass_bytes if self.pass_bytes else 100.0
        lines += ["", f"a pass uses {human(self.pass_bytes)} of weights: {share:.0f} % stay in memory, "]
        lines[-1] += f"{human(self.streamed_bytes)} are read from flash" if self.streamed else "nothing is streamed"
        if self.predicted_decode_tps:
            lines.append(f"predicted decode: {self.predicted_decode_tps:.1f} tokens/s")
        if self.simulated:
            lines.append(f"simulated flash of {self.simulated}; the processor is this machine's own, not slowed down")
        return "\n".join(lines)


def make_plan(
    matrices: Sequence[TensorInfo],
    demands: Sequence[Demand],
    budget_bytes: int,
    context: int,
    rates: Rates | None = None,
    streams: bool = True,
) -> Plan:
    """Return the plan for `matrices`, given in pass order.

    `demands` lists the possible prompt chunks from the largest to the smallest: the first is taken that costs at
    most `CHUNK_SHARE` of what is not fixed, or with which everything fits; in need, the last. `streams=False`: all or
    nothing. Raises `BudgetTooSmall` with the smallest budget that works.
    """
    whole = make_units(matrices, MAX_SLOT_BYTES)
    all_bytes = sum(unit.span_bytes for unit in whole)
    slot = smallest_slot(matrices)
    by_streaming = streams and 2 * slot < all_bytes
    for demand in demands:
        if demand.chunk < RESIDENT_CHUNK and by_streaming:
            break
        if demand.total_bytes + all_bytes <= budget_bytes:
            return _finish(budget_bytes, context, demand, whole, frozenset(range(len(whole))), 0, 0, rates)
    smallest = demands[-1]
    weights = ("two slots for streaming", 2 * slot) if by_streaming else ("weights, all resident", all_bytes)
    needed = smallest.total_bytes + weights[1]
    if budget_bytes < needed:
        raise BudgetTooSmall(budget_bytes, needed, (*smallest.items(), weights))
    demand = _choose_chunk(demands, budget_bytes, 2 * slot)
    weight_bytes = budget_bytes - demand.total_bytes
    if all_bytes <= weight_bytes:
        return _finish(budget_bytes, context, demand, whole, frozenset(range(len(whole))), 0, 0, rates)
    slot_bytes, n_slots = _slots(weight_bytes, slot)
    units = make_units(matrices, slot_bytes)
    slot_bytes = max(unit.span_bytes for unit in units)
    pinned = spread([unit.span_bytes for unit in units], weight_bytes - slot_bytes * n_slots)
    return _finish(budget_bytes, context, demand, units, pinned, slot_bytes, n_slots, rates)


def spread(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Choose which of `sizes` to keep in `room`, evenly over the pass, so that compute of the kept hides reads.

    A cyclic scan gains nothing from recency: a fixed subset is the best policy (TPI-LLM's block retention,
    arXiv:2410.00531). What evenness leaves over is filled with the largest that still fit.
    """
    total = sum(sizes)
    if total <= room:
        return frozenset(range(len(sizes)))
    kept: set[int] = set()
    used, passed = 0, 0
    for i, size in enumerate(sizes):
        passed += size
        if used + size <= min(room, passed * room / total + size / 2):
            kept.add(i)
            used += size
    for i in sorted(set(range(len(sizes))) - kept, key=lambda i: -sizes[i]):
        if used + sizes[i] <= room:
            kept.add(i)
            used += sizes[i]
    return frozenset(kept)


def _choose_chunk(demands: Sequence[Demand], budget_bytes: int, slots_bytes: int) -> Demand:
    smallest = demands[-1]
    for demand in demands:
        free = budget_bytes - smallest.total_bytes
        extra = demand.total_bytes - smallest.total_bytes
        if extra <= CHUNK_SHARE * free and demand.total_bytes + slots_bytes <= budget_bytes:
            return demand
    return smallest


def _slots(weight_bytes: int, smallest: int) -> tuple[int, int]:
    """Return slot size and number: small enough to leave the budget to pinned weights, large enough to read well."""
    wanted = min(max(int(weight_bytes * SLOT_SHARE), MIN_SLOT_BYTES), MAX_SLOT_BYTES)
    for n_slots in (N_SLOTS, 3, 2):
        slot_bytes = max(min(wanted, weight_bytes // n_slots), smallest)
        if slot_bytes * n_slots <= weight_bytes:
            return slot_bytes, n_slots
    return smallest, 2


def _finish(
    budget_bytes: int,
    context: int,
    demand: Demand,
    units: tuple[Unit, ...],
    pinned: frozenset[int],
    slot_bytes: int,
    n_slots: int,
    rates: Rates | None,
) -> Plan:
    plan = Plan(budget_bytes, context, demand, units, pinned, slot_bytes, n_slots)
    if rates is None:
        return plan
    compute_s = rates.pass_overhead_s + plan.pass_bytes / rates.compute_bytes_per_s
    seconds = max(compute_s, plan.streamed_bytes / rates.flash_bytes_per_s)
    return replace(plan, predicted_decode_tps=1 / seconds if seconds else 0.0, simulated=rates.simulated)
