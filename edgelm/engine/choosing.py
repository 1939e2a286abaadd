"""Which backend computes a model best on this device within a budget, and why each other one was passed over.

What a candidate would do is found out in a child process, which loads its library in place of this one, and is kept.
Opens no backend; `ranking` compares them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from edgelm.engine.cache_types import lacking
from edgelm.engine.children import can_start, run_child
from edgelm.engine.health import ORACLE, check
from edgelm.engine.ranking import Seen, rank_of, reasons_of
from edgelm.engine.registry import backend_names, get_backend
from edgelm.engine.weighed import Weighed, forget, keep, recall
from edgelm.engine.wishes import Wishes
from edgelm.errors import BackendUnavailable, UnsupportedModel
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import ModelFile
from edgelm.memory.platform import current_platform

ORDER = ("llamacpp", "onnx", "mlx")
"""Who goes first where speeds are equal or unknown; then come strangers, and the oracle last."""
TIMEOUT_S = 60.0
ROOMY = 2
"""A budget of so many times the model's size holds it with every backend."""
_CHILD = """
import json, sys
from edgelm.comparing import weigh
report(**weigh(**json.loads(sys.argv[1])), done=True)
"""


class Asked(NamedTuple):
    """How a model is to be loaded, as far as that decides which backend is best."""

    path: str
    budget_bytes: int
    n_threads: int
    wishes: Wishes = Wishes()


class Candidate(NamedTuple):
    """A backend, considered for one model and one budget. `reason` says why it was chosen or passed over.

    `predicted_decode_tps`, `planned_bytes` (of the whole process) and `streamed_bytes` (read from flash for each token)
    are what its plan says, from kernels measured on this device; None if nothing was measured. `needed_bytes` is the
    smallest budget that works, if this one does not. `prepare_bytes` are to be written to the cache folder before the
    first start. `loss` says what converting the weights loses; empty if nothing.
    """

    name: str
    version: str | None
    chosen: bool
    reason: str
    predicted_decode_tps: float | None = None
    planned_bytes: int | None = None
    streamed_bytes: int | None = None
    needed_bytes: int | None = None
    prepare_bytes: int = 0
    loss: str = ""
    simulated: bool = False


