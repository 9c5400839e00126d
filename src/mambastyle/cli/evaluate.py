"""`mambastyle evaluate inversion|editing|paper|cost|ablation|gan|style-transfer`, printed and written."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from mambastyle.cli.batch import Batch
from mambastyle.cli.pictures import BatchSize, Device, Model, Precise
from mambastyle.cli.stylize import StylizerModel

if TYPE_CHECKING:
    from mambastyle.api.methods import MethodName
    from mambastyle.compute import Precision
    from mambastyle.evaluation.judges import Judges
    from mambastyle.evaluation.table import Table

app = typer.Typer(
    help="Measure a model on pictures it was not trained on.",
    epilog=(
        "Examples:\n\n"
        "  mambastyle evaluate inversion faces/ --out numbers.json\n\n"
        "  mambastyle evaluate inversion --pack faces.zip --also w-plus=runs/w-plus --method optimise:500\n\n"
        "  mambastyle evaluate editing --pack faces.zip --judge judge.safetensors --report out/\n\n"
        "  mambastyle evaluate paper --pack faces.zip --judge judge.safetensors --method pti\n\n"
        "  mambastyle evaluate cost --method encoder --method optimise:100\n\n"
        "  mambastyle evaluate gan runs/gan-kaokore64/snapshots/*.safetensors --pack faces.zip\n\n"
        "  mambastyle evaluate style-transfer --pack pairs.zip --also mamba-st=mamba-st-small"
    ),
    no_args_is_help=True,
)

_LATENTS_ALONE = "MambaStyle, latents alone"

Pack = Annotated[Path, typer.Option("--pack", help="Zip or folder with labels.csv; its test split counts.")]
Report = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="PATH",
        help="Also write PATH.md, PATH.json and pictures; FOLDER/ takes its own names.",
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="NAME=FOLDER", help="Another model beside it; may be given again."),
]
LatentsAlone = Annotated[
    bool, typer.Option("--latents-alone", help="Also the same model without its feature F (W+ only).")
]
Count = Annotated[int | None, typer.Option(min=2, help="Only the first so many pictures.")]
Ways = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME[:STEPS]",
        help="optimise, pti, encoder+optimise or mean-w beside the encoder; may be given again.",
    ),
]
WaysCount = Annotated[
    int | None, typer.Option("--method-count", min=2, help="Only so many pictures for methods that optimise.")
]
KeepIn = Annotated[
    Path | None,
    typer.Option(
        "--keep-in",
        metavar="FOLDER",
        help="Keep there what methods that optimise find, and take from there what an earlier run found.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of what methods draw.")]
JudgeFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="FILE[,BACKBONE]",
        help="Published weights of LPIPS, the FID's Inception or ArcFace; may be given again.",
    ),
]
Judge = Annotated[
    Path, typer.Option("--judge", help="Classifier that judges (not the one behind the directions).")
]
DirectionsFile = Annotated[
    Path | None, typer.Option("--directions", help="A directions file; default: the model's own.")
]
Strength = Annotated[float, typer.Option(help="Of the edits, in natural units of each direction.")]


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
    ways: Ways = None,
    ways_count: WaysCount = None,
    keep_in: KeepIn = None,
    optimise: Annotated[
        list[int] | None, typer.Option(help="The same as --method optimise:STEPS; may be given again.")
    ] = None,
    weights: JudgeFiles = None,
    seed: Seed = 0,
    count: Count = None,
    report: Report = None,
    batch_size: BatchSize = 16,
    precision: Precise = "fp32",
    device: Device = None,
) -> None:
    """Compare pictures with their inversions: L2, MS-SSIM, perceptual and Frechet distances, milliseconds.

    Each number's name says what made it (fd_small is our own network's, never FID). MAMBASTYLE_SQUEEZENET
    names a SqueezeNet file for the distances that need one; without it they are left out. With --pack the
    model stands in a table beside others (--also), beside itself without F (--latents-alone), and beside
    other ways to invert (--method); with --report also the best, median and worst pictures.
    """
    if pack is not None:
        from mambastyle.evaluation.inversion import run

        table = run(
            _models(model, also, latents_alone),
            pack,
            w_plus_only=(_LATENTS_ALONE,),
            others=_ways([*(ways or []), *(f"optimise:{steps}" for steps in optimise or [])]),
            others_count=ways_count,
            keep_in=keep_in,
            seed=seed,
            count=count,
            batch=batch_size,
            judges=_judges(weights),
            device=device,
            precision=precision,
            progress=True,
        )
        return _show(table, report, "inversion")
    if not inputs:
        raise ValueError("nothing to evaluate: name pictures, or a pack with --pack")
    return _evaluate_pictures(inputs, model, out, _judges(weights), batch_size, device, precision)


@app.command()
def editing(
    pack: Pack,
    judge: Judge,
    model: Model = "kaokore64",
    directions: DirectionsFile = None,
    also: Also = None,
    latents_alone: LatentsAlone = False,
    ways: Ways = None,
    ways_count: WaysCount = None,
    keep_in: KeepIn = None,
    weights: JudgeFiles = None,
    strengths: Annotated[str, typer.Option(help="The strengths, with commas.")] = "0,0.5,1,1.5,2,3",
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="A status to edit towards, beside both genders; may be given again. Default: noble, warrior."
        ),
    ] = None,
    seed: Seed = 0,
    count: Count = None,
    report: Report = None,
    device: Device = None,
) -> None:
    """Edit faces that lack an attribute: how many then have it, and at what distance from those that do.

    Strength by strength, for gender (both ways) and two statuses: the share that the judge calls changed,
    fd(A, B') and fd(B, B') beside fd(A, B), what is kept of the face, and the L2 outside the region that the
    edit is about.
    """
    from mambastyle.evaluation.editing import run

    table = run(
        _models(model, also, latents_alone),
        pack,
        _directions(model, directions),
        judge,
        strengths=_numbers(strengths),
        statuses=status or ("noble", "warrior"),
        w_plus_only=(_LATENTS_ALONE,),
        others=_ways(ways),
        others_count=ways_count,
        keep_in=keep_in,
        seed=seed,
        count=count,
        judges=_judges(weights),
        device=device,
        progress=True,
    )
    _show(table, report, "editing")


@app.command()
def paper(
    pack: Pack,
    judge: Judge,
    model: Model = "kaokore64",
    directions: DirectionsFile = None,
    also: Also = None,
    latents_alone: LatentsAlone = False,
    ways: Ways = None,
    ways_count: WaysCount = None,
    keep_in: KeepIn = None,
    strength: Strength = 1.5,
    weights: JudgeFiles = None,
    seed: Seed = 0,
    count: Count = None,
    report: Report = None,
    device: Device = None,
) -> None:
    """The columns of the paper's table 1: inversion, fd(A, B') of each edit, parameters, GMACs, time."""
    from mambastyle.evaluation.paper import run

    table = run(
        _models(model, also, latents_alone),
        pack,
        _directions(model, directions),
        judge,
        w_plus_only=(_LATENTS_ALONE,),
        others=_ways(ways),
        others_count=ways_count,
        keep_in=keep_in,
        strength=strength,
        seed=seed,
        count=count,
        judges=_judges(weights),
        device=device,
        progress=True,
    )
    _show(table, report, "table-1")


@app.command()
def cost(
    model: Model = "kaokore64",
    ways: Ways = None,
    batch_size: BatchSize = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians of so many.")] = 5,
    report: Report = None,
    precision: Precise = "fp32",
    device: Device = None,
) -> None:
    """Parameters, GMACs, milliseconds and peak memory of ways to invert, each in a process of its own.

    `mambastyle info --config NAME` counts the full-size models without running them.
    """
    from mambastyle.evaluation.timing import run

    chosen = _ways(ways or ["encoder"])
    table = run(model, chosen, batch=batch_size, repeats=repeats, device=device, precision=precision)
    _show(table, report, "cost")


@app.command()
def ablation(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of `train inversion`.")],
    pack: Pack,
    judge: Annotated[
        Path | None, typer.Option("--judge", help="Classifier for the editing columns, with --directions.")
    ] = None,
    directions: DirectionsFile = None,
    strength: Strength = 1.5,
    weights: JudgeFiles = None,
    count: Count = None,
    report: Report = None,
    device: Device = None,
) -> None:
    """Compare variants trained alike: means over seeds, and differences to Final picture by picture."""
    from mambastyle.evaluation.ablation import run

    tables = run(
        runs,
        pack,
        judge=judge,
        directions=directions,
        strength=strength,
        count=count,
        judges=_judges(weights),
        device=device,
        progress=True,
    )
    for table, name in zip(tables, ("ablation", "ablation-runs"), strict=True):
        path = report if report is None or _is_folder(report) or name == "ablation" else f"{report}-runs"
        _show(table, path, name)


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
    weights: JudgeFiles = None,
    psi: Annotated[float, typer.Option(help="Truncation: 1 is none.")] = 1.0,
    seed: int = 0,
    report: Report = None,
    device: Device = None,
) -> None:
    """Compare a generator's samples with the training pictures: Frechet and kernel distances, a row each."""
    from mambastyle.evaluation.generator import run

    judges = _judges(weights, features)
    if not judges.networks:
        raise ValueError("no network to compare with: set MAMBASTYLE_SQUEEZENET or name one with --features")
    table = run(generators, pack, judges, count=count, truncation_psi=psi, seed=seed, device=device or "cpu")
    _show(table, report, "generator")


