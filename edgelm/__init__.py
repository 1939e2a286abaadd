"""Run small language models inside a memory budget that you set.

    with edgelm.load("model.gguf", memory="300MB") as model:
        for chunk in model.stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="")

`__all__` is the whole public surface. Everything but the errors is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from os import fspath
from typing import TYPE_CHECKING, Any

from edgelm.errors import (
    BackendUnavailable,
    BudgetTooSmall,
    Cancelled,
    ConfigError,
    ContextOverflow,
    DownloadError,
    EdgeLMError,
    ModelFileError,
    ModelNotFound,
    PreparationError,
    TemplateError,
    ToolsIgnored,
    UnknownBackend,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from edgelm.chat import Chat
    from edgelm.comparing import candidates
    from edgelm.copying import DraftCopy, draft_copy
    from edgelm.engine.choosing import Candidate
    from edgelm.memory.plan import Plan
    from edgelm.memory.timeline import Timeline
    from edgelm.model import Model
    from edgelm.opening import plan
    from edgelm.packing import Packed, PackError, pack
    from edgelm.parity.report import Verification
    from edgelm.parity.verify import verify
    from edgelm.reports import BackendReport, Inspection, backends, doctor, inspect
    from edgelm.simulated import Device, devices
    from edgelm.text.tools import ToolCall, call_schema
    from edgelm.usage import Chunk, Sample, Score, Usage

__version__ = "0.1.0"

__all__ = [
    "BackendReport",
    "BackendUnavailable",
    "BudgetTooSmall",
    "Cancelled",
    "Candidate",
    "Chat",
    "Chunk",
    "ConfigError",
    "ContextOverflow",
    "Device",
    "DownloadError",
    "DraftCopy",
    "EdgeLMError",
    "Inspection",
    "Model",
    "ModelFileError",
    "ModelNotFound",
    "PackError",
    "Packed",
    "Plan",
    "PreparationError",
    "Sample",
    "Score",
    "TemplateError",
    "Timeline",
    "ToolCall",
    "ToolsIgnored",
    "UnknownBackend",
    "UnsupportedModel",
    "Usage",
    "Verification",
    "backends",
    "call_schema",
    "candidates",
    "devices",
    "doctor",
    "draft_copy",
    "inspect",
    "load",
    "pack",
    "plan",
    "verify",
]

_HOMES = {
    "BackendReport": "edgelm.reports",
    "Candidate": "edgelm.engine.choosing",
    "Chat": "edgelm.chat",
    "Chunk": "edgelm.usage",
    "Device": "edgelm.simulated",
    "DraftCopy": "edgelm.copying",
    "Inspection": "edgelm.reports",
    "Model": "edgelm.model",
    "PackError": "edgelm.packing",
    "Packed": "edgelm.packing",
    "Plan": "edgelm.memory.plan",
    "Sample": "edgelm.usage",
    "Score": "edgelm.usage",
    "Timeline": "edgelm.memory.timeline",
    "ToolCall": "edgelm.text.tools",
    "Usage": "edgelm.usage",
    "Verification": "edgelm.parity.report",
    "backends": "edgelm.reports",
    "call_schema": "edgelm.text.tools",
    "candidates": "edgelm.comparing",
    "devices": "edgelm.simulated",
    "doctor": "edgelm.reports",
    "draft_copy": "edgelm.copying",
    "inspect": "edgelm.reports",
    "pack": "edgelm.packing",
    "plan": "edgelm.opening",
    "verify": "edgelm.parity.verify",
}


def load(
    path: str | PathLike[str],
    *,
    memory: str | int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    simulate: str | None = None,
    speculate: bool = True,
    draft: str | PathLike[str] | None = None,
    keep_guesses: bool = False,
    spill: bool = True,
    kv: str = "f16",
    parallel: int = 1,
    attention: str = "exact",
    kept: float | None = None,
    adaptive: bool | Callable[[str], None] = False,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Model:
    """Load a GGUF file, or a model folder (Hugging Face, MLX, onnxruntime-genai), inside a memory budget.

    `memory` bounds the whole process at its peak ("300MB", "1GiB", or bytes); without it the budget is what the
    device can spare (`Model.notes` says how much). `context` is the number of tokens that prompt and answer may have
    together; without it as much as the model was made for, up to 4096, fewer if the budget asks for it.
    `threads` defaults to the physical cores that this process may use. An `adaptive` model gives memory back while the
    device is short of it, and takes it again up to the budget; a function hears a sentence for each change, from
    another thread. `progress(done, total)` hears of loading, `notice` a sentence on work that is done once: some
    backends prepare a model before its first start, which is kept in the cache folder.

    Tokens are guessed and verified several at a time where that is faster, with the same result; `speculate=False`
    computes one after the other. `draft` is a smaller model of the same vocabulary that does the guessing, resident
    within the same budget: a file, or "auto" for the low-bit copy that `draft_copy` made of the model.
    `keep_guesses` keeps what is learned for guesses in the cache folder when the model is closed, up to 0.3 MB for a
    model: the first answers of the next process are guessed better where weights are streamed.

    `kv` is the type of keys and values in the cache: "f16", "q8_0" (half the memory, next to no loss), "q4_0", two of
    them for keys and values ("q8_0:q4_0"), or "auto" for as many bits as leave all weights in memory, 8 for keys at
    the least.
    Where a `context` that was asked for fits in no other way, the oldest keys and values go to flash, in the cache
    folder, and are read back for every token: the answer is the same; `spill=False` raises `BudgetTooSmall` instead.

    `parallel` is the number of answers to one prompt that `Model.samples` is to have room for, however little memory
    there is. The context holds all of them: the prompt once, and the tokens of each.

    `attention` other than "exact" makes answers to prompts approximate that are longer than the share `kept` of the
    context (0.25 unless given); the cache is planned for these and 256 tokens of an answer. "important": a prompt is
    read exactly, with what has no room on flash, then each layer keeps the tokens that its end attends to. "filtered":
    the first blocks read it alone, and the rest of the model sees only the tokens that these attend to.

    `simulate` names one of `devices()`: reading weights is slowed down to that device's flash, and its budget and
    threads stand in for those not given; the processor stays this machine's own.

    Raises `BudgetTooSmall` with the smallest budget that works, `ModelFileError`, `UnsupportedModel`,
    `BackendUnavailable`, `PreparationError` or `ConfigError`.
    """
    from edgelm.engine.wishes import Wishes
    from edgelm.model import Model
    from edgelm.opening import open_engine

    drafted_by = None if draft is None else fspath(draft)
    wishes = Wishes(
        memory, backend, threads, context, simulate, 1, speculate, drafted_by, kv, spill, parallel, attention, kept
    )
    return Model(open_engine(path, wishes, progress, notice), adaptive, keep_guesses)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edgelm' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
