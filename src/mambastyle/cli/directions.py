"""`mambastyle directions list|discover|learn|join|text`."""

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


class Half(StrEnum):
    first = "first"
    second = "second"
    both = "both"


class TextMethod(StrEnum):
    optimise = "optimise"
    table = "global"


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
    made = {"model": model, "method": method.value, "samples": samples, "truncation_psi": truncation_psi}
    found.save(out, card={"command": "directions discover", **made, "seed": seed})
    typer.echo(f"{len(found)} directions ({', '.join(found)}) written to {out}")


@app.command()
def learn(
    out: Annotated[Path, typer.Argument(help="The file to write, such as directions.safetensors.")],
    pack: Annotated[
        Path,
        typer.Option(
            help="Labelled pictures: a zip or folder with labels.csv (file, split, a column a head)."
        ),
    ],
    model: Model = "kaokore64",
    heads: Annotated[
        list[str] | None,
        typer.Option(
            "--head", help="A classifier's question and the pack's column; default: gender and status."
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", help="Of heads with more than two labels, only these; default: all."),
    ] = None,
    split: Annotated[str, typer.Option(help="The pictures to learn from.")] = "train",
    half: Annotated[
        Half, typer.Option(help="Of the split by file names: leave those out that a judge was trained on.")
    ] = Half.both,
    start: Annotated[
        Path | None, typer.Option(help="Directions to begin at, by name; default: the model's own.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="FIRST:STOP, the layers that may move; default: all but the finest three."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps for each direction.")] = 150,
    batch: Annotated[int, typer.Option(min=2, help="Pictures in a step.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the pictures and strengths drawn.")] = 0,
    classifier: Annotated[
        Path | None, typer.Option(help="A classifier's file; default: the model's features.safetensors.")
    ] = None,
    device: Device = None,
) -> None:
    """Learn directions from labelled real pictures, through the model's own inversions.

    Each is moved until pictures without an attribute, inverted and edited, look like those that have it: to
    the classifier, and as a set. Each begins at the model's own direction of its name, if it has one. That
    costs some minutes for each and gives edits that stay nearer to real pictures than a boundary's (see
    docs/reproduction.md). The file grows by one direction at a time, and those it holds are not learned
    again: an interrupted command goes on where it stopped.

    Examples:

        mambastyle directions learn learned.safetensors --pack faces.zip --head gender --head status

        mambastyle directions learn noble.safetensors --pack faces.zip --head status --label noble --steps 300
    """
    from mambastyle import checkpoints
    from mambastyle.api import load_inverter
    from mambastyle.features import small
    from mambastyle.latents.directions import Directions, parse_layers
    from mambastyle.training.directions import FACE_HEADS
    from mambastyle.training.learned_directions import Settings, learn_from_pack

    free = parse_layers(layers, "--layers") if layers else None
    inverter = load_inverter(model, device=device)
    file = classifier or inverter.features
    if file is None or inverter.files is None:
        raise ValueError(f"{model} has no features.safetensors: name a classifier with --classifier")
    sha256 = checkpoints.load(inverter.files.generator, kind="stylegan2").sha256
    found = Directions.load(out) if out.is_file() else Directions(generator=sha256)
    if found.generator != sha256:
        raise ValueError(f"{out} holds the directions of another generator: name another file")
    made = {"model": model, "pack": pack.name, "split": split, "half": half.value, "steps": steps}
    card = {"command": "directions learn", **made, "batch": batch, "seed": seed}
    starts = inverter.directions if start is None else Directions.load(start)
    if starts.generator not in (None, sha256):
        raise ValueError(f"{start} holds the directions of another generator: begin at those of {model}")
    for direction in learn_from_pack(
        pack,
        inverter.model,
        inverter.generator,
        small.load(file).to(inverter.device),
        heads=heads or FACE_HEADS,
        only=labels or (),
        done=found,
        starts=starts,
        split=split,
        half=half.value,
        layers=free,
        settings=Settings(steps=steps, batch=batch),
        seed=seed,
        progress=True,
    ):
        found = Directions([*found.values(), direction], generator=sha256)
        found.save(out, card=card)
    typer.echo(f"{len(found)} directions ({', '.join(found)}) written to {out}")


@app.command()
def join(
    out: Annotated[Path, typer.Argument(help="The file to write, such as directions.safetensors.")],
    files: Annotated[list[Path], typer.Argument(help="Files with directions of one generator.")],
) -> None:
    """Join files with directions, discovered or converted, to the one file that a model or a run file takes.

    Example:

        mambastyle directions join directions.safetensors age.safetensors smile.safetensors pca.safetensors
    """
    from mambastyle import checkpoints
    from mambastyle.latents.directions import Directions

    found = Directions.joined(Directions.load(path) for path in files)
    cards = {path.name: checkpoints.read_header(path).card for path in files}
    found.save(out, card={"joined": cards})
    typer.echo(f"{len(found)} directions ({', '.join(found)}) written to {out}")


@app.command()
def text(
    words: Annotated[str, typer.Argument(help="What the pictures should become: 'a person with glasses'.")],
    out: Annotated[
        Path, typer.Argument(help="The file to write; a file of this generator's directions gets one more.")
    ],
    clip: Annotated[Path, typer.Option(help="A folder with a CLIP of transformers; nothing is downloaded.")],
    model: Model = "kaokore64",
    neutral: Annotated[str, typer.Option(help="What the pictures are, without that.")] = "a person",
    name: Annotated[str | None, typer.Option(help="The direction's name; default: from the text.")] = None,
    method: Annotated[
        TextMethod, typer.Option(help="optimise: move d by CLIP. global: StyleCLIP's table of the generator.")
    ] = TextMethod.optimise,
    table: Annotated[
        Path | None,
        typer.Option(help="global: the published table (fs3.npy); without it, one is measured (hours)."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, help="global: style channels of less relevance stay.")
    ] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="optimise: how many steps.")] = 100,
    samples: Annotated[
        int, typer.Option(min=1, help="global without a table: pictures per style channel.")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the drawn latents.")] = 0,
    device: Device = None,
) -> None:
    """Make a direction from a text, by what a CLIP that you have sees in the generator's pictures.

    Needs the extra: pip install "mambastyle[text]".

    Examples:

        mambastyle directions text "a person with glasses" glasses.safetensors --clip clip-vit-base-patch32

        mambastyle directions text "smiling person" d.safetensors --clip CLIP --method global --table fs3.npy
    """
    from mambastyle.latents.directions import Directions
    from mambastyle.training.text_directions import text_direction

    found = text_direction(
        model,
        words,
        clip=clip,
        neutral=neutral,
        name=name,
        method=method.value,
        table=table,
        threshold=threshold,
        steps=steps,
        samples=samples,
        seed=seed,
        device=device,
    )
    if out.is_file():
        older = Directions.load(out)
        if older.generator not in (None, found.generator):
            raise ValueError(f"{out} holds the directions of another generator: name another file")
        found = Directions.joined([older, found])
    found.save(out)
    typer.echo(f"{list(found)[-1]} written to {out} ({len(found)} directions)")