@app.command("style-transfer")
def style_transfer(
    pack: Annotated[
        Path, typer.Option("--pack", help="Zip or folder with pairs.csv: the columns content and style.")
    ],
    model: StylizerModel = "samam-small",
    also: Also = None,
    count: Annotated[int | None, typer.Option(min=2, help="Only so many pairs, drawn by a seed.")] = None,
    size: Annotated[int, typer.Option(min=32, help="Side of all pictures; the protocol's is 512.")] = 512,
    lpips: Annotated[
        Path | None, typer.Option(help="LPIPS-Alex's published weights with the backbone: adds LPIPS.")
    ] = None,
    art_inception: Annotated[
        Path | None, typer.Option(help="ArtFID's published Inception: adds its FID, with LPIPS also ArtFID.")
    ] = None,
    vgg19: Annotated[Path | None, typer.Option(help="torchvision's VGG-19: adds the CFSD with it.")] = None,
    report: Report = None,
    device: Device = None,
) -> None:
    """Stylize contents by styles: distances to both, seams, milliseconds and memory, a row per model.

    The first two rows are the contents and the styles themselves, between which every model stands. Without
    MAMBASTYLE_SQUEEZENET the distances that need SqueezeNet are left out. 800 pairs take some 20 minutes a
    model on two cores.
    """
    from rich.progress import Progress

    from mambastyle.evaluation.style_transfer import PublishedJudges, run

    models = {Path(model).stem: model} | _named(also)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("pairs", total=None)

        def advance(total: int) -> Callable[[], None]:
            bar.update(task, total=total)
            return lambda: bar.advance(task)

        extra = PublishedJudges.load(lpips, art_inception, vgg19)
        table = run(models, pack, size=size, count=count, extra=extra, device=device, progress=advance)
    _show(table, report, "style-transfer")


