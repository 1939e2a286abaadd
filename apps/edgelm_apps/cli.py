"""The `edgelm` command: finds the subcommand, turns errors into one sentence and an exit code.

Knows no option and no engine; a subcommand's module is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from edgelm_apps.help_ends import end_of
from edgelm_apps.output import print_error

COMMANDS = {
    "chat": "edgelm_apps.chat:chat",
    "run": "edgelm_apps.run:run",
    "serve": "edgelm_apps.serve:serve",
    "plan": "edgelm_apps.plan:plan",
    "profile": "edgelm_apps.profile:profile",
    "bench": "edgelm_apps.bench:bench",
    "verify": "edgelm_apps.verify:verify",
    "score": "edgelm_apps.score:score",
    "embed": "edgelm_apps.embed:embed",
    "pull": "edgelm_apps.models:pull",
    "list": "edgelm_apps.models:list_models",
    "show": "edgelm_apps.show:show",
    "pack": "edgelm_apps.pack:pack",
    "draft": "edgelm_apps.draft:draft",
    "rm": "edgelm_apps.models:rm",
    "backends": "edgelm_apps.device:backends",
    "doctor": "edgelm_apps.device:doctor",
    "pi": "edgelm_apps.pi.commands:pi",
    "completion": "edgelm_apps.completion:completion",
}
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        command.epilog = end_of(cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader has gone (`edgelm run ... | head -1`): nothing can or need be said.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_BROKEN_PIPE)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from edgelm import __version__

    click.echo(f"edgelm {__version__}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`edgelm COMMAND --help` ends with examples, exit codes and environment variables.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def cli() -> None:
    """Run small language models inside a memory budget that you set."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code; prints errors, raises none of its own."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the answer
    # edgelm's own threads compute; those of NumPy's BLAS would spin for 20 ms when they start, and then never be used
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = cli.main(args=argv, prog_name="edgelm", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        print_error(error.format_message())
        return error.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        from edgelm.errors import EdgeLMError

        if not isinstance(error, EdgeLMError):
            raise
        print_error(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
