"""`edgelm run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm_apps.options import (
    adaptive_option,
    engine_options,
    engine_values,
    json_option,
    keeping_options,
    model_argument,
    offline_option,
    parallel_option,
    quiet_option,
    sampling_options,
    sampling_values,
    speculation_options,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from edgelm import Chunk, Model


@click.command()
@model_argument()
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "--prompt-file",
    type=click.File("rb"),
    metavar="FILE",
    help="Take the prompt from FILE, byte for byte; stdin is left alone.",
)
@click.option("--raw", is_flag=True, help="No chat template: the model continues the text itself.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token, for measuring.")
@click.option("--show-prompt", is_flag=True, help="Show the rendered prompt (stderr; field `prompt` of --json).")
@json_option
@quiet_option
@offline_option
@engine_options
@speculation_options
@keeping_options
@adaptive_option
@sampling_options
@parallel_option
@click.option(
    "--logprobs",
    type=click.IntRange(0, 20),
    metavar="N",
    help="With --json: each token's log-probability, and those of the N likeliest.",
)
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Answer with JSON that is valid against this schema.",
)
@click.option("--regex", metavar="PATTERN", help="Answer with text that matches the whole PATTERN.")
@click.option(
    "--grammar",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Answer with text of this grammar: Lark's notation or GBNF.",
)
def run(model: str, as_json: bool, quiet: bool, offline: bool, show_prompt: bool, adaptive: bool, **given: Any) -> int:
    """Answer one prompt.

    MODEL is a path or a name: a name that is not on this machine is pulled.

    Text on stdin is joined to PROMPT after a blank line, or is the prompt if there is none.
    """
    from edgelm_apps.engine import find_draft, find_model, interruptible, open_model, start_lines
    from edgelm_apps.output import Asides, note, print_json

    prompt = _prompt(given.pop("prompt"), given.pop("prompt_file"))
    engine, sampling = engine_values(given), sampling_values(given)
    sampling |= _form(given.pop("json_schema"), given.pop("regex"), given.pop("grammar"))
    if (logprobs := given.pop("logprobs")) is not None:
        if not as_json:
            raise click.UsageError("--logprobs are shown with --json: add it")
        if "parallel" in engine:
            raise click.UsageError("--logprobs are of one answer, and -n gives several: give one of them")
        sampling["logprobs"] = logprobs
    if given.pop("ignore_eos"):
        sampling["ignore_eos"] = True
    if given["raw"] and given["system"] is not None:
        raise click.UsageError("--system needs the chat template, and --raw leaves it out: give one of them")
    if given["raw"] and given["overflow"] is not None:
        raise click.UsageError("--overflow is about turns of a chat, and --raw has none: give one of them")
    path = find_model(model, offline=offline, quiet=quiet)
    find_draft(engine, offline=offline, quiet=quiet)
    asides = Asides(quiet or as_json)
    if adaptive:
        engine["adaptive"] = asides.add
    with open_model(path, engine, quiet=quiet or as_json) as loaded:
        if not quiet and not as_json:
            for line in start_lines(loaded):
                note(line)
            if not given["raw"] and loaded.template.notice:
                note(loaded.template.notice)
        if "parallel" in engine:
            return _several(loaded, prompt, engine["parallel"], given, sampling, as_json)
        rendered, chunks = _answer(loaded, prompt, given, sampling)
        if show_prompt and not as_json:
            click.echo(rendered, err=True)
        told = len(loaded.notes)
        with interruptible(loaded), closing(chunks):
            result = _collect(chunks, _say_nothing if as_json else _say, loaded)
        asides.show()
        if not quiet and not as_json:
            for line in loaded.notes[told:]:  # what became of a system message that is to be kept
                note(line)
            if result["closed"]:
                note("the answer was brought to an end since its limit came near; --max-tokens gives it more room")
        if as_json:
            print_json(result | {"prompt": rendered} if show_prompt else result)
    return 130 if result["finish_reason"] == "cancelled" else 0


def _several(model: Model, prompt: str, n: int, given: dict[str, Any], sampling: dict[str, Any], as_json: bool) -> int:
    """Give several answers, the likeliest first."""
    from dataclasses import asdict

    from edgelm_apps.engine import interruptible
    from edgelm_apps.output import print_json

    with interruptible(model):
        if given["raw"]:
            samples = model.samples(prompt, n, **sampling)
        else:
            samples = model.chat(given["system"], overflow=given["overflow"] or "error").samples(prompt, n, **sampling)
    code = 130 if any(one.finish_reason == "cancelled" for one in samples) else 0
    if as_json:
        print_json({"answers": [asdict(one) for one in samples]})
        return code
    for number, one in enumerate(samples, 1):
        click.echo(f"--- {number}, mean log-probability {one.mean_logprob:.3f}\n{one.text}")
    return code


def _prompt(prompt: str | None, file: Any) -> str:
    if file is not None:
        if prompt is not None:
            raise click.UsageError("give PROMPT or --prompt-file, not both")
        return decoded(file.read(), file.name)
    joined = (
        "" if sys.stdin.isatty() else decoded(sys.stdin.buffer.read(), "stdin").removesuffix("\n").removesuffix("\r")
    )
    parts = [part for part in (prompt, joined) if part]
    if not parts:
        raise click.UsageError("there is no prompt: give PROMPT, pipe text into stdin, or use --prompt-file")
    return "\n\n".join(parts)


def _form(schema: Path | None, regex: str | None, grammar: Path | None) -> dict[str, Any]:
    """Return the options that give an answer its form."""
    form: dict[str, Any] = {}
    if schema is not None:
        try:
            form["json_schema"] = json.loads(_text_of(schema))
        except ValueError as error:
            raise click.UsageError(f"{schema} is not JSON: {error}") from error
        if form["json_schema"] is None:  # to Python this is no form at all
            raise click.UsageError(f"{schema} holds null, which is no JSON schema: give an object, true or false")
    if regex is not None:
        form["regex"] = regex
    if grammar is not None:
        form["grammar"] = _text_of(grammar)
    return form


def _text_of(path: Path) -> str:
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}") from error


def decoded(data: bytes, where: str) -> str:
    """Return what somebody gave as a prompt as text; raises `UsageError` if it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{where} is not UTF-8 text (byte {error.start}); convert it first") from error


