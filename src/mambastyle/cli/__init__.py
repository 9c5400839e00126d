"""The command `mambastyle`: parsing and printing only; what needs torch is imported when a command runs."""

import os
import sys
import traceback
from importlib import metadata
from typing import Annotated

import click
import typer

from mambastyle.allocator import keep_freed_memory
from mambastyle.cli import (
    about,
    convert,
    demo,
    directions,
    evaluate,
    export,
    jobs,
    pictures,
    serve,
    stylize,
    train,
)
from mambastyle.cli.batch import one_line

app = typer.Typer(
    name="mambastyle",
    help="Invert, edit and render pictures with MambaStyle, stylize them, and train the models.",
    epilog=(
        "Examples:\n\n"
        "  mambastyle invert faces/ --out out\n\n"
        "  mambastyle edit face.png -e gender=1.5 --out out\n\n"
        "  mambastyle edit faces/*.png -e gender --grid --strengths -2,-1,0,1,2\n\n"
        "  mambastyle stylize photo.jpg --style painting.jpg\n\n"
        "Each command teaches more with --help. MAMBASTYLE_DEBUG=1 shows where an error came from."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(pictures.invert)
app.command()(pictures.edit)
app.command()(pictures.render)
app.command()(stylize.stylize)
app.command()(demo.demo)
app.command()(serve.serve)
app.add_typer(jobs.app, name="batch")
app.add_typer(train.app, name="train")
app.add_typer(directions.app, name="directions")
app.add_typer(evaluate.app, name="evaluate")
app.command()(convert.convert)
app.command()(export.export)
app.command()(about.info)
app.command()(about.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mambastyle {metadata.version('mambastyle')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Invert, edit and render pictures with MambaStyle, stylize them, and train the models."""


def main() -> None:
    """Run the command line; what a user can cause ends in one line and an exit code other than 0."""
    keep_freed_memory()
    try:
        app()
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if os.environ.get("MAMBASTYLE_DEBUG"):
            traceback.print_exc()
        if isinstance(error, TypeError | RuntimeError) and not _is_out_of_memory(error):
            # These are ours to mend: the traceback is worth more than the line.
            traceback.print_exc()
        _fail(one_line(error), 1)


def _is_out_of_memory(error: BaseException) -> bool:
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
