"""Would it pay to read only the feed-forward neurons that matter to a token (arXiv:2312.11514, 2406.06282)?

Simulated, not built: the NumPy backend computes real text with all but the chosen neurons of every token set to zero,
which is exactly what reading only theirs would compute; then which pages of flash that would have touched, with a
cache of the neurons used last, is priced with reads timed here, against the plan that streams everything.
The first tokens are a prompt and stay exact: prompt passes use all neurons anyway. Favours the neurons where in doubt:
their reads are taken to overlap with everything, although they cannot begin before the gate is known, and quantizing
a turned down-projection again is taken to be free.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
from neuron_reads import Chosen, Cost, Replay, Way, largest, measure_flash, strides

from edgelm.files.blocks import Floats
from edgelm.files.gguf import open_model
from edgelm.testing.evaluate import evaluate
from edgelm.text.tokenizer import load_tokenizer
from edgelm_numpy import session
from edgelm_numpy.frame import Frame, Site, Step
from edgelm_numpy.rows import lower_gate

Choose = Callable[[Floats, Floats], Any]
"""act(gate) and up of a layer, [tokens, neurons] each: which neurons of which token are used."""

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
MOST_KL, LEAST_AGREEMENT = 0.01, 97.0
BUDGETS_MB = {"smollm2-135m-instruct": (90, 110), "gemma-3-270m": (125, 150)}


@dataclass(slots=True)
class Gates:
    """Stands in for the NumPy backend's `gate`: zeroes what `choose` leaves out, from row `n_exact` on."""

    choose: Choose | None
    n_exact: int
    chosen: list[Chosen] = field(default_factory=list)

    def lower(self, site: Site) -> Step:
        plain = lower_gate(site)

        def run(frame: Frame) -> None:
            plain.run(frame)
            if self.choose is None:
                return
            gate, up = (frame.values[value] for value in site.op.inputs)
            chosen = self.choose(_activated(str(site.op.params), gate), up)
            chosen[: self.n_exact] = True
            frame.values[site.op.output][~chosen] = 0.0
            self.chosen.append(chosen[self.n_exact :])  # one program runs the whole model, layer by layer

        return Step(run)


def _activated(name: str, gate: Floats) -> Floats:
    if name == "silu":
        return np.asarray(gate / (1 + np.exp(-gate)), np.float32)
    assert name == "gelu", name
    inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate * gate * gate)
    return np.asarray(np.float32(0.5) * gate * (1 + np.tanh(inner)), np.float32)


@contextmanager
def in_place(gates: Gates) -> Iterator[None]:
    session.LOWERINGS["gate"] = gates.lower
    try:
        yield
    finally:
        session.LOWERINGS["gate"] = lower_gate


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids and what the exact model says after each that is scored."""

    path: Path
    ids: list[int]
    n_exact: int
    threads: int
    exact: Floats | None = None

    def run(self, choose: Choose | None) -> tuple[Floats, list[Chosen]]:
        """Return the log-probabilities after the scored tokens, and the neurons used for each, layer by layer."""
        gates = Gates(choose, self.n_exact)
        with in_place(gates):
            logits = evaluate(self.path, self.ids, n_context=len(self.ids), n_threads=self.threads)[self.n_exact :]
        logits -= logits.max(axis=1, keepdims=True)
        for row in logits:
            row -= np.log(np.exp(row).sum(dtype=np.float64))
        return logits, gates.chosen

    def compare(self, choose: Choose) -> tuple[dict[str, float], list[Chosen]]:
        """Return how far the model with those neurons is from the exact one."""
        assert self.exact is not None
        ours, chosen = self.run(choose)
        gap = [float(np.dot(np.exp(p), p - q)) for p, q in zip(self.exact, ours, strict=True)]
        rows, following = np.arange(len(ours) - 1), np.asarray(self.ids[self.n_exact + 1 :])
        surprise = float((self.exact[rows, following] - ours[rows, following]).mean(dtype=np.float64))
        return {
            "kept %": 100 * float(np.mean([layer.mean() for layer in chosen])),
            "blocks of 32 kept %": 100 * float(np.mean([_blocks(layer, 32).mean() for layer in chosen])),
            "mean KL": float(np.mean(gap)),
            "agreement %": 100 * float((ours.argmax(axis=1) == self.exact.argmax(axis=1)).mean()),
            "perplexity ratio": float(np.exp(surprise)),
        }, chosen


def _blocks(chosen: Chosen, n: int) -> Chosen:
    """Return which `n` neighbours hold any: the columns of a quantized matrix share scales by 32 or 256."""
    return np.asarray(chosen.reshape(len(chosen), -1, n).any(axis=2))


def selections(n_exact: int) -> Iterator[tuple[str, float, Choose]]:
    """Yield what is tried: a name, a share or threshold, and the function. The prompt is what calibrates them."""
    scores: dict[str, Choose] = {
        "|act(gate)|": lambda act, _: np.abs(act),
        "|act(gate)| x usual |up|": lambda act, up: np.abs(act) * np.abs(up[:n_exact]).mean(axis=0),
        "oracle: |act(gate) x up|": lambda act, up: np.abs(act * up),
    }
    for name, score in scores.items():
        for share in SHARES:
            yield f"{name}, share", share, partial(_largest, score, share)
    for threshold in THRESHOLDS:
        yield "|act(gate)|, threshold", threshold, partial(_above, threshold, n_exact)


def _largest(score: Choose, share: float, act: Floats, up: Floats) -> Chosen:
    return largest(score(act, up), share)


def _above(threshold: float, n_exact: int, act: Floats, up: Floats) -> Chosen:
    """One threshold for all layers, in units of the layer's usual activation, which the prompt told."""
    usual = np.median(np.sqrt(np.mean(act[:n_exact] ** 2, axis=1)))
    return np.asarray(np.abs(act) >= np.float32(threshold) * usual)


