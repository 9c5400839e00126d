"""`mambastyle batch edit|stylize`: many pictures, resumable, in parts, in this process or on Ray."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambastyle.cli.batch import Batch, progress
from mambastyle.cli.pictures import BatchSize, Device, Form, Format, Model, Precise

if TYPE_CHECKING:
    from mambastyle.jobs.work import Job

app = typer.Typer(
    help="Do one thing to very many pictures. The same command again goes on where it was stopped.",
    epilog=(
        "Examples:\n\n"
        "  mambastyle batch edit faces/ -e gender=1.5 --out out\n\n"
        "  mambastyle batch edit 'shards/*.tar' -e gender=1.5 --tar --shard 0/4 --out out\n\n"
        "  mambastyle batch stylize photos/ --style painting.jpg --engine ray --workers 8 --out out\n\n"
        "OUT/manifest*.jsonl says what is done: each picture counts once its output is on the disk."
    ),
    no_args_is_help=True,
)


class Engine(StrEnum):
    here = "here"
    ray = "ray"


Pictures = Annotated[list[str], typer.Argument(help="Pictures, folders, globs, or webdataset tars (*.tar).")]
OutJob = Annotated[Path, typer.Option("--out", "-o", help="The folder of this job; it is made.")]
Part = Annotated[
    str, typer.Option("--shard", metavar="I/N", help="Do part I of N, counted from 0: one for each machine.")
]
Tar = Annotated[bool, typer.Option("--tar", help="Write webdataset tars instead of single files.")]
PerTar = Annotated[int, typer.Option(min=1, help="Pictures in a tar.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that decode, and as many that encode.")]
On = Annotated[
    Engine, typer.Option("--engine", help="This process, or Ray's workers (pip install ray[data]).")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes of --engine ray.")]


@app.command()
def edit(
    inputs: Pictures,
    edits: Annotated[
        list[str],
        typer.Option("--edit", "-e", metavar="NAME[@FIRST:STOP]=STRENGTH", help="As in `mambastyle edit`."),
    ],
    model: Model = "kaokore64",
    out: OutJob = Path("out"),
    form: Form = Format.png,
    shard: Part = "0/1",
    tar: Tar = False,
    per_tar: PerTar = 1000,
    threads: Threads = 2,
    engine: On = Engine.here,
    workers: Workers = 2,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: Precise = "fp32",
) -> None:
    """Edit pictures along directions: OUT/NAME.gender+1.5.png, or OUT/part-000000.tar with NAME.png.

    Examples:

        mambastyle batch edit faces/ -e gender=1.5 --out out

        mambastyle batch edit 'shards/*.tar' -e gender=1.5 --tar --shard 0/4 --out out
    """
    from mambastyle.jobs.work import EditJob
    from mambastyle.latents.directions import DirectionError, parse_edit

    for text in edits:
        name, strength = parse_edit(text)
        if strength is None:
            raise DirectionError(f"the edit {text!r} has no strength: write {name}=1.5")
    job = EditJob(model, tuple(edits), f".{form.value}", batch_size, device, precision)
    _run("edit", job, inputs, out, shard, per_tar if tar else None, threads, engine, workers)


@app.command()
def stylize(
    inputs: Pictures,
    style: Annotated[
        list[str], typer.Option("--style", "-s", help="A style picture, folder, or glob; several are mixed.")
    ],
    weights: Annotated[
        str | None, typer.Option(help="Mix all styles in these parts, such as 0.7,0.3; default: equal ones.")
    ] = None,
    model: Model = "samam-small",
    out: OutJob = Path("out"),
    form: Form = Format.png,
    strength: Annotated[
        float, typer.Option(help="0 is the photo, 1 what the network gives, up to 1.5.")
    ] = 1.0,
    keep_color: Annotated[bool, typer.Option("--keep-color", help="Keep the colours of the photo.")] = False,
    seed: Annotated[int, typer.Option(help="Of Mamba-ST's shuffles.")] = 0,
    average: Annotated[int, typer.Option(min=1, help="Average so many of Mamba-ST's shuffles.")] = 1,
    shard: Part = "0/1",
    tar: Tar = False,
    per_tar: PerTar = 1000,
    threads: Threads = 2,
    engine: On = Engine.here,
    workers: Workers = 2,
    device: Device = None,
    precision: Precise = "fp32",
) -> None:
    """Stylize pictures of any size: OUT/NAME.stylized.png, or OUT/part-000000.tar with NAME.png.

    Examples:

        mambastyle batch stylize photos/ --style painting.jpg --out out

        mambastyle batch stylize photos/ -s a.jpg -s b.jpg --weights 0.7,0.3 --keep-color --out out
    """
    from mambastyle import images
    from mambastyle.api.stylizer import check_strength, check_weights
    from mambastyle.cli.stylize import parse_weights
    from mambastyle.jobs.work import StylizeJob

    check_strength(strength)
    styles = tuple(map(str, images.find(style)))
    shares = tuple(check_weights(styles, parse_weights(weights)))
    job = StylizeJob(
        model, styles, shares, strength, keep_color, seed, average, f".{form.value}", device, precision
    )
    _run("stylize", job, inputs, out, shard, per_tar if tar else None, threads, engine, workers)


def _run(
    verb: str,
    job: "Job",
    inputs: list[str],
    out: Path,
    shard: str,
    per_tar: int | None,
    threads: int,
    engine: Engine,
    workers: int,
) -> None:
    from mambastyle.jobs.engines import Target, run_here, run_on_ray
    from mambastyle.jobs.items import Shard, find_items

    batch = Batch()
    part = Shard.parse(shard)
    if engine is Engine.ray and part.count > 1:
        raise ValueError(
            "--shard divides the job by hand, which Ray does itself: leave it out with --engine ray"
        )
    items = find_items(inputs, batch.attempt)
    target = Target(out, per_tar)
    if not items:
        return batch.finish(out)
    with progress(verb, len(part.of(items))) as bar:

        def moved(count: int) -> None:
            bar.advance(bar.task_ids[0], count)

        if engine is Engine.ray:
            report = run_on_ray(job, items, target, workers=workers, threads=threads, progress=moved)
        else:
            report = run_here(job, items, target, shard=part, threads=threads, progress=moved)
    if report.before:
        typer.echo(f"{report.before} were done before", err=True)
    batch.done += report.done
    batch.failures += list(report.failed.items())
    return batch.finish(out)
