"""`mambastyle evaluate inversion`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mambastyle.cli.batch import Batch
from mambastyle.cli.pictures import BatchSize, Device, Inputs, Model

app = typer.Typer(help="Measure a model on pictures it was not trained on.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `inversion` a subcommand while it is the only one."""


@app.command()
def inversion(
    inputs: Inputs,
    model: Model = "kaokore64",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the numbers as JSON.")] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Compare pictures with their inversions: L2, MS-SSIM, perceptual and Frechet distances, milliseconds.

    Each number's name says what made it (fd_small is our own network's, never FID). MAMBASTYLE_SQUEEZENET
    names a SqueezeNet file for the distances that need one; without it they are left out.

    Examples:

        mambastyle evaluate inversion faces/ --out numbers.json
    """
    import json

    from mambastyle import images
    from mambastyle.api import load
    from mambastyle.evaluation.inversion import evaluate
    from mambastyle.files import write_whole

    batch = Batch()
    paths = batch.find(inputs)
    inverter = load(model, device=device, batch_size=batch_size)
    pictures = []
    for path in paths:
        with batch.attempt(path):
            pictures.append(images.center_crop_square(images.read(path, at_least=inverter.resolution)))
            batch.done += 1
    if not pictures:
        return batch.finish()
    numbers = evaluate(inverter, pictures)
    table = Table("metric", "value", box=None, pad_edge=False)
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if out is not None:
        write_whole(out, (json.dumps(numbers, indent=2) + "\n").encode())
    return batch.finish(out)
