"""`mambastyle export`: a model as ONNX graphs, or as programs of torch.export."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    onnx = "onnx"
    pt2 = "pt2"


def export(
    model: Annotated[
        str, typer.Argument(help="A preset's name, or a folder or file with checkpoints.")
    ] = "kaokore64",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to; it is made.")] = Path(
        "out"
    ),
    kind: Annotated[Kind, typer.Option("--format", "-f", help="ONNX, or torch.export's pt2.")] = Kind.onnx,
    check: Annotated[bool, typer.Option(help="Run each ONNX graph and compare with the model.")] = True,
) -> None:
    """Export a model for programs without this package: ONNX files, compared with the model in onnxruntime.

    A model that inverts gives edit.onnx (image and direction in, edited picture out) and directions.npz. A
    model that stylizes gives encode_style.onnx and stylize.onnx, which take pictures of any size.
    examples/onnx_edit.py edits with them, without torch. pt2 files need this package for its scans.

    Examples:

        mambastyle export kaokore64 --out onnx

        mambastyle export samam-small --out onnx-samam
    """
    from mambastyle.api import Inverter, load
    from mambastyle.export import onnx

    loaded = load(model, device="cpu")
    metadata = {"model": loaded.name}
    if not isinstance(loaded, Inverter):
        metadata["patch"] = str(loaded.network.config.patch)
        metadata["grain"] = str(loaded.network.config.grain)
    for graph in onnx.graphs(loaded if isinstance(loaded, Inverter) else loaded.network):
        path = out / f"{graph.name}.{kind.value}"
        if kind is Kind.pt2:
            onnx.save_program(graph, path)
            typer.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
            continue
        onnx.save_onnx(graph, path, metadata)
        worst = f", {onnx.check(graph, path):.1e} from the model at most" if check else ""
        typer.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB{worst}")
    if isinstance(loaded, Inverter) and len(loaded.directions):
        typer.echo(str(onnx.save_directions(loaded, out / "directions.npz")))
