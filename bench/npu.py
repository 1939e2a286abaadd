"""The simulated NPU: how far its logits are from the oracle's, and what its schedule predicts for devices of the table.

Every token of a text is computed by both backends and compared: mean and largest KL divergence, and how often the
likeliest token is the same; also with other numbers of outliers. Then the *simulated* seconds of a prompt and of a
token. Nothing here was measured on an NPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import numpy as np

N_TOKENS, N_PROMPT, PASS = 512, 512, 16
OUTLIERS = (0, 1, 2, 4, 8, 16)


def logits_of(model: Path, ids: list[int], backend: str, threads: int) -> Any:
    """Return the logits after every token, in passes of `PASS`."""
    from edgelm.engine.wishes import Wishes
    from edgelm.opening import open_engine

    opened = open_engine(model, Wishes(memory="4GB", backend=backend, threads=threads, context=1024, max_outputs=PASS))
    try:
        passes = (ids[i : i + PASS] for i in range(0, len(ids), PASS))
        return np.concatenate([opened.engine.forward(some, len(some)).copy() for some in passes])
    finally:
        opened.engine.close()


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compared(ours: Any, oracle: Any) -> dict[str, float]:
    kl = (np.exp(oracle) * (oracle - ours)).sum(axis=1)
    same = float((ours.argmax(axis=1) == oracle.argmax(axis=1)).mean())
    return {"mean KL": float(kl.mean()), "max KL": float(kl.max()), "same top token": same}


def predictions(model: Path) -> list[dict[str, Any]]:
    """Return the simulated times of a prompt and of a token on every device."""
    from edgelm.engine.architecture import record
    from edgelm.engine.backend import CacheGroup, PassShape
    from edgelm.engine.ir import place
    from edgelm.engine.registry import get_architecture
    from edgelm.files.gguf import open_model
    from edgelm_npu.cost import predict
    from edgelm_npu.devices import DEVICES

    file = open_model(model)
    trace = record(get_architecture(file.architecture), file, 1024)
    segment = place(trace.ops, trace.values, frozenset([trace.logits])).segment
    groups = (CacheGroup(1024, N_PROMPT),) * len({spec.group for spec in trace.attends})
    found = []
    for device in DEVICES.values():
        prompt, token = (predict(segment, PassShape(n, 1, groups), device) for n in (N_PROMPT, 1))
        found.append(
            {
                "simulated device": f"{device.name}, {device.about}",
                "in order ms": prompt.in_order_s * 1e3,
                "out of order ms": prompt.seconds * 1e3,
                "prompt tok/s": N_PROMPT / prompt.seconds,
                "NPU busy": prompt.npu_s / prompt.seconds,
                "processor busy": prompt.cpu_s / prompt.seconds,
                "token ms": token.seconds * 1e3,
            }
        )
    return found


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=N_TOKENS)
    args = parser.parse_args()
    from edgelm.files.gguf import open_model
    from edgelm.text.tokenizer import load_tokenizer
    from edgelm_npu import numbers

    conditions = {"threads": args.threads, "tokens": args.tokens, "prompt": N_PROMPT, "simulated": "every time"}
    report = common.Report("npu", conditions)
    usual = numbers.OUTLIERS
    for name in args.models:
        model = common.find_model(name)
        ids = load_tokenizer(open_model(model)).encode(common.text_of(model, args.tokens))
        oracle = log_softmax(logits_of(model, ids, "numpy", args.threads))
        for numbers.OUTLIERS in OUTLIERS:
            ours = log_softmax(logits_of(model, ids, "npu", args.threads))
            label = " (the default)" if usual == numbers.OUTLIERS else ""
            found = compared(ours, oracle)
            report.add("against the oracle", model=name, outliers=f"{numbers.OUTLIERS}{label}", **found)
        numbers.OUTLIERS = usual
        for row in predictions(model):
            report.add("predicted, simulated", model=name, **row)
    report.finish()


if __name__ == "__main__":
    main()
