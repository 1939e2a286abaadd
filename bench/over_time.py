"""Memory of the process over time at several budgets, as `edgelm profile` samples it: every 20 ms, from its parent.

Writes what docs/figures/memory-over-time.svg is drawn from.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import common

BUDGETS_MB = (110, 150, 200)
TOKENS = 48


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    given = parser.parse_args()
    conditions = {"threads": given.threads, "backend": "llamacpp", "context": 1024, "tokens": TOKENS}
    report = common.Report("over_time", conditions)
    model = common.find_model(common.MODELS[0])
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "profile.json")
        budgets = ",".join(f"{budget}MB" for budget in BUDGETS_MB)
        argv = [sys.executable, "-c", common.COMMAND, "profile", str(model), "--memory", budgets, "--quiet"]
        argv += ["--tokens", str(TOKENS), "--json", str(found)]
        argv += ["--threads", str(given.threads), "--backend", "llamacpp"]
        done = common.run(argv)
        if done.exit_code:
            raise SystemExit(done.stderr)
        profile = json.loads(found.read_text())
    for run in profile["runs"]:
        report.add(
            "memory over time",
            **{
                "model": common.MODELS[0],
                "budget MB": run["budget_bytes"] / common.MB,
                "peak MB": round(run["usage"]["peak_bytes"] / common.MB, 2),
                "held": run["usage"]["peak_bytes"] <= run["budget_bytes"],
                "decode tok/s": round(run["usage"]["decode_tps"], 1),
                "samples": [[round(at_s, 3), round(rss / common.MB, 2)] for at_s, rss in run["memory"]],
            },
        )
    report.finish()


if __name__ == "__main__":
    main()
