"""Options that several commands share, and the values they become. Checks nothing that the engine checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from edgelm import devices

F = TypeVar("F", bound=Callable[..., Any])


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of the catalogue and the cache; anything else is a file."""
    from edgelm_models.listing import listing

    found = [CompletionItem(model.name) for model in listing() if model.name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def model_argument(name: str = "model", required: bool = True) -> Callable[[F], F]:
    return click.argument(name, required=required, shell_complete=complete_model)


def _biases(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    biases = {}
    for value in values:
        token_id, _, bias = value.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=BIAS, such as 42=-100") from None
    return biases


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def complete_device(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of simulated devices."""
    return [CompletionItem(name, help=one.about) for name, one in devices().items() if name.startswith(incomplete)]


simulate_option = click.option(
    "--simulate",
    metavar="DEVICE",
    shell_complete=complete_device,
    help="Slow flash down to that of another device, with its threads and budget unless you give yours; "
    f"the processor stays this machine's. One of {', '.join(devices())}.",
)


_memory = click.option(
    "--memory",
    metavar="SIZE",
    help="Budget of the whole process: 300MB, 1GiB. [default: what the device can spare]",
)
_threads = click.option(
    "--threads", type=click.IntRange(min=1), help="Computing threads. [default: free physical cores]"
)
_context = click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens that prompt and answer may have. [default: what model and budget allow]",
)

_no_spill = click.option(
    "--no-spill",
    "spill",
    flag_value=False,
    default=None,
    help="Refuse a --context that memory cannot hold. [default: its oldest keys and values go to flash and are read "
    "back for every token]",
)

_approximate = (
    click.option(
        "--attention",
        type=click.Choice(["exact", "important", "filtered"]),
        help="APPROXIMATE unless exact. important: of a long prompt, each layer keeps the tokens that its end attends "
        "to. filtered: the first blocks read it, and the rest see only the tokens that these attend to. "
        "[default: exact]",
    ),
    click.option(
        "--kept",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="SHARE",
        help="Share of the context that an approximate attention keeps of a longer prompt. [default: 0.25]",
    ),
)


def size_options(command: F) -> F:
    """`--memory --threads --context`: how much of a device a model may take."""
    return _together(_memory, _threads, _context)(command)


def budget_options(command: F) -> F:
    """`--memory --threads --context --simulate`: how a model is loaded, whatever computes."""
    return _together(_memory, _threads, _context, simulate_option)(command)


def engine_options(command: F) -> F:
    """`--memory --backend --threads --context --no-spill --kv --attention --kept --simulate`: how a model is loaded."""
    return _together(
        _memory,
        click.option(
            "--backend",
            metavar="NAME",
            help="What computes; `edgelm backends MODEL` compares them. Two with a plus between them: prompts on the "
            "first, answers on the second (npu+llamacpp). [default: the fastest healthy one]",
        ),
        _threads,
        _context,
        _no_spill,
        click.option(
            "--kv",
            metavar="TYPE",
            help="Type of keys and values in the cache: f16, q8_0, q4_0, two with a colon (q8_0:q4_0), or auto. "
            "[default: f16]",
        ),
        *_approximate,
        simulate_option,
    )(command)


def sampling_options(command: F) -> F:
    """Everything that chooses the next token, and when to stop."""
    return _together(
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            help="Longest answer, in tokens. [default: until the model ends it]",
        ),
        click.option(
            "--temperature", type=click.FloatRange(min=0), help="0 always takes the likeliest token. [default: 0]"
        ),
        click.option("--top-k", type=click.IntRange(min=0), help="Choose among the K likeliest tokens; 0 is all."),
        click.option(
            "--top-p", type=click.FloatRange(0, 1), help="Choose among the likeliest tokens that add up to P."
        ),
        click.option(
            "--min-p", type=click.FloatRange(0, 1), help="Drop tokens less likely than P times the likeliest."
        ),
        click.option("--typical-p", type=click.FloatRange(0, 1), help="Keep the most typical tokens that add up to P."),
        click.option("--repeat-penalty", type=float, help="Divide the logits of recent tokens by this; 1 is off."),
        click.option("--presence-penalty", type=float, help="Subtract this from the logit of every token seen."),
        click.option("--frequency-penalty", type=float, help="Subtract this for each time a token was seen."),
        click.option(
            "--logit-bias",
            callback=_biases,
            multiple=True,
            metavar="ID=BIAS",
            help="Add BIAS to the logit of token ID. Repeatable.",
        ),
        click.option(
            "--dry-multiplier",
            type=float,
            help="Subtract this and more from tokens that repeat a passage; 0 is off.",
        ),
        click.option("--dry-base", type=float, help="How fast that grows with the passage. [default: 1.75]"),
        click.option("--dry-allowed-length", type=int, help="Tokens that may be repeated freely. [default: 2]"),
        click.option("--top-n-sigma", type=float, help="Drop tokens N deviations below the best; 0 is off."),
        click.option("--xtc-probability", type=float, help="How often to exclude the top choices; 0 is off."),
        click.option("--xtc-threshold", type=float, help="What makes a token a top choice. [default: 0.1]"),
        click.option("--dynatemp-range", type=float, help="How far the temperature follows the entropy; 0 is off."),
        click.option("--dynatemp-exponent", type=float, help="How it does so. [default: 1]"),
        click.option("--mirostat-tau", type=float, help="Keep the surprise at so many bits (mirostat 2.0); 0 is off."),
        click.option("--mirostat-eta", type=float, help="How fast that is learned. [default: 0.1]"),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT. Repeatable."),
        click.option(
            "--overflow",
            type=click.Choice(["error", "trim"]),
            help="When the context is full: fail, or drop the oldest turns. [default: error]",
        ),
    )(command)


def speculation_options(command: F) -> F:
    """`--draft --no-speculate`: who guesses tokens."""
    return _together(
        click.option(
            "--draft",
            metavar="MODEL",
            shell_complete=complete_model,
            help="A smaller model of the same vocabulary that guesses tokens, within the same budget; worth it where "
            "weights are read from flash. auto: the copy that `edgelm draft` made of the model.",
        ),
        click.option(
            "--no-speculate", is_flag=True, help="Compute one token after the other, instead of verifying guesses."
        ),
    )(command)


def keeping_options(command: F) -> F:
    """`--keep-system --keep-guesses`: what the next start finds in the cache folder."""
    return _together(
        click.option(
            "--keep-system",
            is_flag=True,
            help="Keep what is computed of the system message on flash, for the next start.",
        ),
        click.option(
            "--keep-guesses",
            is_flag=True,
            default=None,
            help="Keep what is learned for guessing tokens on flash, for the next start.",
        ),
    )(command)


parallel_option = click.option(
    "-n",
    "parallel",
    type=click.IntRange(min=2),
    metavar="N",
    help="N answers, computed side by side; the likeliest comes first.",
)
adaptive_option = click.option(
    "--adaptive", is_flag=True, help="Give memory back while the device is short of it; take it again afterwards."
)
offline_option = click.option("--offline", is_flag=True, help="Fetch nothing: use only what is on this machine.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Nothing on stderr but errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

_ENGINE = (
    "memory", "backend", "threads", "context", "spill", "kv", "attention", "kept", "simulate", "speculate",
    "draft", "keep_guesses", "parallel",
)  # fmt: skip
_SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length", "top_n_sigma", "xtc_probability",
    "xtc_threshold", "dynatemp_range", "dynatemp_exponent", "mirostat_tau", "mirostat_eta", "seed",
)  # fmt: skip


def engine_values(given: dict[str, Any]) -> dict[str, Any]:
    """Take the engine options out of `given`; those not given are left to the engine's defaults."""
    if given.pop("no_speculate", False):
        given["speculate"] = False
    return {key: value for key in _ENGINE if (value := given.pop(key, None)) is not None}


def sampling_values(given: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling options out of `given`; those not given are left to the engine's defaults."""
    values = {key: value for key in _SAMPLING if (value := given.pop(key)) is not None}
    if biases := given.pop("logit_bias"):
        values["logit_bias"] = biases
    if stops := given.pop("stop"):
        values["stop"] = list(stops)
    return values
