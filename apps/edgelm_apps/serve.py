"""`edgelm serve`: models of this machine for everything that speaks OpenAI's API, and a page to chat with them."""

from __future__ import annotations

from pathlib import Path
from socket import gethostname
from typing import Any

import click

from edgelm_apps.options import (
    adaptive_option,
    complete_model,
    engine_options,
    engine_values,
    offline_option,
    quiet_option,
    sampling_options,
    sampling_values,
    speculation_options,
)


@click.command()
@click.argument("models", nargs=-1, shell_complete=complete_model, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="EDGELM_API_KEY", metavar="KEY", help="What clients must send. [env: EDGELM_API_KEY]")
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="URL",
    help="A site whose pages may ask, too, and whose name may lead here. Repeatable.",
)
@click.option(
    "--queue", type=click.IntRange(min=0), default=16, show_default=True,
    help="Requests that may wait; the next one is told to come back later.",
)  # fmt: skip
@click.option(
    "--keep-alive", type=click.FloatRange(min=0.1), default=5.0, show_default=True, metavar="SECONDS",
    help="A stream that has nothing to say shows so often that it lives.",
)  # fmt: skip
@click.option("--max-request", metavar="SIZE", default="4MB", show_default=True, help="Largest body of a request.")
@click.option(
    "--kept-chats", metavar="SIZE", default="200MB", show_default=True,
    help="Flash for what was computed of other conversations, so that they go on from there; 0 keeps none.",
)  # fmt: skip
@quiet_option
@offline_option
@engine_options
@speculation_options
@adaptive_option
@sampling_options
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    allow_origin: tuple[str, ...],
    queue: int,
    keep_alive: float,
    max_request: str,
    kept_chats: str,
    quiet: bool,
    offline: bool,
    adaptive: bool,
    **given: Any,
) -> int:
    """Serve models to programs that speak OpenAI's API, and a page to chat with them.

    MODEL is a path or a name; without any, smollm2-135m-instruct. Of several, one at a time is loaded: all of them
    share one budget. Sampling options are what holds where a request says nothing.

    The page is at http://127.0.0.1:8080/; clients use http://127.0.0.1:8080/v1 as their base URL.
    """
    from edgelm.errors import ConfigError
    from edgelm.sizes import parse_size
    from edgelm_apps.engine import find_draft, find_model
    from edgelm_models.catalogue import DEFAULT_MODEL

    if given.pop("overflow") == "trim":
        raise ConfigError("a server keeps no conversation that it could trim; clients leave out old turns themselves")
    if api_key is not None and not api_key.strip():
        raise ConfigError("the API key is empty; give one, or leave the option out")
    paths: dict[str, Path] = {}
    for model in models or (DEFAULT_MODEL,):
        path = find_model(model, offline=offline, quiet=quiet)
        name = model if not Path(model).exists() else path.stem
        if name in paths:
            raise ConfigError(f"two models are called {name!r}; give one of the files another name")
        paths[name] = path
    engine = engine_values(given)
    find_draft(engine, offline=offline, quiet=quiet)
    try:
        from edgelm_apps.server.running import run
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'edgelm[serve]'") from error
    from edgelm_apps.server.routes import Settings

    settings = Settings(
        key=api_key.strip() if api_key else None,
        origins=allow_origin,
        names=("localhost", host, gethostname(), f"{gethostname()}.local"),
        queue=queue,
        keep_alive_s=keep_alive,
        most_bytes=parse_size(max_request),
        sampling=sampling_values(given),
    )
    if adaptive:
        engine["adaptive"] = True
    shelf_bytes = parse_size(kept_chats) if kept_chats != "0" else 0
    return run(paths, engine, settings, host, port, quiet, shelf_bytes)