def _evaluate_pictures(
    inputs: list[str],
    model: str,
    out: Path | None,
    judges: "Judges",
    batch_size: int,
    device: str | None,
    precision: "Precision",
) -> None:
    """One model on any pictures; those that cannot be read are listed at the end."""
    import json

    from rich.table import Table

    from mambastyle import images
    from mambastyle.api import load_inverter
    from mambastyle.evaluation.inversion import evaluate
    from mambastyle.files import write_whole

    batch = Batch()
    paths = batch.find(inputs)
    inverter = load_inverter(model, device=device, precision=precision, batch_size=batch_size)
    pictures = []
    for path in paths:
        with batch.attempt(path):
            pictures.append(images.center_crop_square(images.read(path, at_least=inverter.resolution)))
            batch.done += 1
    if not pictures:
        return batch.finish()
    numbers = evaluate(inverter, pictures, judges)
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


def _ways(texts: list[str] | None) -> "list[tuple[MethodName, int | None]]":
    """NAME or NAME:STEPS, ... as pairs."""
    from mambastyle.api.methods import check_method

    ways = []
    for text in texts or []:
        name, colon, steps = text.partition(":")
        if colon and not steps.isdecimal():
            raise ValueError(f"--method {text!r}: expected NAME:STEPS, such as optimise:500")
        number = int(steps) if colon else None
        check_method(name, number)
        ways.append((cast("MethodName", name), number))
    return ways


def _judges(files: list[str] | None, features: Path | None = None) -> "Judges":
    from mambastyle.evaluation.judges import Judges

    return Judges.found(features, tuple(files or ()))


def _directions(model: str, chosen: Path | None) -> Path:
    from mambastyle.presets import find_model

    found = chosen or find_model(model).directions
    if found is None:
        raise ValueError(f"{model} has no directions: name a file with --directions")
    return found


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--strengths {text!r}: expected numbers with commas, such as 0,1,2") from None


def _is_folder(report: str) -> bool:
    return report.endswith(("/", "\\")) or Path(report).is_dir()


def _show(table: "Table", report: str | None, name: str) -> None:
    """Print a table; write it to `report`, under its own name where that is a folder."""
    Console(soft_wrap=True).print(table.markdown(), markup=False, highlight=False)
    if report is not None:
        for path in table.write(Path(report) / name if _is_folder(report) else report):
            Console(stderr=True).print(f"written: {path}", markup=False, highlight=False)
