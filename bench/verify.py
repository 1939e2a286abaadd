"""How close does every backend come to the oracle? Divergence, top-1 agreement, perplexity, errors by operation.

`edgelm verify` on each model, over 2,000 positions of the built-in text. Time is not measured here. The tables are kept
as Markdown beside the JSON.
"""

from __future__ import annotations

import common

import edgelm


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--backends", nargs="+", help="only these")
    parser.add_argument("--memory", help="budget of each process")
    args = parser.parse_args()
    conditions = {"positions": args.positions, "threads": args.threads, "budget": args.memory or "default"}
    report = common.Report("verify", conditions)
    for name in args.models:
        found = edgelm.verify(
            common.find_model(name),
            backends=args.backends,
            positions=args.positions,
            threads=args.threads,
            memory=args.memory,
        )
        add(report, name, found)
    report.finish()
    (common.RESULTS / "verify.md").write_text(report.markdown() + "\n")


def add(report: common.Report, model: str, found: edgelm.Verification) -> None:
    for one in found.backends:
        row = {"model": model, "backend": f"{one.backend} {one.version}", "result": one.status, "reason": one.reason}
        if one.text is not None:
            row |= {
                "arithmetic": one.arithmetic,
                "mean KL": one.text.mean_kl,
                "largest KL": one.text.largest_kl,
                "top-1 %": 100 * one.text.agreement,
                "largest gap at a mismatch": one.text.largest_gap,
                "perplexity": one.text.perplexity,
                "the oracle's": found.oracle_perplexity,
                "mean KL of single tokens": one.greedy_kl,
                "same greedy tokens": ", ".join(
                    str(g.positions if g.first_mismatch is None else g.first_mismatch) for g in one.greedy
                ),
                "conversions": "; ".join(one.conversions),
            }
        report.add("Backends beside the oracle (NumPy)", **row)
        for kind, error in one.operations.items():
            report.add(
                "Largest NMSE of an operation on the oracle's inputs", model=model, backend=one.backend, operation=kind,
                NMSE=error,
            )  # fmt: skip


if __name__ == "__main__":
    main()
