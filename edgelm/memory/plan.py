"""Decide which weights stay in memory, which are streamed, and where every byte of the budget goes.

Pure: no file, clock or thread. The window carries a plan out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.files.model import TensorInfo
from edgelm.memory.buffer import PAGE
from edgelm.memory.demanded import Demand as Demand
from edgelm.memory.predict import Rates, pass_s
from edgelm.memory.stores import span
from edgelm.memory.units import Unit, make_units, smallest_slot, split
from edgelm.sizes import MB, human

N_SLOTS = 4
SLOT_SHARE = 0.0125
"""Share of the weight budget that one slot takes: four of them take 5 %."""
CHUNK_SHARE = 0.04
"""Share of the free budget that wider prompt passes may take from the weights where the device was not measured."""
JOB_PROMPT, JOB_ANSWER = 256, 128
"""Tokens of the turn whose time the width of prompt passes is chosen for: reads are hidden behind a wide pass, but its
memory is taken from the weights that stay."""
RESIDENT_CHUNK = 16
"""Keeping everything is not worth prompt passes narrower than this."""
MIN_SLOT_BYTES, MAX_SLOT_BYTES = 1 * MB, 2 * MB
"""Four slots of 2 MB keep a flash busy; larger ones would only take memory from the weights that stay."""
RESIDENT_UNIT_BYTES = 8 * MB


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays, what streams, and where every byte goes.

    `pinned` and `streamed` index `units`, which are in pass order. A decode pass uses `pass_bytes` of weights and
    reads `streamed_bytes` of them from flash. Speeds are predicted from `rates`, and 0 if the device was not measured.
    `simulated` names the device that was simulated, if any.
    """

    budget_bytes: int
    context: int
    demand: Demand
    units: tuple[Unit, ...]
    pinned: frozenset[int]
    slot_bytes: int
    n_slots: int
    rates: Rates | None = None
    head: str = ""
    """The matrix that makes the logits."""
    adopts: bool = False
    """Weights that stay are copied by the backend, part by part."""
    prompts: Plan | None = None
    """How another backend computes the prompts, if one does; `demand.beside_bytes` is all that it takes."""

    def __post_init__(self) -> None:
        if self.planned_bytes > self.budget_bytes:
            raise ConfigError(f"a plan of {self.planned_bytes} bytes exceeds its budget of {self.budget_bytes}")

    @property
    def chunk(self) -> int:
        """Tokens a prompt pass takes at the most."""
        return self.demand.chunk

    @property
    def places(self) -> int:
        """Tokens that the cache holds: the context, or fewer where attention is approximate."""
        return self.demand.places or self.context

    @property
    def approximate(self) -> str | None:
        """What makes answers approximate, in a sentence; None if nothing does."""
        if self.demand.attention == "exact":
            return None
        spilled = " of each layer, on average" if self.demand.spill else ""
        return f"{self.demand.attention} attention: of a longer prompt {self.demand.n_kept} tokens are kept{spilled}"

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
    def staging_bytes(self) -> int:
        """Memory through which weights reach a backend that keeps copies of its own: slots, where there are some."""
        return _staging_bytes(self.units) if self.adopts and not self.slots_bytes else 0

    @property
    def pass_bytes(self) -> int:
        return sum(unit.n_bytes for unit in self.units)

    @property
    def streamed_bytes(self) -> int:
        return sum(self.units[i].span_bytes for i in self.streamed)

    @property
    def planned_bytes(self) -> int:
        return self.demand.total_bytes + self.pinned_bytes + self.slots_bytes + self.staging_bytes

    @property
    def predicted_decode_tps(self) -> float:
        """Tokens a second after the prompt; where keys and values are spilled, with a full context."""
        seconds = self.pass_s(1)
        if seconds and self.demand.spilled_bytes and self.rates:
            seconds += self.demand.spilled_bytes / self.rates.flash_bytes_per_s
        return 1 / seconds if seconds else 0.0

    @property
    def predicted_prefill_tps(self) -> float:
        """Tokens a second of a long prompt."""
        if self.prompts is not None:
            return self.prompts.predicted_prefill_tps
        seconds = self.pass_s(self.chunk, final=False)
        return self.chunk / seconds if seconds else 0.0

    @property
    def simulated(self) -> str | None:
        """What was simulated, by name: devices with slower flash, backends that only pretend to be a device."""
        parts = (self.rates, self.prompts.rates if self.prompts else None)
        named = [name for rates in parts if rates and rates.simulated for name in rates.simulated.split(", ")]
        return ", ".join(dict.fromkeys(named)) or None

    @property
    def published(self) -> bool:
        """Whether predictions rest on figures that others published of the device, not on measurements here."""
        return self.rates is not None and self.rates.published

    def predicted_ttft_s(self, n_prompt: int) -> float:
        """Seconds from a prompt of `n_prompt` tokens to the first token of the answer."""
        if self.prompts is not None:
            n_passes, rest = divmod(max(n_prompt - 1, 0), self.prompts.chunk)
            before_s = n_passes * self.prompts.pass_s(self.prompts.chunk)
            return before_s + (self.prompts.pass_s(rest) if rest else 0.0) + self.pass_s(1)
        n_before = max(n_prompt - 1, 0) // self.chunk
        rest = n_prompt - n_before * self.chunk
        return n_before * self.pass_s(self.chunk, final=False) + self.pass_s(rest)

    def pass_s(self, n_tokens: int, final: bool = True) -> float:
        """Return the predicted seconds of a pass of `n_tokens`; 0 if the device was not measured.

        Of the output head a pass computes one row, and none at all if it is not the last one of a prompt.
        """
        rates = self.rates
        if rates is None or not self.units or (self.streamed and not rates.flash_bytes_per_s):
            return 0.0
        compute, reads = [], []
        overhead = rates.overhead_s(n_tokens) + self.streamed_bytes * rates.read_cost_s_per_byte
        overhead /= self.pass_bytes
        for i, unit in enumerate(self.units):
            head = sum(part.n_bytes for part in unit.parts if part.tensor == self.head)
            if head == unit.n_bytes and not final:
                continue
            seconds = rates.compute_s(unit.n_bytes - head, n_tokens) + rates.compute_s(head)
            compute.append(seconds + overhead * unit.n_bytes)
            reads.append(0.0 if i in self.pinned else unit.span_bytes / rates.flash_bytes_per_s)
        return pass_s(compute, reads, self.n_slots)

    @property
    def _kv_resident(self) -> int:
        spill = self.demand.spill
        return self.demand.n_kept or (spill.resident if spill else self.context)

    def items(self) -> tuple[tuple[str, int], ...]:
        """Every part of the budget by name; what is left is `unused`."""
        items = (*self.demand.items(), ("weights pinned", self.pinned_bytes), ("slots for streaming", self.slots_bytes))
        if self.staging_bytes:
            items = (*items, ("weights on their way to the backend", self.staging_bytes))
        return (*items, ("unused", self.budget_bytes - self.planned_bytes))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "budget_bytes": self.budget_bytes,
            "context": self.context,
            "chunk": self.chunk,
            "rows_per_pass": self.demand.n_rows,
            "items": dict(self.items()),
            "pass_bytes": self.pass_bytes,
            "pinned_bytes": self.pinned_bytes,
            "streamed_bytes_per_pass": self.streamed_bytes,
            "kv_spilled_bytes": self.demand.spilled_bytes,
            "kv_resident_tokens": self._kv_resident,
            "slot_bytes": self.slot_bytes,
            "n_slots": self.n_slots,
            "units": len(self.units),
            "units_pinned": len(self.pinned),
            "predicted_decode_tps": self.predicted_decode_tps,
            "predicted_prefill_tps": self.predicted_prefill_tps,
            "predicted_ttft_s": self.predicted_ttft_s(JOB_PROMPT),
            "predicted_ttft_prompt_tokens": JOB_PROMPT,
            "predicted_peak_bytes": self.planned_bytes,
            "approximate": self.approximate,
            "simulated": self.simulated,
            "published": self.published,
            "prompts": self.prompts.as_dict() if self.prompts else None,
        }

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.items())
        chunk = (self.prompts or self).chunk
        lines = [f"budget {human(self.budget_bytes)}, context {self.context}, prompt passes of {chunk} tokens", ""]
        lines += [f"  {name:<{width}}  {human(n_bytes):>8}" for name, n_bytes in self.items()]
        kept = sum(self.units[i].n_bytes for i in self.pinned)
        share = 100 * kept / self.pass_bytes if self.pass_bytes else 100.0
        lines += ["", f"a pass uses {human(self.pass_bytes)} of weights: {share:.0f} % stay in memory, "]
        lines[-1] += f"{human(self.streamed_bytes)} are read from flash" if self.streamed else "nothing is streamed"
        if self.demand.spill is not None and self.demand.spilled_bytes:
            lines.append(
                f"KV cache: the newest {self.demand.spill.resident} tokens stay in memory, "
                f"{human(self.demand.spilled_bytes)} lie on flash when the context is full; each token then reads them"
            )
        if self.approximate:
            lines.append(f"answers are approximate: {self.approximate}")
        if self.prompts is not None:
            lines.append(
                f"prompts on another backend: {human(self.prompts.pinned_bytes)} of "
                f"{human(self.prompts.pass_bytes)} weights stay in memory"
            )
        if self.predicted_decode_tps:
            lines.append(
                f"predicted: {self.predicted_decode_tps:.1f} tokens/s, first token of a prompt of {JOB_PROMPT} after "
                f"{self.predicted_ttft_s(JOB_PROMPT):.1f} s, at most {human(self.planned_bytes)} of memory"
            )
        if self.published:
            lines.append(f"expected of {self.simulated} from published figures; nothing of it was measured")
        elif self.simulated:
            lines.append(f"simulated: {self.simulated}; the processor is this machine's own, not slowed down")
        return "\n".join(lines)


