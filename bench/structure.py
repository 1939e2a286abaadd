"""Answers kept to the schemas of the JSON Schema Test Suite: are they valid, do they end, and what does it cost?

    python bench/structure.py SUITE [--schemas 200] [--limit 256]

SUITE: the folder of a draft, such as `json/tests/draft2020-12` of the source package of jsonschema
(`pip download --no-deps --no-binary :all: jsonschema`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import common

CONTEXT = 1024


def schemas(suite: Path) -> list[tuple[str, Any]]:
    """Return every schema of the suite with its name, those first that are not about references to other documents."""
    found = []
    for path in sorted(suite.glob("*.json")):
        for number, group in enumerate(json.loads(path.read_text())):
            found.append((f"{path.stem}/{number}", group["schema"]))
    return found


def child(spec: dict[str, Any]) -> dict[str, Any]:
    import jsonschema

    import edgelm

    rows, refused = [], []
    with edgelm.load(
        spec["model"], backend=spec["backend"], threads=spec["threads"], context=CONTEXT, memory="1GB"
    ) as model:
        plain = list(model.stream("Write JSON.\n", max_tokens=64, ignore_eos=True, speculate=False))[-1].usage
        for name, schema in schemas(Path(spec["suite"])):
            if len(rows) == spec["schemas"]:
                break
            prompt = f"Write a short JSON value that is valid against this schema:\n{json.dumps(schema)[:600]}\n"
            try:
                chunks = list(model.stream(prompt, max_tokens=spec["limit"], json_schema=schema, speculate=False))
            except edgelm.ConfigError as error:
                refused.append([name, str(error)[:120]])
                continue
            text, usage = "".join(chunk.text for chunk in chunks), chunks[-1].usage
            ended = chunks[-1].finish_reason == "stop"
            problem = ""
            if ended:
                try:
                    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                except (ValueError, jsonschema.ValidationError) as error:
                    problem = str(error).splitlines()[0][:150]
            decode_s = usage.elapsed_s - (usage.ttft_s or 0)
            rows.append([name, ended, problem, usage.completion_tokens, usage.sample_s, decode_s])
    per_token = plain.sample_s / plain.completion_tokens
    extra_s = sum(row[4] - per_token * (row[3] + row[1]) for row in rows)
    return {
        "schemas": len(rows),
        "refused by name": len(refused),
        "ended": sum(row[1] for row in rows),
        "ended and not valid": [row[:3] for row in rows if row[2]],
        "tokens": sum(row[3] for row in rows),
        "share of decode time %": round(100 * extra_s / sum(row[5] for row in rows), 2),
        "refused": refused,
        "not ended": [row[0] for row in rows if not row[1]],
    }


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--backend", default="llamacpp")
    given = parser.parse_args()
    conditions = {"backend": given.backend, "threads": given.threads, "context": CONTEXT, "limit": given.limit}
    report = common.Report("structure", conditions)
    for name in given.models:
        spec = {"model": str(common.find_model(name)), "suite": str(given.suite.resolve()), "limit": given.limit}
        spec |= {"backend": given.backend, "threads": given.threads, "schemas": given.schemas}
        found = common.run([sys.executable, __file__, "--child", json.dumps(spec)]).json()
        invalid = len(found["ended and not valid"])
        ended = round(100 * found["ended"] / max(found["schemas"], 1), 1)
        report.add(
            "JSON schemas", model=name, **found, **{"ended %": ended, "valid of these": found["ended"] - invalid}
        )
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        main()
