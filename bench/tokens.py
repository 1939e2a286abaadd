"""Are the tokens llama.cpp's? Greedy continuations, and logits on llama.cpp's own tokens.

`llamacpp` backend: the same 128 ids. NumPy backend (float32 throughout, where llama.cpp rounds activations to 8 bits):
teacher-forced on llama.cpp's ids; how often the best token agrees, how close the two best logits were where it does
not, and the mean KL divergence. Time is not measured here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Numbers: 1, 1, 2, 3, 5, 8,",
    "Die Würde des Menschen ist unantastbar. 人は生まれながら",
)


def compare(ours: np.ndarray, theirs: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """Return agreement, gaps and divergence of logits [n, n_vocab]; `theirs` chose `ids`."""
    agrees = ours.argmax(axis=1) == ids
    gaps = [gap(row) for row in ours[~agrees]] + [gap(row) for row in theirs[~agrees]]
    divergences = [divergence(p, q) for p, q in zip(theirs, ours, strict=True)]
    return {
        "agreement %": 100 * float(agrees.mean()),
        "mismatches": int((~agrees).sum()),
        "largest gap at a mismatch": max(gaps, default=0.0),
        "mean KL": float(np.mean(divergences)),
        "largest KL": max(divergences),
        "largest logit difference": float(np.abs(ours - theirs).max()),
    }


def gap(logits: np.ndarray) -> float:
    """Return the distance of the two best."""
    second, best = np.partition(logits, -2)[-2:]
    return float(best - second)


def divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    p, q = log_softmax(theirs), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


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
        theirs_file, ours_file = Path(folder) / "theirs.npy", Path(folder) / "ours.npy"
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
        forced = np.concatenate([np.asarray(ids) for ids in teacher])
        for backend in ("llamacpp", "numpy"):
            child = common.side("ours", **spec, backend=backend, teacher=teacher, logits=ours_file)
            common.run(child).json()
            ours = np.load(ours_file, mmap_mode="r")
            report.add("Logits on llama.cpp's tokens", model=name, backend=backend, **compare(ours, theirs, forced))


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Return the place where the ids part, None if they never do."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


if __name__ == "__main__":
    main()
