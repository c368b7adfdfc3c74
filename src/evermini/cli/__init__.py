"""The command line: one file per command.

    evermini serve | chat | ask | ingest | contexts | calibrate | eval | doctor | config | pull | models | rm

Exit codes: 0 done; 1 it failed, with the cause and the remedy in one line on stderr; 2 a flag or setting is wrong;
130 interrupted. ``--debug`` (or ``EVERMINI_DEBUG=1``) shows the traceback too. Commands import what they need when they
run, so ``evermini --help`` imports no torch, pydantic or FastAPI.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from evermini import __version__
from evermini.cli.ask import ask
from evermini.cli.chat import chat
from evermini.cli.config import config
from evermini.cli.contexts import contexts
from evermini.cli.doctor import doctor
from evermini.cli.eval import evaluations
from evermini.cli.keys import keys
from evermini.cli.pull import models, pull, rm
from evermini.cli.recall import calibrate, ingest
from evermini.cli.serve import serve
from evermini.cli.storage import gc
from evermini.cli.tune import tune
from evermini.cli.usage import cost, usage
from evermini.errors import ConfigError, EverminiError, InsufficientStorageError

app = typer.Typer(
    name="evermini",
    help="Keeps gpt-4.1-mini alive: its API contract on open weights, on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    serve,
    chat,
    ask,
    ingest,
    calibrate,
    pull,
    models,
    rm,
    usage,
    cost,
    gc,
    doctor,
    config,
):
    app.command()(command)
app.add_typer(contexts, name="contexts")
app.add_typer(keys, name="keys")
app.add_typer(tune, name="tune")
app.add_typer(evaluations, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"evermini {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["EVERMINI_DEBUG"] = "1"


def main() -> None:
    """Run the command line; the one place where an error becomes a line and an exit code."""
    try:
        app(prog_name="evermini")
    except InsufficientStorageError as error:
        _fail(f"{error} Here that is the disk of the home folder: --home names another.")
    except EverminiError as error:
        _fail(str(error), code=2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}. Check the path, its permissions and the disk.")


def _fail(message: str, *, code: int = 1) -> NoReturn:
    """Print an error and exit; called while it is handled, so that it can be shown in full."""
    if os.environ.get("EVERMINI_DEBUG"):
        raise
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {message}", style="red"))
    sys.exit(code)
