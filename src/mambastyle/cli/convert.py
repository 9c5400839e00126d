"""`mambastyle convert`."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    file: Annotated[
        Path, typer.Argument(help="A published file: .pkl, .pt, .pth, .ckpt, .npy, .safetensors.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    kind: Annotated[
        str | None,
        typer.Option(help="What the file has to be, such as stylegan2-nvidia; default: recognised."),
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="LPIPS: torchvision's file of the backbone.", exists=False)
    ] = None,
    num_ws: Annotated[
        int, typer.Option(min=1, help="Directions in w: how many latents the generator takes.")
    ] = 18,
) -> None:
    """Convert published weights or directions to a file of ours, without executing anything in them.

    Read are StyleGAN2 (NVIDIA's .pkl, the .pt of the inversion repositories), MambaStyle, ArcFace, face
    parsing, VGG-19, LPIPS, Inception of the FID, Mamba-ST, SaMam, and the directions of InterFaceGAN and
    GANSpace.

    Examples:

        mambastyle convert ffhq.pkl -o ffhq.safetensors

        mambastyle convert age_w_boundary.npy -o age.safetensors
    """
    from mambastyle.published.convert import convert as run

    converted = run(file, out, kind=kind, backbone=backbone, num_ws=num_ws)
    typer.echo(
        f"{file} ({converted.published_kind}) written to {out} ({converted.kind}), "
        f"sha256 {converted.sha256[:16]}\n"
        f"licence: {converted.card['licence']}"
    )
