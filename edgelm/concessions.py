"""What the user should know of a plan: what was given up to keep the budget, a sentence each."""

from __future__ import annotations

from edgelm.cachedir import cache_dir
from edgelm.engine.demand import CHUNKS
from edgelm.files.model import ModelFile
from edgelm.memory.plan import Plan
from edgelm.sizes import human
from edgelm.text.tables import FORMAT


def concessions(plan: Plan, wanted: int) -> tuple[str, ...]:
    """Return what was given up to keep the budget, a sentence each. `wanted`: the context without a budget."""
    notes: list[str] = []
    if plan.context < wanted:
        notes.append(f"context shortened from {wanted} to {plan.context} tokens: the budget holds no more")
    chunk = (plan.prompts or plan).chunk
    if chunk < min(CHUNKS[0], plan.context):
        notes.append(f"prompts are read in passes of {chunk} tokens instead of {CHUNKS[0]}")
    if plan.approximate:
        notes.append(f"answers are approximate: {plan.approximate}")
    if plan.demand.kv not in ("f16", "f32"):
        notes.append(f"keys and values are kept as {plan.demand.kv} instead of f16")
    spill = plan.demand.spill
    if plan.approximate and spill is not None and spill.file_bytes:
        notes.append(
            f"while a prompt is read, keys and values that have no room, up to {human(spill.file_bytes)}, are written "
            f"to {cache_dir()} (a file that vanishes at the end; writing wears flash)"
        )
    elif spill is not None and spill.file_bytes:
        notes.append(
            f"the newest {spill.resident} tokens' keys and values stay in memory, as f16; older ones, up to "
            f"{human(spill.file_bytes)}, are written to {cache_dir()} (a file that vanishes at the end; writing wears "
            "flash) and read back for every token"
        )
    if plan.streamed:
        notes.append(f"{human(plan.streamed_bytes)} of {human(plan.pass_bytes)} weights are read from flash each pass")
    return tuple(notes)


def old_tables(file: ModelFile) -> tuple[str, ...]:
    """Say whether a pack's tokenizer tables are of no use here."""
    if file.pack is None or file.pack.has_tables(FORMAT):
        return ()
    return ("the tokenizer tables of this pack are of another edgelm; pack the model again for a faster start",)
