"""`mambastyle stylize`: photographs, folders of them or a video in the manner of paintings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambastyle.cli.batch import Batch, progress
from mambastyle.cli.pictures import Device, Form, Format, Precise, as_folder
from mambastyle.compute import Precision
from mambastyle.files import stems

if TYPE_CHECKING:
    from torch import Tensor

    from mambastyle.api import Stylizer

_TILE = 256  # side of a picture in a contact sheet, in pixels

StylizerModel = Annotated[
    str, typer.Option("--model", "-m", help="A preset's name, a checkpoint, or a folder with one.")
]


def stylize(
    contents: Annotated[
        list[str] | None, typer.Argument(help="Photographs, folders, or globs such as 'photos/*.jpg'.")
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option("--style", "-s", help="A painting, folder, or glob; may be given again."),
    ] = None,
    model: StylizerModel = "samam-small",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write to; with --video, the file.")
    ] = Path("out"),
    strength: Annotated[
        float, typer.Option(help="0 is the photo, 1 what the network makes of it, up to 1.5 beyond.")
    ] = 1.0,
    keep_color: Annotated[bool, typer.Option("--keep-color", help="Keep the colours of the photo.")] = False,
    mix: Annotated[bool, typer.Option("--mix", help="One picture of all styles, in equal parts.")] = False,
    weights: Annotated[
        str | None, typer.Option(help="Mix all styles in these parts, such as 0.7,0.3; one for each.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="A picture, white where to stylize. Given once for each style, every style has its region."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what a network draws (Mamba-ST's shuffles).")] = 0,
    average: Annotated[
        int, typer.Option(min=1, help="Average so many shuffles of Mamba-ST: smoother, and slower.")
    ] = 1,
    size: Annotated[
        int | None, typer.Option(min=1, help="Scale photos down first: so many pixels on the long side.")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="One sheet of contents by styles, OUT/grid.png.")
    ] = False,
    video: Annotated[Path | None, typer.Option(help="Stylize every frame of this video.")] = None,
    form: Form = Format.png,
    device: Device = None,
    precision: Precise = "fp32",
) -> None:
    """Stylize photographs: each content in the manner of each style, in exactly its own size.

    For each content NAME and style STYLE it writes NAME.STYLE.png. With --mix or --weights, or with as many
    masks as styles, all styles go into one picture, NAME.mix.png. With --grid, the middle squares of all
    pictures stand in one contact sheet. A video keeps its rate and sound; all frames have the same seed.

    Examples:

        mambastyle stylize photo.jpg --style painting.jpg

        mambastyle stylize photos/ -s paintings/ -m mamba-st-small --keep-color --out out

        mambastyle stylize photo.jpg -s waves.png -s mosaic.png --weights 0.7,0.3 --strength 1.2

        mambastyle stylize photo.jpg -s waves.png -s mosaic.png --mask sky.png --mask ground.png

        mambastyle stylize photos/ -s paintings/ --grid

        mambastyle stylize --video clip.mp4 --style painting.jpg -o stylized.mp4
    """
    from mambastyle import images
    from mambastyle.api.stylizer import check_strength, prepare_style

    check_strength(strength)
    if not style:
        raise ValueError("no style: name a painting with --style")
    if bool(contents) == (video is not None):
        raise ValueError("nothing to stylize: name photographs, or one video with --video (not both)")
    if video is None:
        as_folder(out)
    batch = Batch()
    styles: dict[str, Tensor] = {}
    found = batch.find(style)
    for path, name in stems(found).items():
        with batch.attempt(path):
            styles[name] = prepare_style(path)
    parts = parse_weights(weights)
    # A mask that cannot be read ends the command: without it the regions would be others.
    paths = [path for one in mask or [] for path in images.find(one)]
    masks = [images.read(path, background="black").mean(0).add(1).div(2) for path in paths]
    together = mix or parts is not None or len(masks) > 1
    if len(masks) > 1 and len(masks) != len(styles):
        raise ValueError(f"{len(masks)} masks for {len(styles)} styles: give one mask, or one for each style")
    if grid and (together or masks):
        raise ValueError("--grid shows each style by itself: leave --mix, --weights and --mask out")
    options: dict[str, Any] = {"strength": strength, "keep_color": keep_color, "seed": seed}
    options["average"] = average
    if masks:
        options["mask"] = masks if len(masks) > 1 else masks[0]
    # What goes into one picture, by the name that its file gets.
    recipes: dict[str, dict[str, Any]] = {name: {"style": image} for name, image in styles.items()}
    if together and styles:
        if batch.failures:
            # A mixture without one of its styles would be another picture.
            batch.finish()
        recipes = {"mix": {"styles": list(styles.values()), "weights": parts}}
    if video is not None:
        return _video(video, out, lambda: _load(model, device, precision), recipes, options, size, batch)

    paths = batch.find(contents or [])
    if not paths or not recipes:
        return batch.finish(out)
    stylizer = _load(model, device, precision)
    if grid:
        return _grid(stylizer, paths, styles, options, out / f"grid.{form.value}", batch)
    names = stems(paths)
    with progress("stylize", len(paths) * len(recipes)) as bar:
        for path in paths:
            with batch.attempt(path):
                photo = images.read(path)
                photo = photo if size is None else images.fit(photo, size)
                for name, recipe in recipes.items():
                    with batch.attempt(f"{path} in the style {name}"):
                        stylized = stylizer.stylize(photo, **recipe, **options)
                        images.write(out / f"{names[path]}.{name}.{form.value}", stylized)
                        batch.done += 1
                    bar.advance(bar.task_ids[0])
    return batch.finish(out)


def _load(model: str, device: str | None, precision: Precision) -> "Stylizer":
    from mambastyle.api import load_stylizer

    return load_stylizer(model, device=device, precision=precision)


def _grid(
    stylizer: "Stylizer",
    paths: Sequence[Path],
    styles: dict[str, "Tensor"],
    options: dict[str, Any],
    target: Path,
    batch: Batch,
) -> None:
    """Contents below each other, styles above them side by side, all as squares of one size."""
    import torch

    from mambastyle import images

    images.check_writable(target)

    def square(image: "Tensor") -> "Tensor":
        return images.resize(images.center_crop_square(image), _TILE, _TILE)

    rows: list[list[Tensor]] = [[torch.ones(3, _TILE, _TILE), *(square(style) for style in styles.values())]]
    names = stems(paths)
    row_labels = [""]
    with progress("grid", len(paths) * len(styles)) as bar:
        for path in paths:
            with batch.attempt(path):
                photo = square(images.read(path, at_least=_TILE))
                row = [photo]
                for style in styles.values():
                    row.append(stylizer.stylize(photo, style, **options, output="tensor"))
                    bar.advance(bar.task_ids[0])
                rows.append(row)
                row_labels.append(names[path])
                batch.done += 1
    if batch.done:
        tiles = [tile for row in rows for tile in row]
        sheet = images.grid(tiles, len(styles) + 1, column_labels=["", *styles], row_labels=row_labels)
        images.write(target, sheet)
    batch.finish(target)


def _video(
    source: Path,
    target: Path,
    load: Callable[[], "Stylizer"],
    recipes: dict[str, dict[str, Any]],
    options: dict[str, Any],
    size: int | None,
    batch: Batch,
) -> None:
    from mambastyle import images
    from mambastyle import video as videos

    videos.check_writable(target)
    if batch.failures:
        return batch.finish()
    if len(recipes) != 1:
        raise ValueError(f"{len(recipes)} styles for a video: give one, or mix them with --mix or --weights")
    (source,) = images.find(source, suffixes=videos.SUFFIXES, what="videos")
    found = videos.inspect(source)
    stylizer = load()
    (recipe,) = recipes.values()

    def change(frame: "Tensor") -> "Tensor":
        frame = frame if size is None else images.fit(frame, size)
        return stylizer.stylize(frame, **recipe, **options, output="tensor")

    with progress("video", found.frames) as bar, batch.attempt(source):
        count = videos.transform(source, target, change, progress=lambda: bar.advance(bar.task_ids[0]))
        batch.done += 1
        typer.echo(f"{count} frames at {float(found.rate):g} a second")
    return batch.finish(target)


def parse_weights(text: str | None) -> list[float] | None:
    """'0.7,0.3' -> [0.7, 0.3]."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--weights {text!r}: expected numbers such as 0.7,0.3") from error