def make_plan(
    matrices: Sequence[TensorInfo],
    demands: Sequence[Demand],
    budget_bytes: int,
    context: int,
    rates: Rates | None = None,
    streams: bool = True,
    adopts: bool = False,
) -> Plan:
    """Return the plan for `matrices`, given in pass order.

    `demands` lists the possible prompt chunks from the largest to the smallest. The first is taken with which
    everything fits; else the one that answers soonest by `rates`; where nothing was measured, the first that costs at
    most `CHUNK_SHARE` of what is not fixed. `streams=False`: all or nothing. `adopts`: the backend copies what stays.
    Raises `BudgetTooSmall` with the smallest budget that works.
    """
    whole, head = make_units(matrices, RESIDENT_UNIT_BYTES), matrices[-1].name
    all_bytes = _held_bytes(whole, adopts)
    by_streaming = streams and 2 * smallest_slot(matrices) < all_bytes
    for demand in demands:
        if demand.chunk < RESIDENT_CHUNK and by_streaming:
            break
        if demand.total_bytes + all_bytes <= budget_bytes:
            return Plan(budget_bytes, context, demand, whole, frozenset(range(len(whole))), 0, 0, rates, head, adopts)
    smallest, least = demands[-1], least_weights(matrices, streams, adopts)
    needed = smallest.total_bytes + least[1]
    if budget_bytes < needed:
        raise BudgetTooSmall(budget_bytes, needed, (*smallest.items(), least))
    if rates is None:
        chosen = _choose_chunk(demands, budget_bytes, least[1])
        return _stream(matrices, chosen, budget_bytes, context, None, adopts)
    fitting = [demand for demand in demands if demand.total_bytes + least[1] <= budget_bytes]
    plans = [_stream(matrices, demand, budget_bytes, context, rates, adopts) for demand in fitting or [smallest]]
    return min(plans, key=job_s)