def predict(plan: dict[str, Any], neurons_bytes: float, kept: float, ways: list[Way], cost: Cost) -> dict[str, Any]:
    """Compare with the exact plan, whose memory for pinned weights a cache of neurons must share."""
    exact_bytes, pinned_bytes = int(plan["streamed_bytes_per_pass"]), int(plan["pinned_bytes"])
    others_bytes = exact_bytes + pinned_bytes - neurons_bytes

    def seconds(way: Way) -> float:
        return cost.in_order(max(0.0, others_bytes - pinned_bytes + way.cache_bytes)) + way.seconds

    best = min((way for way in ways if way.cache_bytes <= pinned_bytes), key=seconds)
    return {
        "exact: MB": common.mb(exact_bytes),
        "exact: tok/s": 1 / cost.in_order(exact_bytes),
        "best way": f"{best.layout}, cache {best.cache}",
        "neurons: tok/s": 1 / seconds(best),
        "gain": cost.in_order(exact_bytes) / seconds(best),
        "gain if bytes were all": exact_bytes / (exact_bytes - (1 - kept) * neurons_bytes),
    }


def measure(report: common.Report, name: str, args: Any) -> None:
    path = common.find_model(name)
    file = open_model(path)
    cost = measure_flash(report, name, path, args.rounds)
    ids = list(load_tokenizer(file).encode(common.text_of(path, args.tokens)))
    text = Text(path, ids, args.exact, args.threads)
    text = replace(text, exact=text.run(None)[0])
    good: dict[str, tuple[float, list[Chosen]]] = {}
    for selection, setting, choose in selections(args.exact):
        found, chosen = text.compare(choose)
        report.add("Quality", model=name, selection=selection, setting=setting, **found)
        acceptable = found["mean KL"] <= MOST_KL or found["agreement %"] >= LEAST_AGREEMENT
        if acceptable and (selection not in good or found["kept %"] < good[selection][0]):
            good[selection] = found["kept %"], chosen
    context = args.context or common.CONTEXTS.get(name, 2048)
    plans = [plan_of(path, budget, context, args.backend) for budget in args.budgets or BUDGETS_MB.get(name, (500,))]
    neurons_bytes = sum(info.n_bytes for key, info in file.tensors.items() if "ffn_up." in key or "ffn_down." in key)
    for selection, (kept, chosen) in good.items():
        names = {"model": name, "selection": selection}
        ways = Replay(chosen, strides(file), cost).ways(report, **names)
        for plan in plans:
            row = {"budget MB": plan["budget_bytes"] // common.MB, "kept %": kept}
            row |= predict(plan, neurons_bytes, kept / 100, ways, cost)
            report.add("Decoding, as flash allows", **names, **row)


def plan_of(path: Path, budget: int, context: int, backend: str) -> dict[str, Any]:
    """Return the exact plan, made in a process of its own: a plan counts what its process holds."""
    words = ["plan", str(path), "--memory", f"{budget}MB", "--context", str(context), "--backend", backend]
    plan: dict[str, Any] = common.run([sys.executable, "-m", "edgelm_apps.cli", *words, "--json"]).json()
    return plan


def main() -> None:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=320, help="of the text")
    parser.add_argument("--exact", type=int, default=64, help="tokens at the beginning that use all neurons")
    parser.add_argument("--budgets", nargs="*", type=int, help="MB; default: two for each model")
    parser.add_argument("--context", type=int, help="of the plans; default: 1024 for SmolLM2, 2048 for Gemma")
    parser.add_argument("--backend", default="llamacpp", help="whose plans the neurons are compared with")
    args = parser.parse_args()
    report = common.Report(
        "neurons",
        {"tokens": args.tokens, "of these exact": args.exact, "context": args.context or "1024 and 2048",
         "acceptable": f"KL <= {MOST_KL} or agreement >= {LEAST_AGREEMENT} %", "computed by": "numpy, float32"},
    )  # fmt: skip
    for name in args.models:
        measure(report, name, args)
    report.finish()


if __name__ == "__main__":
    main()