def _answer(
    model: Model, prompt: str, given: dict[str, Any], sampling: dict[str, Any]
) -> tuple[str, Generator[Chunk, None, None]]:
    from edgelm_apps.engine import ask, complete

    if given["raw"]:
        return prompt, complete(model, prompt, sampling)
    chat = model.chat(given["system"], overflow=given["overflow"] or "error", keep=given["keep_system"])
    return chat.render(prompt), ask(chat, prompt, sampling)


def _collect(chunks: Generator[Chunk, None, None], say: Callable[[str], None], model: Model) -> dict[str, Any]:
    from edgelm_apps.engine import statistics

    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[dict[str, Any]] = []
    last: Chunk | None = None
    for last in chunks:
        texts.append(last.text)
        if last.token_id is not None:
            token_ids.append(last.token_id)
        if last.logprobs is not None:
            logprobs.append(_logprobs(last, model))
        say(last.text)
    say("\n")
    assert last is not None, "a stream ends with a chunk that says why"
    return {
        "text": "".join(texts),
        "token_ids": token_ids,
        "prompt_tokens": last.usage.prompt_tokens,
        "completion_tokens": last.usage.completion_tokens,
        "finish_reason": last.finish_reason,
        "closed": last.closed,
        "backend": last.usage.backend,
        "budget_bytes": last.usage.budget_bytes,
        "approximate": last.usage.approximate,
        "simulated": last.usage.simulated,
        "stats": statistics(last.usage),
    } | ({"logprobs": logprobs} if logprobs else {})


def _logprobs(chunk: Chunk, model: Model) -> dict[str, Any]:
    assert chunk.logprobs is not None
    assert chunk.token_id is not None

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token_id": token, "token": model.tokenizer.decode([token], special=True), "logprob": logprob}

    return one(chunk.token_id, chunk.logprobs.logprob) | {"top": [one(*other) for other in chunk.logprobs.top]}


def _say(text: str) -> None:
    if text:
        click.echo(text, nl=False)  # click flushes, so that each piece appears as it comes


def _say_nothing(text: str) -> None:
    """With --json the text is printed once, at the end."""
