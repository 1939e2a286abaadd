"""A smaller model of the same vocabulary, resident beside the one that it drafts for (BiLD, arXiv:2302.07863).

All of it counts against the one budget. Lossless: what it guesses is verified.
"""

from __future__ import annotations

from dataclasses import replace

from edgelm.engine.architecture import record
from edgelm.engine.backend import Adopting
from edgelm.engine.demand import Demands, describe
from edgelm.engine.loading import Prepared, Request, Terms, check_types, default_context, settle
from edgelm.engine.phases import LARGE_BYTES, Phase
from edgelm.engine.registry import get_architecture
from edgelm.errors import ConfigError
from edgelm.files.model import ModelFile
from edgelm.files.strings import StringArray

CHUNK = 64
"""Tokens of a draft's prompt pass: its scratch memory is taken from the weights of the other model."""
VOCABULARY, _MODEL = "tokenizer.ggml.tokens", "tokenizer.ggml.model"


def check_vocabulary(target: ModelFile, draft: ModelFile) -> None:
    """Raise `ConfigError` unless the two mean the same texts by the same ids.

    Tables may be padded to other lengths: ids that only one of them has are never guessed.
    """
    ours, theirs = target.metadata.get(VOCABULARY), draft.metadata.get(VOCABULARY)
    if not isinstance(ours, StringArray) or not isinstance(theirs, StringArray):
        raise ConfigError("a draft model and its target must both be GGUF files with their vocabulary in them")
    kinds = target.metadata.get(_MODEL), draft.metadata.get(_MODEL)
    shorter = min(len(ours), len(theirs))
    differing = None
    if ours != theirs:
        pairs = enumerate(zip(ours.iter_raw(), theirs.iter_raw(), strict=False))
        differing = next((i for i, (one, other) in pairs if one != other), None)
    if kinds[0] != kinds[1] or differing is not None or 2 * shorter < max(len(ours), len(theirs)):
        where = f"token {differing} differs" if differing is not None else f"{len(theirs)} tokens against {len(ours)}"
        raise ConfigError(
            f"{draft.name} cannot draft for {target.name}: their vocabularies are not the same ({where}); "
            "use a smaller model of the same family, or a low-bit copy of the model itself"
        )


def prepare_draft(phase: Phase, request: Request, target: ModelFile) -> Prepared:
    """Plan a draft for `target` with all its weights resident, in just the memory that it needs."""
    context = min(request.context or default_context(target), default_context(phase.file))
    can = phase.backend.capabilities()
    model = describe(
        record(get_architecture(phase.file.architecture), phase.file, context), phase.file.tensors, phase.file.gathered
    )
    check_types(model, phase.backend)
    demands = Demands(model, phase.session, context, 0, 1, can.cache, most_tokens=CHUNK)
    terms = Terms(context, phase.rates, can.streams, isinstance(phase.session, Adopting))
    plan = settle(model, demands, LARGE_BYTES, terms)
    plan = replace(plan, budget_bytes=plan.planned_bytes)
    own = Request(plan.budget_bytes, context, request.n_threads, speculate=False)
    return Prepared(
        model, plan, phase.session, own, phase.file, 0, phase.rates, phase.pattern, can.streams, can.cache
    )  # fmt: skip
