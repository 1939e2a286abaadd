"""How well drafts of a model guess: its low-bit copies, and its own layers without others. Costs apart.

    python bench/drafts.py [--types Q4_0 IQ4_NL Q3_K Q2_K] [--per-kind 2] [--tokens 128]

The model answers prompts greedily. A draft then reads those answers and says after every token which one it holds
likeliest: how often that is the answer's next token, and how many tokens a verifying pass would have yielded with 4, 8
and 15 guesses in a chain. Speeds with a draft are `speculation.py --part drafted`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import f32_models
import numpy as np

import edgelm
from edgelm.files.gguf import open_model
from edgelm.files.model import TensorInfo
from edgelm.testing import TensorData
from edgelm.testing.gguf_writer import write_gguf

KINDS = ("summarise", "edit", "answer", "chat", "story", "list")
GUESSES = (4, 8, 15)
BACKEND, CONTEXT, ROOM = "llamacpp", 1024, "4GB"


class Answer(NamedTuple):
    kind: str
    prompt: list[int]
    ids: list[int]


def answers(path: Path, threads: int, per_kind: int, n_tokens: int) -> list[Answer]:
    """Return greedy answers of a model to the committed prompts."""
    found = []
    with edgelm.load(path, memory=ROOM, backend=BACKEND, threads=threads, context=CONTEXT, speculate=False) as model:
        for kind in KINDS:
            for line in (common.HERE / "prompts" / f"{kind}.jsonl").read_text().splitlines()[:per_kind]:
                prompt = json.loads(line)
                messages = [{"role": role, "content": prompt[role]} for role in ("system", "user")]
                ids = model.tokenizer.encode_prompt(model.template.render(messages))
                chunks = model.stream_ids(ids, max_tokens=n_tokens, ignore_eos=True)
                found.append(Answer(kind, ids, [chunk.token_id for chunk in chunks if chunk.token_id is not None]))
    return found


def judged(path: Path, threads: int, said: Sequence[Answer]) -> dict[str, Any]:
    """Return how a draft agrees with answers, and what a token of it takes."""
    hits: list[list[bool]] = []
    with edgelm.load(path, memory=ROOM, backend=BACKEND, threads=threads, context=CONTEXT) as model:
        engine = model._engine
        for answer in said:
            engine.truncate(0)
            likeliest = [int(engine.forward(answer.prompt)[-1].argmax())]
            for at in range(0, len(answer.ids) - 1, engine.max_rows):
                part = answer.ids[at : min(at + engine.max_rows, len(answer.ids) - 1)]
                rows = engine.verify(part, range(-1, len(part) - 1))
                likeliest += [int(rows[row].argmax()) for row in range(len(rows))]
                engine.keep(range(len(part)))
            hits.append([one == other for one, other in zip(likeliest, answer.ids, strict=True)])
        step_ms = 1000 * common.middle(_timed(lambda: engine.forward([answer.ids[-1]])) for _ in range(15))
    by_kind = {
        kind: round(
            float(np.mean([hit for one, row in zip(said, hits, strict=True) if one.kind == kind for hit in row])), 3
        )
        for kind in dict.fromkeys(answer.kind for answer in said)
    }
    return {
        "size_mb": common.mb(path.stat().st_size),
        "agreement": round(float(np.mean([hit for row in hits for hit in row])), 3),
        **{f"tokens_a_pass_{n}": round(sum(map(len, hits)) / sum(passes(row, n) for row in hits), 2) for n in GUESSES},
        "step_ms": round(step_ms, 1),
        "agreement_by_kind": by_kind,
    }


def passes(hits: Sequence[bool], n: int) -> int:
    """Return how many passes an answer takes when `n` tokens are guessed before each."""
    at = count = 0
    while at < len(hits):
        right = next((i for i, hit in enumerate(hits[at : at + n]) if not hit), min(n, len(hits) - at))
        at, count = at + right + 1, count + 1
    return count


def _timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def layers_of(path: Path) -> dict[str, list[int]]:
    """Return which layers of a model to keep, by name. Where the kind of a layer goes by its number, only prefixes."""
    metadata = open_model(path).metadata
    architecture = metadata["general.architecture"]
    n = int(metadata[f"{architecture}.block_count"])
    found = {f"first {share}": list(range(round(n * float(part)))) for share, part in
             (("1/3", 1 / 3), ("1/2", 1 / 2), ("2/3", 2 / 3), ("5/6", 5 / 6))}  # fmt: skip
    if f"{architecture}.attention.sliding_window" not in metadata:
        found["every other"] = list(range(0, n, 2))
        found["two of three"] = [layer for layer in range(n) if layer % 3 != 1]
        found["all but 4 in the middle"] = [layer for layer in range(n) if not n // 2 - 2 <= layer < n // 2 + 2]
    found["all but the middle third"] = [layer for layer in range(n) if not n // 3 <= layer < 2 * n // 3]
    return found


def with_layers(source: Path, target: Path, layers: Sequence[int]) -> Path:
    """Write a model that has only these layers of another, and its head."""
    file = open_model(source)
    tensors = []
    for info in file.tensors.values():
        name = info.name
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            if int(layer) not in layers:
                continue
            name = f"blk.{layers.index(int(layer))}.{rest}"
        tensors.append(TensorData(name, info.type, info.shape, lambda info=info: _raw(source, info)))
    return write_gguf(target, {**file.metadata, f"{file.architecture}.block_count": len(layers)}, tensors)


def _raw(path: Path, info: TensorInfo) -> bytes:
    return bytes(np.memmap(path, np.uint8, "r", info.offset, info.n_bytes))


def measure(report: common.Report, name: str, given: argparse.Namespace) -> None:
    original, large = common.find_model(name), f32_models.made(name)
    said = answers(large, given.threads, given.per_kind, given.tokens)
    report.add("copies", model=name, draft="the quantized original", **judged(original, given.threads, said))
    for kind in given.types:
        copy = edgelm.draft_copy(large, kind)
        report.add("copies", model=name, draft=kind, **judged(copy.path, given.threads, said))
        if copy.made:
            copy.path.unlink()
    part = common.scratch_folder() / "layers.gguf"
    for kept, layers in layers_of(original).items():
        with_layers(original, part, layers)
        report.add("own layers", model=name, kept=kept, n_layers=len(layers), **judged(part, given.threads, said))
    part.unlink(missing_ok=True)


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "IQ4_NL", "Q3_K", "Q2_K"])
    parser.add_argument("--per-kind", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    conditions = {
        "backend": BACKEND,
        "threads": given.threads,
        "tokens": given.tokens,
        "prompts a kind": given.per_kind,
    }
    report = common.Report("drafts", conditions)
    for name in given.models:
        measure(report, name, given)
    report.finish()


if __name__ == "__main__":
    main()
