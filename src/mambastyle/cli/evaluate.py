"""`mambastyle evaluate inversion|editing|gan`: protocols of mambastyle.evaluation, printed and written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mambastyle.cli.batch import Batch
from mambastyle.cli.pictures import BatchSize, Device, Model

if TYPE_CHECKING:
    from mambastyle.evaluation.table import Table

app = typer.Typer(
    help="Measure a model on pictures it was not trained on.",
    epilog=(
        "Examples:\n\n"
        "  mambastyle evaluate inversion faces/ --out numbers.json\n\n"
        "  mambastyle evaluate inversion --pack kaokore256.zip --also w-plus=runs/w-plus --optimise 500\n\n"
        "  mambastyle evaluate editing --pack kaokore256.zip --judge judge.safetensors\n\n"
        "  mambastyle evaluate gan runs/gan-kaokore64/snapshots/*.safetensors --pack kaokore256.zip"
    ),
    no_args_is_help=True,
)

_LATENTS_ALONE = "MambaStyle, latents alone"

Pack = Annotated[Path, typer.Option("--pack", help="Zip or folder with labels.csv; its test split counts.")]
Report = Annotated[
    Path | None, typer.Option("--report", help="Also write the table as PATH.md and PATH.json.")
]
Also = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="NAME=FOLDER", help="Another model beside it; may be given again."),
]
LatentsAlone = Annotated[
    bool, typer.Option("--latents-alone", help="Also the same model without its feature F (W+ only).")
]
Count = Annotated[int | None, typer.Option(min=2, help="Only the first so many pictures.")]


@app.command()
def inversion(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Pictures, folders, or globs; leave out with --pack.")
    ] = None,
    model: Model = "kaokore64",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the numbers as JSON.")] = None,
    pack: Annotated[
        Path | None, typer.Option("--pack", help="Compare methods on a pack's test split.")
    ] = None,
    also: Also = None,
    latents_alone: LatentsAlone = False,
    optimise: Annotated[
        list[int] | None,
        typer.Option(help="With --pack: W+ optimisation of so many steps; may be given again."),
    ] = None,
    count: Count = None,
    report: Report = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Compare pictures with their inversions: L2, MS-SSIM, perceptual and Frechet distances, milliseconds.

    Each number's name says what made it (fd_small is our own network's, never FID). MAMBASTYLE_SQUEEZENET
    names a SqueezeNet file for the distances that need one; without it they are left out. With --pack the
    model stands in a table beside others (--also) and beside optimisation in W+ (--optimise).
    """
    if pack is not None:
        from mambastyle.evaluation.inversion import run

        table = run(
            _models(model, also, latents_alone),
            pack,
            w_plus_only=(_LATENTS_ALONE,),
            optimisation_steps=optimise or (),
            count=count,
            batch=batch_size,
            device=device,
        )
        _show(table, report)
        return
    if not inputs:
        raise ValueError("nothing to evaluate: name pictures, or a pack with --pack")
    _evaluate_pictures(inputs, model, out, batch_size, device)


@app.command()
def editing(
    pack: Pack,
    judge: Annotated[Path, typer.Option(help="Classifier that judges (not the one behind the directions).")],
    model: Model = "kaokore64",
    directions: Annotated[
        Path | None, typer.Option(help="A directions file; default: the model's own.")
    ] = None,
    also: Also = None,
    latents_alone: LatentsAlone = False,
    count: Count = None,
    report: Report = None,
    device: Device = None,
) -> None:
    """Edit faces that lack an attribute: how many then have it, and at what distance from those that do.

    Strength by strength, for gender (both ways) and two statuses: the share that the judge calls changed,
    fd(A, B') beside fd(A, B), and the L2 inside and outside the region that the edit is about.
    """
    from mambastyle.evaluation.editing import run
    from mambastyle.presets import find_model

    chosen = directions or find_model(model).directions
    if chosen is None:
        raise ValueError(f"{model} has no directions: name a file with --directions")
    models = _models(model, also, latents_alone)
    table = run(models, pack, chosen, judge, w_plus_only=(_LATENTS_ALONE,), count=count, device=device)
    _show(table, report)


@app.command()
def gan(
    generators: Annotated[
        list[Path], typer.Argument(help="Generator checkpoints, such as a run's snapshots.")
    ],
    pack: Pack,
    count: Annotated[int, typer.Option(min=2, help="Samples per checkpoint.")] = 5000,
    features: Annotated[
        Path | None, typer.Option(help="The small network of fd_small; default: the packaged one.")
    ] = None,
    psi: Annotated[float, typer.Option(help="Truncation: 1 is none.")] = 1.0,
    seed: int = 0,
    report: Report = None,
    device: Device = None,
) -> None:
    """Compare a generator's samples with the training pictures: Frechet and kernel distances, a row each."""
    from mambastyle.evaluation.generator import run
    from mambastyle.evaluation.inversion import Judges

    judges = Judges.found(features)
    if judges.squeeze is None and judges.small is None:
        raise ValueError("no network to compare with: set MAMBASTYLE_SQUEEZENET or name one with --features")
    table = run(generators, pack, judges, count=count, truncation_psi=psi, seed=seed, device=device or "cpu")
    _show(table, report)


def _evaluate_pictures(
    inputs: list[str], model: str, out: Path | None, batch_size: int, device: str | None
) -> None:
    """One model on any pictures; those that cannot be read are listed at the end."""
    import json

    from rich.table import Table

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


def _models(model: str, also: list[str] | None, latents_alone: bool) -> dict[str, str]:
    """Name -> preset or folder, the model itself first."""
    alone = {_LATENTS_ALONE: model} if latents_alone else {}
    return {"MambaStyle": model} | alone | _named(also)


def _named(also: list[str] | None) -> dict[str, str]:
    """NAME=FOLDER, ... as a mapping."""
    named = {}
    for text in also or []:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"--also {text!r}: expected NAME=FOLDER, such as w-plus=runs/w-plus")
        named[name] = folder
    return named


def _show(table: "Table", report: Path | None) -> None:
    Console(soft_wrap=True).print(table.markdown(), markup=False, highlight=False)
    if report is not None:
        for path in table.write(report):
            Console(stderr=True).print(f"written: {path}", markup=False, highlight=False)
