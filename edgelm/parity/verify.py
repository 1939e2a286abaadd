"""Compares backends with the oracle on a text, chunk by chunk, all of them side by side.

No logits are kept: a chunk of the oracle's and one of a backend's are in memory at a time. A backend that refuses, dies
or hangs becomes a sentence, and the others go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgelm.engine.architecture import record
from edgelm.engine.health import ORACLE
from edgelm.engine.loading import MIN_CONTEXT, default_context, open_path
from edgelm.engine.registry import backend_names, get_architecture
from edgelm.errors import ConfigError, UnknownBackend, UnsupportedModel
from edgelm.files.index import is_genai_folder
from edgelm.memory.platform import current_platform
from edgelm.parity.measures import Likelihood, log_softmax
from edgelm.parity.report import Verification
from edgelm.parity.run import Run
from edgelm.parity.side import Side
from edgelm.sizes import parse_size
from edgelm.text.tokenizer import Tokenizer, load_tokenizer

POSITIONS = 2000
CONTEXT = 1024
"""Beyond the sliding windows of most models, so that their rings go round."""
PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):\n    ")
CONTINUATION = 16
OPERATION_TOKENS = 17
TEXT = Path(__file__).with_name("persuasion.txt")


def verify(
    path: str | os.PathLike[str],
    *,
    backends: Sequence[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    positions: int | None = POSITIONS,
    memory: str | int | None = None,
    threads: int | None = None,
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare backends with the oracle, the NumPy backend, on the model at `path`.

    Without `backends`, every other one that works here. `text` is a UTF-8 file, by default 100 kB of a novel;
    `positions` of its tokens are measured, None: all. It is read in stretches of `context` tokens. `memory`, if given,
    bounds each of the processes: the oracle and every backend have one. `progress(done, total)` counts rows of logits.

    Raises `UnknownBackend`, `ConfigError`, and what opening the model with the oracle raises.
    """
    began = time.perf_counter()
    unknown = next((name for name in backends or () if name not in backend_names()), None)
    if unknown is not None:
        raise UnknownBackend(unknown, backend_names())
    if positions is not None and positions < 1:
        raise ConfigError(f"positions must be at least 1, got {positions}")
    budget_bytes = parse_size(memory) if memory is not None else None
    file = open_path(path)
    context = context or max(min(default_context(file), CONTEXT), MIN_CONTEXT)
    if not is_genai_folder(path) and not record(get_architecture(file.architecture), file, context).attends:
        raise UnsupportedModel("a model that embeds texts has no logits to compare; verify one that writes texts")
    threads = threads or current_platform().cores()
    tokenizer = load_tokenizer(file)
    source = Path(text) if text is not None else TEXT
    ids = _ids(tokenizer, source)
    stretches = list(_stretches(ids, _beginning(tokenizer), context, positions))
    spec = {"path": path, "threads": threads, "memory": budget_bytes, "context": context}
    runs = [Run(name, named=backends is not None) for name in backends or _others()]
    with ExitStack() as stack:
        oracle = stack.enter_context(Side(do="serve", backend=ORACLE, **spec))
        for run in runs:
            run.open(stack, spec)
        bar = Bar(progress, _rows_in_all(stretches, len(runs)))
        likelihood = _read_text(oracle, runs, stretches, bar)
        prompts = [tokenizer.encode(prompt)[: context // 2] for prompt in PROMPTS]
        _continue_greedily(oracle, runs, prompts, min(CONTINUATION, context // 2), bar)
    for run in runs:
        run.compute_operations(spec, ids[:OPERATION_TOKENS])
        bar.advance(OPERATION_TOKENS)
    return Verification(
        model=Path(path).name,
        text=source.name,
        oracle=ORACLE,
        oracle_perplexity=likelihood.perplexity,
        positions=sum(len(stretch.ids) for stretch in stretches),
        context=context,
        threads=threads,
        budget_bytes=budget_bytes,
        seconds=time.perf_counter() - began,
        backends=tuple(run.result() for run in runs),
    )


def _others() -> list[str]:
    return [name for name in backend_names() if name != ORACLE]


class _Stretch(NamedTuple):
    """Tokens that are read from an empty cache, and the one that follows each, if the text goes on."""

    ids: list[int]
    next_ids: list[int]


def _ids(tokenizer: Tokenizer, source: Path) -> list[int]:
    try:
        ids = tokenizer.encode(source.read_text(encoding="utf-8"), add_bos=False)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text (byte {error.start}); convert it first") from error
    if len(ids) < OPERATION_TOKENS:
        raise ConfigError(f"{source} has {len(ids)} tokens; a text of {OPERATION_TOKENS} or more is needed")
    return ids


def _beginning(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def _stretches(ids: list[int], beginning: list[int], context: int, positions: int | None) -> Iterator[_Stretch]:
    left = len(ids) + len(beginning) if positions is None else positions
    at = 0
    while at < len(ids) and left > 0:
        width = min(context, left) - len(beginning)
        own = [*beginning, *ids[at : at + max(width, 1)]]
        at += max(width, 1)
        left -= len(own)
        yield _Stretch(own, [*own[1:], *ids[at : at + 1]])


class Bar:
    """Counts what is done, for whoever waits."""

    def __init__(self, tell: Callable[[int, int], None] | None, total: int) -> None:
        self._tell, self._done, self._total = tell, 0, total

    def advance(self, n: int) -> None:
        self._done += n
        if self._tell is not None:
            self._tell(self._done, self._total)


def _rows_in_all(stretches: Sequence[_Stretch], n_runs: int) -> int:
    rows = sum(len(stretch.ids) for stretch in stretches) + len(PROMPTS) * CONTINUATION
    return (1 + n_runs) * rows + n_runs * OPERATION_TOKENS


def _read_text(oracle: Side, runs: Sequence[Run], stretches: Sequence[_Stretch], bar: Bar) -> Likelihood:
    """Give everybody the same passes of the text; return how likely it is to the oracle."""
    likelihood = Likelihood()
    width = min(side.facts["rows"] for side in (oracle, *(run.side for run in runs)) if side is not None)
    for stretch in stretches:
        for at in range(0, len(stretch.ids), width):
            ids, next_ids = stretch.ids[at : at + width], stretch.next_ids[at : at + width]
            logits = oracle.forward(ids, len(ids), clear=at == 0)
            for row, next_id in zip(logits, next_ids, strict=False):
                likelihood.add(log_softmax(row), next_id)
            bar.advance(len(ids))
            for run in runs:
                run.read(ids, next_ids, logits, clear=at == 0)
                bar.advance(len(ids))
    return likelihood


def _continue_greedily(
    oracle: Side, runs: Sequence[Run], prompts: Sequence[Sequence[int]], n_tokens: int, bar: Bar
) -> None:
    """Let the oracle continue each prompt with its likeliest tokens, and everybody compute the same passes.

    Up to the first token that another would have chosen, that is the other's own continuation, too.
    """
    for prompt in prompts:
        rows = [oracle.forward(prompt, clear=True)]
        while len(rows) < n_tokens:
            rows.append(oracle.forward([int(rows[-1].argmax())]))
        bar.advance(n_tokens)
        logits = np.concatenate(rows)
        chosen = [int(row.argmax()) for row in logits]
        for run in runs:
            run.follow(prompt, chosen, logits)
            bar.advance(n_tokens)
