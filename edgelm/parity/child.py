"""One backend with a model, in a process of its own: `python -m edgelm.parity.child SPEC`.

SPEC is a JSON object: `do` ("serve" or "operations"), `path`, `backend`, `threads`, and `memory`, `context`, `ids`.
Answers are lines of JSON on stdout, each followed by the bytes that it announces. "serve" then reads one request a line
from stdin: `ids` to append, `clear` the cache before it or not, `rows`: how many rows of logits to answer with.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np

from edgelm.engine.registry import get_backend
from edgelm.engine.wishes import Wishes
from edgelm.errors import BudgetTooSmall, EdgeLMError
from edgelm.opening import Opened, open_engine

ROWS = (64, 16, 1)
"""Rows of logits of one pass: as many as the budget allows."""


def main(spec: dict[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    try:
        if spec["do"] == "operations":
            from edgelm.parity.operations import errors_of

            errors = errors_of(spec["path"], spec["backend"], spec["ids"], spec["threads"])
            _answer(answers, {"errors": errors})
        else:
            _serve(spec, requests, answers)
    except EdgeLMError as error:
        _answer(answers, {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code})


def _serve(spec: dict[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    opened = _open(spec)
    engine, can = opened.engine, get_backend(opened.backend).capabilities()
    try:
        _answer(
            answers,
            {
                "rows": getattr(engine, "max_outputs", 1),
                "budget_bytes": engine.plan.budget_bytes,
                "streamed_bytes": engine.plan.streamed_bytes,
                "activations": can.activations,
                "simulated": can.simulated,
                "conversions": opened.lost,
            },
        )
        for line in requests:
            request = json.loads(line)
            if request["clear"]:
                engine.truncate(0)
            logits = engine.forward(request["ids"], request["rows"])
            _answer(answers, {"shape": logits.shape}, np.ascontiguousarray(logits, np.float32).data.cast("B"))
    finally:
        engine.close()


def _open(spec: dict[str, Any]) -> Opened:
    widths = [rows for rows in ROWS if rows <= spec["context"]]
    wishes = Wishes(**{key: spec[key] for key in ("memory", "backend", "threads", "context")})
    for rows in widths[:-1]:
        try:
            return open_engine(spec["path"], wishes._replace(max_outputs=rows))
        except BudgetTooSmall:
            continue
    return open_engine(spec["path"], wishes._replace(max_outputs=widths[-1]))


def _answer(answers: BinaryIO, said: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    answers.write(json.dumps(said).encode() + b"\n")
    answers.write(payload)
    answers.flush()


if __name__ == "__main__":
    # what libraries print must not get between the answers
    with os.fdopen(os.dup(1), "wb") as own:
        os.dup2(2, 1)
        main(json.loads(sys.argv[1]), sys.stdin.buffer, own)
