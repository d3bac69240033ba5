"""The `torchzoo` program: finds the command, runs it, and turns errors into one line and a code."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

from torchzoo.catalogue import suggest
from torchzoo.cli._output import BAD_INPUT, BAD_REQUEST, BROKEN_PIPE, INTERRUPTED, fail, stderr
from torchzoo.errors import TorchzooError, UnknownNameError
from torchzoo.version import __version__

COMMANDS = {
    "quickstart": "torchzoo.cli.quickstart:quickstart",
    "list": "torchzoo.cli.list_:list_",
    "search": "torchzoo.cli.search:search",
    "info": "torchzoo.cli.info:info",
    "cite": "torchzoo.cli.cite:cite",
    "reproduce": "torchzoo.cli.reproduce:reproduce",
    "swap": "torchzoo.cli.swap:swap",
    "finetune": "torchzoo.cli.finetune:finetune",
    "compare": "torchzoo.cli.compare:compare",
    "bench": "torchzoo.cli.bench:bench",
    "compress": "torchzoo.cli.compress:compress",
    "decompress": "torchzoo.cli.decompress:decompress",
    "splat": "torchzoo.cli.splat:splat",
    "doctor": "torchzoo.cli.doctor:doctor",
    "build": "torchzoo.cli.build:build",
}
"""Where each command's function, or typer app, is; imported when it is called or listed."""

_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _Commands(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            raise UnknownNameError(f"no command {cmd_name!r}{suggest(cmd_name, COMMANDS)}")
        module, _, name = COMMANDS[cmd_name].partition(":")
        function = getattr(import_module(module), name)
        if isinstance(function, typer.Typer):
            return typer.main.get_command(function)
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(cmd_name, context_settings=_SETTINGS)(function)
        return typer.main.get_command(single)


def build() -> typer.Typer:
    """The typer app; cheap, as no command is imported yet."""
    app = typer.Typer(
        name="torchzoo",
        cls=_Commands,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings=_SETTINGS,
    )
    app.callback()(_root)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"torchzoo {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """PyTorch layers from papers, each with its proof and its measured claim.

    New here: [bold]torchzoo quickstart[/bold]. Each command's --help has an example.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        argv: The arguments; None takes those of the process. None at all show the help.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            program = typer.main.get_command(build())
            code = program.main(args=args, prog_name="torchzoo", standalone_mode=False)
            if code == INTERRUPTED:  # typer answers Ctrl-C with this code
                raise KeyboardInterrupt
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if os.environ.get("TORCHZOO_DEBUG") == "1":
            raise
        code = _exit_code(error)
    return code if isinstance(code, int) else 0


def _show_warning(message: Warning | str, *_: object) -> None:
    stderr().print(f"warning: {message}", soft_wrap=True, markup=False, style="yellow")


def _exit_code(error: BaseException) -> int:
    """Report an error in a line on stderr and return the exit code it stands for."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        stderr().print("interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more on its way out: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, UnknownNameError):
        return fail(error, BAD_INPUT)
    if isinstance(error, TorchzooError):
        return fail(error, BAD_REQUEST)
    if hasattr(error, "format_message"):  # typer's own, for options and arguments
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        return fail(f"{error.format_message().rstrip('.')}{where}", BAD_INPUT)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("torchzoo"):
        hint = "`torchzoo doctor` names the extra that installs it"
        return fail(f"{error.name} is not installed; {hint}", BAD_REQUEST)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return fail("the disk is full", BAD_REQUEST)
    hint = "set TORCHZOO_DEBUG=1 for the traceback"
    return fail(f"{type(error).__name__}: {error} ({hint})", BAD_REQUEST)


if __name__ == "__main__":
    sys.exit(main())
