"""`mambastyle invert`, `edit` and `render`."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mambastyle.cli.batch import Batch, chunks, progress
from mambastyle.cli.photos import Faces, Landmarks, PasteBack, edit_photos, read_landmarks
from mambastyle.compute import Precision
from mambastyle.files import distinct, file_name, stems

if TYPE_CHECKING:
    from torch import Tensor

    from mambastyle.api import Inverted, Inverter
    from mambastyle.api.methods import MethodName

SAVED = ".safetensors"


class Format(StrEnum):
    png = "png"
    jpg = "jpg"
    webp = "webp"


Inputs = Annotated[list[str], typer.Argument(help="Pictures, folders, or globs such as 'faces/*.png'.")]
InputsOrSaved = Annotated[
    list[str], typer.Argument(help="Pictures, saved inversions (*.safetensors), folders, or globs.")
]
Saved = Annotated[list[str], typer.Argument(help="Saved inversions (*.safetensors), folders, or globs.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A preset's name, or a folder with the checkpoints.")
]


def as_folder(out: Path) -> Path:
    """`--out`, which is no picture."""
    if out.suffix.lower() in (".jpeg", *(f".{form}" for form in Format)) and not out.is_dir():
        raise ValueError(
            f"--out {out} is the name of a picture, expected a folder; --format sets their format"
        )
    return out


Out = Annotated[
    Path, typer.Option("--out", "-o", help="The folder to write to; it is made.", callback=as_folder)
]
Form = Annotated[Format, typer.Option("--format", "-f", help="The format of the pictures.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: an accelerator if there is one.")]
Precise = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="bf16: faster for large models where the hardware has it; pictures change a little. "
        "auto: bf16 where the hardware has it.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="How many pictures run at once.")]


def invert(
    inputs: Inputs,
    model: Model = "kaokore64",
    out: Out = Path("out"),
    form: Form = Format.png,
    method: Annotated[
        str, typer.Option(help="encoder, optimise, pti, encoder+optimise or mean-w; see above.")
    ] = "encoder",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a method that optimises; default: the method's own number.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise of a method that optimises.")] = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: Precise = "fp32",
) -> None:
    """Invert pictures: find the latents and features from which the generator renders them again.

    For each picture NAME it writes NAME.inversion.png, what the generator makes of it, and
    NAME.inversion.safetensors, which `edit` and `render` take without encoding again.

    --method encoder (default) is one forward pass. optimise searches W+ from the generator's average, some
    seconds a picture; encoder+optimise improves what the encoder gave; pti finds a pivot in W and tunes a
    generator for each picture (its file holds what was tuned, megabytes); mean-w is the average for all.
    They compare pictures by L2 and by SqueezeNet where MAMBASTYLE_SQUEEZENET names its file, else by the
    model's own small network.

    Examples:

        mambastyle invert face.png

        mambastyle invert face.png --method pti

        mambastyle invert faces/ 'more/**/*.jpg' --out out --format jpg
    """
    batch = Batch()
    paths = _without_outputs(batch.find(inputs), inputs, batch)
    if paths:
        inverter = _load(model, device, precision, batch_size)
        names = stems(paths)
        side = None if method == "encoder" else max(inverter.resolution, inverter.model.config.image_size)
        with progress("invert", len(paths)) as bar:
            for chunk in chunks(paths, batch_size):
                good, pictures = _prepare(inverter, chunk, batch, side)
                if good:
                    inverted = inverter.invert(
                        pictures,
                        names=[names[path] for path in good],
                        method=cast("MethodName", method),
                        steps=steps,
                        seed=seed,
                        progress=lambda part: bar.advance(bar.task_ids[0], part),
                    )
                    stem = [f"{names[path]}.inversion" for path in good]
                    _write(inverter, inverted, good, stem, out, form, batch, save=True)
                bar.advance(bar.task_ids[0], len(chunk) - len(good))
    batch.finish(out)


def edit(
    inputs: InputsOrSaved,
    edits: Annotated[
        list[str],
        typer.Option(
            "--edit",
            "-e",
            metavar="NAME[@FIRST:STOP]=STRENGTH",
            help="A direction and how strongly; may be given again. @FIRST:STOP keeps it to these layers.",
        ),
    ],
    model: Model = "kaokore64",
    out: Out = Path("out"),
    form: Form = Format.png,
    grid: Annotated[
        bool, typer.Option("--grid", help="One picture of many strengths, OUT/grid.png.")
    ] = False,
    strengths: Annotated[str, typer.Option(help="The strengths of --grid.")] = "-2,-1,0,1,2",
    save: Annotated[bool, typer.Option(help="Also write the edited inversions (*.safetensors).")] = True,
    paste_back: PasteBack = False,
    find_faces: Faces = False,
    landmarks: Landmarks = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: Precise = "fp32",
) -> None:
    """Edit pictures or saved inversions along directions (`mambastyle directions list` names them).

    For each NAME and edit gender=1.5 it writes NAME.gender+1.5.png, and beside it the edited inversion, which
    may be edited again. With --grid, a direction without a strength runs through all --strengths, and one
    with a strength holds in every column.

    Examples:

        mambastyle edit face.png -e gender=1.5

        mambastyle edit out/face.inversion.safetensors -e gender=1.5 -e warrior=-1

        mambastyle edit face.png -e gender@0:4=2      (the coarse layers only)

        mambastyle edit faces/ -e gender -e noble --grid --strengths=-2,0,2

        mambastyle edit holidays/*.jpg -e age=2 --faces --model ffhq/      (the whole photographs)
    """
    from mambastyle import images
    from mambastyle.latents.directions import DirectionError, parse_edit

    batch = Batch()
    parsed = [parse_edit(text) for text in edits]
    swept = [name for name, strength in parsed if strength is None]
    if grid and not swept:
        raise DirectionError(
            f"--grid needs a direction without a strength: -e {parsed[0][0]} (not {edits[0]})"
        )
    if swept and not grid:
        raise DirectionError(f"the edit {swept[0]!r} has no strength: write {swept[0]}=1.5, or add --grid")
    whole = paste_back or find_faces or landmarks is not None
    if whole and grid:
        raise ValueError(
            "--grid shows what the model makes, without the rest: leave out --paste-back or --grid"
        )
    points = None if landmarks is None else read_landmarks(landmarks)
    values = _parse_strengths(strengths) if grid else []
    both = (*images.SUFFIXES, SAVED)
    paths = _without_rendered(batch.find(inputs, suffixes=both, what="pictures or saved inversions"))
    if not paths:
        return batch.finish(out)
    inverter = _load(model, device, precision, batch_size)
    resolved = inverter.directions.resolve(
        [(inverter.directions.at(name), strength or 0.0) for name, strength in parsed]
    )
    fixed = [pair for pair, (_, given) in zip(resolved, parsed, strict=True) if given is not None]
    sweeps = [pair[0] for pair, (_, given) in zip(resolved, parsed, strict=True) if given is None]
    if grid:
        return _grid(inverter, paths, fixed, sweeps, values, out / f"grid.{form.value}", batch)

    suffix = ".".join(f"{file_name(name)}{strength:+g}" for name, strength in parsed if strength is not None)
    names = stems(paths)
    if whole:
        targets = [out / f"{names[path]}.{suffix}.{form.value}" for path in paths]
        edit_photos(inverter, paths, fixed, targets, batch, find_faces=find_faces, landmarks=points)
        return batch.finish(out)
    with progress("edit", len(paths)) as bar:
        for chunk in chunks(paths, batch_size):
            for good, inverted, _ in _inverted(inverter, chunk, names, batch):
                edited = inverter.edit(inverted, fixed)
                stem = [f"{names[path]}.{suffix}" for path in good]
                _write(inverter, edited, good, stem, out, form, batch, save=save)
            bar.advance(bar.task_ids[0], len(chunk))
    batch.finish(out)


def render(
    inputs: Saved,
    model: Model = "kaokore64",
    out: Out = Path("out"),
    form: Form = Format.png,
    batch_size: BatchSize = 16,
    device: Device = None,
    precision: Precise = "fp32",
) -> None:
    """Render saved inversions, edited or not, to pictures of the same name.

    Examples:

        mambastyle render out/face.inversion.safetensors

        mambastyle render out/ --out pictures --format jpg
    """
    batch = Batch()
    paths = batch.find(inputs, suffixes=(SAVED,))
    if paths:
        inverter = _load(model, device, precision, batch_size)
        names = stems(paths)
        with progress("render", len(paths)) as bar:
            for path in paths:
                with batch.attempt(path):
                    kind = ".inversion" if path.stem.endswith(".inversion") else ""
                    _write_pictures(
                        inverter, inverter.load_inversion(path), out / f"{names[path]}{kind}", form
                    )
                    batch.done += 1
                bar.advance(bar.task_ids[0], 1)
    batch.finish(out)


def _without_outputs(paths: Sequence[Path], inputs: Sequence[str], batch: Batch) -> list[Path]:
    """The pictures of folders and globs less those that were rendered from a saved inversion beside them, as
    in a folder that is also --out: the second call would invert what the first one made.
    """
    named = {Path(source).expanduser() for source in inputs}
    kept = [path for path in paths if path in named or not path.with_suffix(SAVED).is_file()]
    if left := len(paths) - len(kept):
        batch.notes.append(
            f"{left} left out that lie beside a saved inversion of the same name, from which they were"
            " rendered (name the file to invert it)"
        )
    return kept


def _without_rendered(paths: Sequence[Path]) -> list[Path]:
    """Of a saved inversion and the picture that was rendered from it beside it, the inversion alone."""
    saved = {path.with_suffix("") for path in paths if path.suffix == SAVED}
    return [path for path in paths if path.suffix == SAVED or path.with_suffix("") not in saved]


def _load(model: str, device: str | None, precision: Precision, batch_size: int) -> "Inverter":
    from mambastyle.api import load_inverter

    return load_inverter(model, device=device, precision=precision, batch_size=batch_size)


def _prepare(
    inverter: "Inverter", paths: Sequence[Path], batch: Batch, side: int | None = None
) -> tuple[list[Path], list["Tensor"]]:
    """The pictures of a chunk that can be read, as the encoder takes them; the others are failures."""
    good, pictures = [], []
    for path in paths:
        with batch.attempt(path):
            pictures.append(inverter.prepare(path, side))
            good.append(path)
    return good, pictures


def _inverted(
    inverter: "Inverter", paths: Sequence[Path], names: dict[Path, str], batch: Batch
) -> list[tuple[list[Path], "Inverted", "Tensor | None"]]:
    """What a chunk of pictures and saved inversions stands for: (paths, inverted, originals) in runs."""
    from torch import stack

    runs: list[tuple[list[Path], Inverted, Tensor | None]] = []
    good, pictures = _prepare(inverter, [path for path in paths if path.suffix != SAVED], batch)
    if good:
        runs.append((good, inverter.invert(pictures, names=[names[path] for path in good]), stack(pictures)))
    for path in paths:
        if path.suffix == SAVED:
            with batch.attempt(path):
                loaded = inverter.load_inversion(path)
                runs.append(([path] * len(loaded), loaded, None))
    return runs


def _write(
    inverter: "Inverter",
    inverted: "Inverted",
    paths: Sequence[Path],
    stem: Sequence[str],
    out: Path,
    form: Format,
    batch: Batch,
    *,
    save: bool,
) -> None:
    """Render a batch and write each picture, with its inversion beside it."""
    from mambastyle import images

    rendered = inverter.render(inverted, output="tensor")
    # Names of a file from elsewhere are no paths.
    names = distinct(inverted.names)
    for index, path in enumerate(paths):
        # A saved inversion of several pictures gives several outputs.
        number = f".{names[index]}" if len(set(stem)) < len(stem) else ""
        with batch.attempt(path):
            target = out / f"{stem[index]}{number}"
            if save:
                inverter.save_inversion(f"{target}{SAVED}", inverted[index])
            images.write(f"{target}.{form.value}", rendered[index])
            batch.done += 1


def _write_pictures(inverter: "Inverter", inverted: "Inverted", target: Path, form: Format) -> None:
    from mambastyle import images

    rendered = inverter.render(inverted, output="tensor")
    for image, name in zip(rendered, distinct(inverted.names), strict=True):
        number = f".{name}" if len(rendered) > 1 else ""
        images.write(f"{target}{number}.{form.value}", image)


def _grid(
    inverter: "Inverter",
    paths: Sequence[Path],
    fixed: list[Any],
    sweeps: list[Any],
    strengths: list[float],
    target: Path,
    batch: Batch,
) -> None:
    """One sheet: a row per picture; original, inversion, then each direction at each strength."""
    from mambastyle import images

    images.check_writable(target)
    names = stems(paths)
    columns = [[(direction, strength)] for direction in sweeps for strength in strengths]
    labels = [f"{direction.name} {strength:+g}" for direction in sweeps for strength in strengths]
    with_originals = all(path.suffix != SAVED for path in paths)
    labels = [*(["original"] if with_originals else []), "inversion", *labels]
    tiles: list[Tensor] = []
    rows: list[str] = []
    with progress("grid", len(paths)) as bar:
        for chunk in chunks(paths, inverter.batch_size):
            for good, inverted, originals in _inverted(inverter, chunk, names, batch):
                sheets = [inverter.render(inverted, output="tensor")]
                for column in columns:
                    edited = inverter.edit(inverted, [*fixed, *column])
                    sheets.append(inverter.render(edited, output="tensor"))
                if originals is not None and with_originals:
                    sheets.insert(0, images.resize(originals, inverter.resolution, inverter.resolution))
                for row in range(len(good)):
                    tiles += [sheet[row] for sheet in sheets]
                rows += inverted.names
                batch.done += len(set(good))
            bar.advance(bar.task_ids[0], len(chunk))
    if tiles:
        scale = max(1, 128 // inverter.resolution)
        sheet = images.grid(tiles, len(labels), column_labels=labels, row_labels=rows, scale=scale)
        images.write(target, sheet)
    batch.finish(target)


def _parse_strengths(text: str) -> list[float]:
    from mambastyle.latents.directions import check_strength

    return [check_strength(part.strip(), "--strengths") for part in text.split(",")]
