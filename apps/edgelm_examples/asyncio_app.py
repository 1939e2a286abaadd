"""Questions answered at the same time in one event loop, beside whatever else runs there:
`python apps/edgelm_examples/asyncio_app.py model.gguf "What is rain?" "What is snow?" --timeout 20`.

One model computes one answer at a time, the others wait; the loop is never blocked. Cancelling the task of an
answer (here: a timeout, or Ctrl-C) stops that answer alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import edgelm

BEAT_S = 0.05


class Answer(NamedTuple):
    """What came of a question: the text so far, and how it ended ("stop", "length", "timeout", or an error)."""

    text: str
    ended: str


async def answer(model: edgelm.Model, question: str, timeout_s: float, most_tokens: int) -> Answer:
    """Answer in a chat of its own. The timeout counts from now, waiting for other answers included."""
    pieces: list[str] = []
    try:
        async with asyncio.timeout(timeout_s):  # cancels this task's stream, which waits for its thread to stop
            async for chunk in model.chat().astream(question, max_tokens=most_tokens):
                pieces.append(chunk.text)
    except TimeoutError:
        return Answer("".join(pieces), "timeout")
    except edgelm.EdgeLMError as error:
        return Answer("".join(pieces), str(error))
    return Answer("".join(pieces), chunk.finish_reason or "")


async def answer_all(
    model: edgelm.Model,
    questions: Sequence[str],
    timeout_s: float,
    most_tokens: int,
    done: Callable[[str, Answer], Awaitable[None]],
) -> None:
    """Answer all at once; `done` hears of each as it is ready."""

    async def one(question: str) -> None:
        await done(question, await answer(model, question, timeout_s, most_tokens))

    async with asyncio.TaskGroup() as group:
        for question in questions:
            group.create_task(one(question))


async def longest_gap(stop: asyncio.Event) -> float:
    """Return by how many seconds the loop was late at worst: stands for everything else that an application does."""
    worst = 0.0
    while not stop.is_set():
        began = time.perf_counter()
        await asyncio.sleep(BEAT_S)
        worst = max(worst, time.perf_counter() - began - BEAT_S)
    return worst


async def serve(asked: argparse.Namespace) -> None:
    # loading takes seconds, so it has a thread; the model may then be used from any
    model = await asyncio.to_thread(edgelm.load, asked.model, memory=asked.memory, context=asked.context)
    try:
        stop = asyncio.Event()
        beats = asyncio.create_task(longest_gap(stop))

        async def show(question: str, found: Answer) -> None:
            print(f"> {question}\n{found.text.strip()}\n[{found.ended}]\n", flush=True)

        await answer_all(model, asked.questions, asked.timeout, asked.max_tokens, show)
        stop.set()
        print(f"the loop was never more than {await beats:.3f} s late", file=sys.stderr)
    finally:
        await asyncio.to_thread(model.close)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Answer questions at the same time in one event loop.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--memory", help="budget of the whole process (default: what can be spared)")
    parser.add_argument("--context", type=int, help="tokens that a question and its answer may have together")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for each answer")
    asked = parser.parse_args(argv)
    try:
        asyncio.run(serve(asked))
    except edgelm.EdgeLMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