def least_weights(matrices: Sequence[TensorInfo], streams: bool, adopts: bool) -> tuple[str, int]:
    """Return what the least memory is that weights can do with, and its bytes."""
    slots_bytes = 2 * smallest_slot(matrices)
    all_bytes = _held_bytes(make_units(matrices, RESIDENT_UNIT_BYTES), adopts)
    if streams and slots_bytes < all_bytes:
        return "two slots for streaming", slots_bytes
    return "weights, all resident", all_bytes


def _held_bytes(units: Sequence[Unit], adopts: bool) -> int:
    """Return the memory of units that all stay."""
    return sum(unit.span_bytes for unit in units) + (_staging_bytes(units) if adopts else 0)


def _staging_bytes(units: Sequence[Unit]) -> int:
    return max((span(PAGE - 1, part.n_bytes) for unit in units for part in unit.parts), default=0)


def job_s(plan: Plan) -> float:
    """Return the predicted seconds of a usual turn."""
    return plan.predicted_ttft_s(JOB_PROMPT) + JOB_ANSWER * plan.pass_s(1)


def _stream(
    matrices: Sequence[TensorInfo], demand: Demand, budget_bytes: int, context: int, rates: Rates | None, adopts: bool
) -> Plan:
    """Return the plan of one prompt chunk: slots, and what else fits pinned."""
    weight_bytes, head = budget_bytes - demand.total_bytes, matrices[-1].name
    slot_bytes, n_slots = _slots(weight_bytes, smallest_slot(matrices))
    units = make_units(matrices, slot_bytes)
    if _held_bytes(units, adopts) <= weight_bytes:
        return Plan(budget_bytes, context, demand, units, frozenset(range(len(units))), 0, 0, rates, head, adopts)
    slot_bytes = max(unit.span_bytes for unit in units)
    units, pinned = fill(units, weight_bytes - slot_bytes * n_slots)
    return Plan(budget_bytes, context, demand, units, pinned, slot_bytes, n_slots, rates, head, adopts)


def fill(units: Sequence[Unit], room: int) -> tuple[tuple[Unit, ...], frozenset[int]]:
    """Choose what to pin in `room`: whole units spread over the pass, and rows of one more for what is left over."""
    pinned = spread([unit.span_bytes for unit in units], room)
    left = room - sum(units[i].span_bytes for i in pinned)
    # the finest rows leave the least
    for i in sorted(set(range(len(units))) - pinned, key=lambda i: max(part.step_bytes for part in units[i].parts)):
        halves = split(units[i], left)
        if halves is not None:
            cut = (*units[:i], *halves, *units[i + 1 :])
            return cut, frozenset([*(j if j < i else j + 1 for j in pinned), i])
    return tuple(units), pinned


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
