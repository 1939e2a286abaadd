"""`edgelm completion`: the script that teaches a shell the commands, options and model names."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options and names of models in SHELL."""
    from click.shell_completion import get_completion_class

    from edgelm_apps.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "edgelm", "_EDGELM_COMPLETE").source())
