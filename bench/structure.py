"""Answers kept to the schemas of the JSON Schema Test Suite: are they valid, do they end, and what does it cost?

    python bench/structure.py SUITE [--schemas 200] [--limit 256]

SUITE: the folder `json/tests` of the source package of jsonschema (`pip download --no-deps --no-binary :all:
jsonschema`). Schemas are taken from the newest draft on, each once, until enough of them were not refused: one draft
alone has fewer than 200 that llguidance supports. Decoding is greedy, with no other options. Formats are not checked:
to jsonschema they are annotations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import common

CONTEXT = 1024
DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}


def schemas(suite: Path) -> list[tuple[str, Any]]:
    """Return every schema of the suite once, with its name; each says its draft, as in the suite its folder does."""
    found: dict[str, tuple[str, Any]] = {}
    for draft, dialect in DRAFTS.items():
        paths = sorted((suite / draft).glob("*.json"))
        if not paths:
            sys.exit(f"{suite / draft} holds no schemas: give the folder json/tests of jsonschema's source package")
        for path in paths:
            for number, group in enumerate(json.loads(path.read_text())):
                schema = group["schema"]
                if isinstance(schema, dict):
                    key = json.dumps({**schema, "$schema": ""}, sort_keys=True)
                    schema = {"$schema": dialect, **schema}
                else:
                    key = json.dumps(schema)
                found.setdefault(key, (f"{draft}/{path.stem}/{number}", schema))
    return list(found.values())


def problem_of(text: str, schema: Any) -> str:
    """Return why an answer is not valid against its schema, by the draft that this names; empty if it is."""
    import jsonschema

    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator(schema).validate(json.loads(text))
    except Exception as error:  # what cannot be validated counts as not valid, whatever the reason
        return (str(error).splitlines() or [type(error).__name__])[0][:150]
    return ""


def child(spec: dict[str, Any]) -> dict[str, Any]:
    import edgelm

    rows, refused = [], []
    with edgelm.load(
        spec["model"], backend=spec["backend"], threads=spec["threads"], context=CONTEXT, memory="1GB"
    ) as model:
        plain = list(model.stream("Write JSON.\n", max_tokens=128, ignore_eos=True, speculate=False))[-1].usage
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
            problem = problem_of(text, schema) if ended else ""
            decode_s = usage.elapsed_s - usage.ttft_s
            rows.append([name, ended, problem, usage.completion_tokens, usage.sample_s, decode_s, chunks[-1].closed])
    per_token = plain.sample_s / plain.completion_tokens
    extra_s = sum(row[4] - per_token * (row[3] + row[1]) for row in rows)
    return {
        "schemas": len(rows),
        "refused by name": len(refused),
        "ended": sum(row[1] for row in rows),
        "of these closed near the limit": sum(row[6] for row in rows),
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
        found = common.answer_of_child(__file__, spec)
        ended, invalid = found["ended"], len(found["ended and not valid"])
        percent = round(100 * ended / max(found["schemas"], 1), 1)
        report.add("JSON schemas", model=name, **found, **{"ended %": percent, "valid of these": ended - invalid})
    report.finish()


if __name__ == "__main__":
    common.main_or_child(main, child)
