"""`mambastyle directions list|discover`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mambastyle.cli.pictures import Device, Model

app = typer.Typer(help="The directions that pictures can be edited along.", no_args_is_help=True)


class Method(StrEnum):
    pca = "pca"
    boundary = "boundary"
    both = "both"


@app.command("list")
def list_directions(model: Model = "kaokore64") -> None:
    """List the directions of a model, or of a file with directions.

    Examples:

        mambastyle directions list

        mambastyle directions list -m my/directions.safetensors
    """
    from mambastyle import checkpoints
    from mambastyle.latents.directions import KIND, Directions
    from mambastyle.presets import find_model

    path = Path(model)
    if not (path.is_file() and checkpoints.read_header(path).kind == KIND):
        found = find_model(model).directions
        if found is None:
            typer.echo(
                f"{model} has no directions: find some with `mambastyle directions discover -m {model}`"
            )
            return
        path = found
    table = Table("name", "space", "layers", "description", box=None, pad_edge=False)
    for direction in Directions.load(path).values():
        layers = "all" if direction.layers is None else "{}:{}".format(*direction.layers)
        table.add_row(direction.name, direction.space, layers, direction.description)
    Console().print(table)


@app.command()
def discover(
    out: Annotated[Path, typer.Argument(help="The file to write, such as directions.safetensors.")],
    model: Model = "kaokore64",
    method: Annotated[Method, typer.Option(help="Principal components, or boundaries between labels.")] = (
        Method.both
    ),
    heads: Annotated[
        list[str] | None,
        typer.Option("--head", help="boundary: a classifier's question; default: gender and status."),
    ] = None,
    components: Annotated[int, typer.Option(min=1, help="pca: how many components.")] = 10,
    samples: Annotated[int, typer.Option(min=100, help="How many latents to draw.")] = 10_000,
    truncation_psi: Annotated[float, typer.Option(help="Truncation of the drawn latents.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the drawn latents.")] = 0,
    classifier: Annotated[
        Path | None,
        typer.Option(help="boundary: a classifier's file; default: the model's features.safetensors."),
    ] = None,
    device: Device = None,
) -> None:
    """Find directions in a model's generator and write them as one file.

    pca: the principal components of w (GANSpace). boundary: generated pictures are labelled by the model's
    classifier, and a linear boundary between the labels gives the direction
    (InterFaceGAN).

    Examples:

        mambastyle directions discover boundaries.safetensors --head gender --head status

        mambastyle directions discover pca.safetensors --method pca --components 20
    """
    from mambastyle.training.directions import discover as run

    found = run(
        model,
        method=method.value,
        heads=heads,
        components=components,
        samples=samples,
        truncation_psi=truncation_psi,
        seed=seed,
        device=device,
        classifier=classifier,
    )
    found.save(out)
    typer.echo(f"{len(found)} directions ({', '.join(found)}) written to {out}")