class Choice(NamedTuple):
    """Backends to try, the best first, and sentences for the user: on the first, and on those that are broken."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


def choose(file: ModelFile, wanted: str, asked: Asked) -> Choice:
    """Return the backend that is asked for, or for `auto` those that could compute the model, the best first.

    Two with a plus between them, `npu+auto`, are a backend for the prompts and one for the answers.
    Raises `UnknownBackend`; `BackendUnavailable` if the wanted one does not work here; `UnsupportedModel` if none that
    works computes the model.
    """
    prompts, answers = split_name(wanted)
    if prompts is not None:
        choice = choose(file, answers, asked)
        notes = (_as_asked(prompts), *choice.notes)
        return Choice(tuple(f"{prompts}+{name}" for name in choice.names), notes)
    if wanted != "auto":
        return Choice((wanted,), (_as_asked(wanted),))
    ranked = _ranked(file, asked)
    reasons = reasons_of(ranked)
    usable = [seen for seen in ranked if not seen.why_not and not seen.simulated]
    if not usable:
        all_of_them = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedModel(f"no backend computes this model ({all_of_them}); try another quantization")
    # where none keeps the budget, the one that needs least says what it needs
    names = tuple(seen.name for seen in usable if seen.fits) or (usable[0].name,)
    if usable[0].fits and ORACLE not in names:
        names += (ORACLE,)  # should the others fail after all
    said = [seen.name for seen in ranked if seen.broken or (seen.name == names[0] and seen.fits)]
    return Choice(names, tuple(f"{name}: {reasons[name]}" for name in said))


def split_name(backend: str) -> tuple[str | None, str]:
    """Return the backend of the prompts, if they have one of their own, and that of the answers: `npu+llamacpp`."""
    prompts, plus, answers = backend.partition("+")
    return (prompts, answers) if plus else (None, backend)


def _as_asked(name: str) -> str:
    found = check(name)
    if not found.available:
        raise BackendUnavailable(name, found.reason)
    return f"{name}: chosen, as asked for ({found.version})"


def consider(file: ModelFile, asked: Asked, *, fresh: bool = False) -> tuple[Candidate, ...]:
    """Return every registered backend, the chosen one first, each measured as far as it works; `fresh`: anew."""
    if fresh:
        for name in backend_names():
            check(name, fresh=True)
        forget(_facts(file, asked))
    ranked = _ranked(file, asked, everything=True)
    reasons = reasons_of(ranked)
    host_bytes = current_platform().rss_bytes()
    return tuple(_candidate(seen, reasons[seen.name], i == 0, host_bytes) for i, seen in enumerate(ranked))


def _candidate(seen: Seen, reason: str, first: bool, host_bytes: int) -> Candidate:
    candidate = Candidate(
        seen.name,
        seen.verdict.version or None,
        chosen=first and seen.fits and not seen.simulated,
        reason=reason,
        simulated=seen.simulated,
    )
    weighed = seen.weighed
    if weighed is None or weighed.why_not:
        return candidate
    candidate = candidate._replace(prepare_bytes=weighed.prepare_bytes, loss=weighed.loss)
    if weighed.needed_bytes:
        return candidate._replace(needed_bytes=weighed.needed_bytes + host_bytes)
    return candidate._replace(
        predicted_decode_tps=weighed.decode_tps or None,
        planned_bytes=weighed.planned_bytes + host_bytes,
        streamed_bytes=weighed.streamed_bytes,
    )


def _ranked(file: ModelFile, asked: Asked, everything: bool = False) -> list[Seen]:
    """Return all candidates, the best first; those that are out, last.

    Only what decides is measured: the oracle where no other keeps the budget, and nothing at all where a single other
    one works and the budget is ample. `everything`: all that works, and simulated ones too.
    """
    kv = asked.wishes.kv
    seen = [_look(name, file, kv) for name in _names()]
    real = [one for one in seen if not one.why_not and not one.simulated]
    spare = asked.budget_bytes - current_platform().rss_bytes()
    tight = ROOMY * sum(file.file_bytes) > spare
    weigh = _weigher(file, asked, spare) if can_start() else lambda one: one
    if everything:
        seen = [one if one.why_not else weigh(one) for one in (*seen, _look(ORACLE, file, kv))]
    elif len(real) > 1 or tight:
        seen = [weigh(one) if one in real else one for one in seen]
    if not everything and not any(one.fits and not one.simulated for one in seen):
        oracle = _look(ORACLE, file, kv)  # 5 ms, else spared
        seen.append(weigh(oracle) if tight and not oracle.why_not else oracle)
    return sorted(seen, key=rank_of(seen))


def _names() -> Iterator[str]:
    names = backend_names()
    yield from (name for name in ORDER if name in names)
    yield from (name for name in names if name not in ORDER and name != ORACLE)


def _look(name: str, file: ModelFile, kv: str) -> Seen:
    """See what can be seen without loading a library: health, and the types of the tensors and of the cache."""
    verdict = check(name)
    if not verdict.available:
        return Seen(name, verdict, why_not=verdict.reason, broken=verdict.broken)
    can = get_backend(name).capabilities()
    types = {info.type for info in file.tensors.values() if info.n_rows > 1}
    missing = {kind for kind in types if kind not in can.types and _held(kind) not in can.types}
    why_not = f"it does not compute {', '.join(sorted(kind.name for kind in missing))}" if missing else ""
    if not why_not and (other := lacking(kv, can)):
        why_not = f"it {other}"
    return Seen(name, verdict, can.simulated, why_not)


def _held(kind: TensorType) -> TensorType:
    """Return the type that weights of this type can be converted to."""
    if kind.affine is None:
        return kind
    from edgelm.files.affine import holder

    return holder(kind.affine)[0]


def _weigher(file: ModelFile, asked: Asked, spare: int) -> Callable[[Seen], Seen]:
    """Return what adds to a candidate what it would do within `spare` bytes beside this process as it is."""
    facts = _facts(file, asked)

    def weigh(seen: Seen) -> Seen:
        identity = seen.verdict.identity or ""
        found = recall(facts, seen.name, identity, spare)
        if found is None:
            found = _weigh_in_child(seen.name, asked)
            keep(facts, seen.name, identity, spare, found)
        return seen._replace(weighed=found, why_not=found.why_not, broken=found.broken)

    return weigh


def _facts(file: ModelFile, asked: Asked) -> tuple[object, ...]:
    """Return what a measurement holds for, room and library apart."""
    wishes = asked.wishes._replace(memory=None, backend="", threads=asked.n_threads)
    return (file.fingerprint, *file.paths, *wishes)


def _weigh_in_child(name: str, asked: Asked) -> Weighed:
    wishes = asked.wishes._replace(memory=asked.budget_bytes, backend=name, threads=asked.n_threads)
    request = {"path": asked.path, "host_bytes": current_platform().rss_bytes(), "wishes": wishes._asdict()}
    facts, problem, doubtful = run_child(_CHILD, (json.dumps(request),), TIMEOUT_S, "being measured")
    done = facts.pop("done", False)
    if not problem and not done:
        problem, doubtful = "it gave no answer when it was measured", True
    if problem:
        return Weighed(why_not=problem, broken=True, steady=not doubtful)
    return Weighed(**facts)
