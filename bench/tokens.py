"""Are the tokens llama.cpp's? Greedy continuations, and logits on llama.cpp's own tokens.

`llamacpp` backend: the same 128 ids. NumPy backend (float32 throughout, where llama.cpp rounds activations to 8 bits):
teacher-forced on llama.cpp's ids; how often the best token agrees, by how much either preferred its own where it does
not, and the mean KL divergence. Time is not measured here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from edgelm.parity.measures import Comparison
from edgelm.parity.side import Side

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Numbers: 1, 1, 2, 3, 5, 8,",
    "Die Würde des Menschen ist unantastbar. 人は生まれながら",
)


def compare(
    side: Side, prompts: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]], theirs: np.ndarray
) -> dict[str, Any]:
    """Return how the logits [n, n_vocab] that llama.cpp chose the `teacher` ids from differ from those of `side`."""
    found, rows = Comparison(), iter(theirs)
    for prompt, ids in zip(prompts, teacher, strict=True):
        found.add(next(rows)[None], side.forward(prompt, clear=True))
        for token in ids[:-1]:
            found.add(next(rows)[None], side.forward([token]))
    return {
        "agreement %": 100 * found.agreement,
        "mismatches": found.n - found.n_agreeing,
        "largest gap at a mismatch": found.largest_gap,
        "mean KL": found.mean_kl,
        "largest KL": found.largest_kl,
        "largest logit difference": found.largest_difference,
    }


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    args = parser.parse_args()
    report = common.Report("tokens", {"threads": args.threads, "budget": "default (all resident)"})
    for name in args.models:
        measure(report, name, PROMPTS[: args.prompts], args.tokens, args.threads)
    report.finish()


def measure(report: common.Report, name: str, prompts: tuple[str, ...], n: int, threads: int) -> None:
    spec = {
        "model": common.find_model(name), "prompts": prompts, "max_tokens": n, "threads": threads, "context": 1024,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        theirs_file = Path(folder) / "theirs.npy"
        peer = common.run(common.side("peer", **spec, plain_buffers=True, logits=theirs_file)).json()
        repacked = common.run(common.side("peer", **spec)).json()
        teacher = [run["token_ids"] for run in peer["runs"]]
        greedy = common.run(common.side("ours", **spec, backend="llamacpp")).json()
        for i, prompt in enumerate(prompts):
            ours, ids = greedy["runs"][i]["token_ids"], teacher[i]
            report.add(
                f"Greedy, {n} tokens, llamacpp backend",
                model=name,
                prompt=repr(prompt),
                prompt_tokens=greedy["runs"][i]["prompt_tokens"],
                **{
                    "same ids as llama.cpp": ours == ids,
                    "first difference": first_difference(ours, ids),
                    "llama.cpp with default buffers: same": repacked["runs"][i]["token_ids"] == ids,
                },
            )
        theirs = np.load(theirs_file, mmap_mode="r")
        for backend in ("llamacpp", "numpy"):
            served = {"path": spec["model"], "backend": backend, "threads": threads, "memory": None, "context": 1024}
            with Side(do="serve", **served) as side:
                figures = compare(side, peer["prompt_ids"], teacher, theirs)
            report.add("Logits on llama.cpp's tokens", model=name, backend=backend, **figures)


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Return the place where the ids part, None if they never do."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


if __name__ == "__main__":
    main()
