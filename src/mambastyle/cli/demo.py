"""`mambastyle demo`: faces inverted and edited, scenes stylized: pictures, two contact sheets and a table."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mambastyle.cli.batch import Batch
from mambastyle.cli.pictures import Device, Model
from mambastyle.files import stems

if TYPE_CHECKING:
    from torch import Tensor

    from mambastyle.api import Inverter, Stylizer


def demo(
    inputs: Annotated[list[str] | None, typer.Argument(help="Pictures; default: those of examples/.")] = None,
    model: Model = "kaokore64",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("out/demo"),
    device: Device = None,
) -> None:
    """Invert and edit the example faces, stylize the example scenes, in well under a minute.

    It writes every picture, a contact sheet of each (OUT/contact_sheet.png, OUT/style_sheet.png), and prints
    a table. Pictures that are named are inverted and edited alone.

    Example:

        mambastyle demo
    """
    from mambastyle import images
    from mambastyle.api import load_inverter

    start = time.perf_counter()
    batch = Batch()
    paths = batch.find(inputs or [str(examples_folder())])
    if not paths:
        return batch.finish(out)
    inverter = load_inverter(model, device=device)
    good, originals = [], []
    for path in paths:
        with batch.attempt(path):
            originals.append(inverter.prepare(path))
            good.append(path)
    if not good:
        return batch.finish(out)
    names = [stems(good)[path] for path in good]

    # The first call compiles the scan or reads it from its cache; the table shows what a picture takes after.
    inverter.render(inverter.invert(originals[:1]))
    began = time.perf_counter()
    inverted = inverter.invert(originals, names=names)
    milliseconds = (time.perf_counter() - began) * 1000 / len(good)
    columns: dict[str, Tensor] = {"inversion": inverter.render(inverted, output="tensor")}
    for direction, strengths in choose_edits(inverter, model).items():
        for strength in strengths:
            edited = inverter.edit(inverted, {direction: strength})
            columns[f"{direction} {strength:+g}"] = inverter.render(edited, output="tensor")

    for row, path in enumerate(good):
        with batch.attempt(path):
            inverter.save_inversion(out / f"{names[row]}.inversion.safetensors", inverted[row])
            for label, pictures in columns.items():
                images.write(out / f"{names[row]}.{label.replace(' ', '')}.png", pictures[row])
            batch.done += 1
    side = inverter.resolution
    shown = [images.resize(picture, side, side) for picture in originals]
    tiles = [tile for row in range(len(good)) for tile in (shown[row], *(c[row] for c in columns.values()))]
    labels = ["original", *columns]
    sheet = images.grid(tiles, len(labels), column_labels=labels, scale=max(1, 128 // side))
    images.write(out / "contact_sheet.png", sheet)

    _print_table(model, names, shown, columns, milliseconds)
    typer.echo(f"contact sheet: {out / 'contact_sheet.png'}")
    if not inputs:
        stylize_examples(examples_folder(), out, device)
    typer.echo(f"{time.perf_counter() - start:.1f} s in all")
    return batch.finish(out)


def examples_folder() -> Path:
    """Where the example faces are: in the wheel inside the package, otherwise in the repository."""
    package = Path(__file__).parents[1]
    for folder in (package / "examples", package.parents[1] / "examples"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("this installation has no example faces: name pictures, or install it again")


def stylize_examples(examples: Path, out: Path, device: str | None) -> None:
    """The example scenes in the example styles, by every preset that stylizes and is installed."""
    from mambastyle import images
    from mambastyle.api import load_stylizer
    from mambastyle.presets import PRESETS

    installed = [preset.name for preset in PRESETS.values() if preset.stylizes and not preset.missing()]
    if not installed or not (examples / "contents").is_dir():
        return
    contents, styles = (
        {path.stem: images.read(path) for path in images.find(examples / kind)}
        for kind in ("contents", "styles")
    )
    sheet = style_sheet(
        {name: load_stylizer(name, device=device) for name in installed}, contents, styles, out
    )
    images.write(out / "style_sheet.png", sheet)
    typer.echo(f"style sheet: {out / 'style_sheet.png'}")


def style_sheet(
    stylizers: Mapping[str, "Stylizer"],
    contents: Mapping[str, "Tensor"],
    styles: Mapping[str, "Tensor"],
    out: Path,
) -> "Tensor":
    """Write each content in each style by each network, and put them on one sheet."""
    import torch

    from mambastyle import images

    height, width = next(iter(contents.values())).shape[1:]

    def tile(image: "Tensor") -> "Tensor":
        """The middle of a picture at the first content's size."""
        scale = max(height / image.shape[1], width / image.shape[2])
        large = images.resize(image, round(image.shape[1] * scale), round(image.shape[2] * scale))
        top, left = (large.shape[1] - height) // 2, (large.shape[2] - width) // 2
        return large[:, top : top + height, left : left + width]

    tiles, rows = [torch.ones(3, height, width), *map(tile, styles.values())], [""]
    for name, content in contents.items():
        for model, stylizer in stylizers.items():
            rows.append(model)
            tiles.append(tile(content))
            for style, picture in styles.items():
                stylized = stylizer.stylize(content, picture, output="tensor")
                images.write(out / f"{name}.{style}.{model}.png", stylized)
                tiles.append(tile(stylized))
    return images.grid(tiles, len(styles) + 1, column_labels=["", *styles], row_labels=rows)


def choose_edits(inverter: "Inverter", model: str) -> dict[str, tuple[float, ...]]:
    """The preset's own demonstration, or the first three directions at four strengths."""
    from mambastyle.presets import PRESETS

    preset = PRESETS.get(model)
    edits = dict(preset.demo_edits) if preset else {}
    known = {name: strengths for name, strengths in edits.items() if name in inverter.directions}
    return known or dict.fromkeys(list(inverter.directions)[:3], (-2.0, -1.0, 1.0, 2.0))


def _print_table(
    model: str, names: list[str], shown: list["Tensor"], columns: dict[str, "Tensor"], milliseconds: float
) -> None:
    """L2 of each inversion, and what the strongest edit of each direction changes in the labels."""
    import torch

    from mambastyle.features import small
    from mambastyle.presets import find_model

    features = find_model(model).features
    judge = None if features is None else small.load(features)
    # The last column of a direction is its strongest edit.
    strongest = {label.split(" ")[0]: label for label in columns if label != "inversion"}
    table = Table("picture", "L2 of the inversion", *strongest.values(), box=None, pad_edge=False)
    inversions = columns["inversion"]
    with torch.inference_mode():
        for row, name in enumerate(names):
            cells = [name, f"{(shown[row] - inversions[row]).square().mean():.4f}"]
            for label in strongest.values():
                before, after = inversions[row], columns[label][row]
                cell = f"moved {(after - before).square().mean().sqrt():.3f}"
                if judge is not None:
                    changes = []
                    for head in judge.config.heads:
                        if head.name in ("gender", "status"):
                            pair = torch.stack([before, after])
                            old, new = (head.labels[int(i)] for i in judge.predict(pair, head.name))
                            changes += [f"{old} to {new}"] if old != new else []
                    cell = ", ".join(changes) or "same labels"
                cells.append(cell)
            table.add_row(*cells)
    Console().print(table)
    mean = (torch.stack(shown) - inversions).square().mean()
    typer.echo(f"{len(names)} faces: L2 {mean:.4f} on [-1, 1], {milliseconds:.0f} ms to invert each")
