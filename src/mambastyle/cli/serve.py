"""`mambastyle serve`."""

import contextlib
import functools
import re
from pathlib import Path
from typing import Annotated

import typer

from mambastyle.cli.pictures import Device, Model, Precise


def serve(
    model: Model = "kaokore64",
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets the whole network in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 7860,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures that the page offers; contents/ and styles/ in it for stylizing. "
            "Default: the examples that come with this package."
        ),
    ] = None,
    stylizer: Annotated[
        list[str] | None,
        typer.Option(help="A preset or folder that stylizes; may be given again. Default: the presets."),
    ] = None,
    recipes: Annotated[Path, typer.Option(help="The folder of the recipes to train from.")] = Path("recipes"),
    runs: Annotated[Path, typer.Option(help="The folder of the training runs.")] = Path("runs"),
    max_upload: Annotated[
        str, typer.Option(help="The largest file that may be uploaded, such as 500kb or 2gb.")
    ] = "20mb",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: Device = None,
    precision: Precise = "fp32",
) -> None:
    """Serve a page in the browser: edit, stylize, train, and examine this installation.

    It listens on this machine alone unless --host says otherwise, and works without a network: the page
    fetches nothing from elsewhere. Needs the extra [ui].

    Examples:

        mambastyle serve --open

        mambastyle serve --model my-model/ --stylizer my-style/ --port 8000
    """
    from mambastyle.api import load_inverter, load_stylizer
    from mambastyle.cli.demo import examples_folder
    from mambastyle.presets import PRESETS, find_stylizer
    from mambastyle.ui.server import serve as run

    if not re.fullmatch(r"\d+ ?[kmgt]?b", max_upload.lower()):
        raise ValueError(f"--max-upload {max_upload}: expected a size such as 500kb, 20mb or 2gb")
    if examples is not None and not examples.is_dir():
        raise ValueError(f"--examples {examples} is no folder: name one with pictures")
    if examples is None:
        with contextlib.suppress(FileNotFoundError):
            examples = examples_folder()
    installed = [name for name, preset in PRESETS.items() if preset.stylizes and not preset.missing()]
    stylizers = {}
    for source in stylizer or installed:
        # Found now, so that a mistyped one is an error here; loaded when it is first used.
        name = find_stylizer(source).name
        load = functools.partial(load_stylizer, source, device=device, precision=precision)
        stylizers[name] = functools.cache(load)
    run(
        load_inverter(model, device=device, precision=precision),
        host=host,
        port=port,
        stylizers=stylizers,
        runs=runs,
        recipes=recipes,
        examples=examples,
        max_upload=max_upload,
        open_browser=open_browser,
        announce=lambda address: typer.echo(f"the page is at {address} (Ctrl+C ends it)"),
    )
