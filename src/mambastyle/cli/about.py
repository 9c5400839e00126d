"""`mambastyle info` and `mambastyle doctor`."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def info(
    model: Annotated[
        str | None, typer.Argument(help="A preset, a folder, or one checkpoint; without it, the presets.")
    ] = None,
) -> None:
    """Show what a preset, a folder or a checkpoint holds, and verify its hash.

    Examples:

        mambastyle info

        mambastyle info kaokore64

        mambastyle info out/face.inversion.safetensors
    """
    from mambastyle.presets import PRESETS, find_model

    if model is None:
        table = Table("preset", "what", "licence", "reaches", box=None, pad_edge=False)
        for preset in PRESETS.values():
            state = "" if not preset.missing() else " (not installed)"
            table.add_row(preset.name + state, preset.description, preset.licence, preset.reaches)
        return Console().print(table)
    if Path(model).is_file():
        return _show_checkpoint(Path(model))
    if model in PRESETS:
        preset = PRESETS[model]
        typer.echo(
            f"{preset.description}\ndata: {preset.data}\nlicence: {preset.licence}\n{preset.reaches}\n"
        )
    files = find_model(model)
    for path in (files.generator, files.inversion, files.directions, files.features):
        if path is not None:
            _show_checkpoint(path)
    return None


def _show_checkpoint(path: Path) -> None:
    from mambastyle import checkpoints

    checkpoint = checkpoints.load(path)
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    typer.echo(
        f"{path}: {checkpoint.kind}, {len(checkpoint.tensors)} tensors, {parameters:,} numbers, "
        f"{path.stat().st_size / 2**20:.1f} MiB, sha256 {checkpoint.sha256[:16]} (verified)"
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, values in (("config", checkpoint.config), ("card", checkpoint.card)):
        for key, value in values.items():
            text = str(value)
            table.add_row(f"  {name}", key, text if len(text) <= 200 else f"{text[:200]}…")
    Console().print(table)


def doctor() -> None:
    """Check this installation: versions, devices, scan backends, presets; exit code 1 when one is broken.

    Example:

        mambastyle doctor
    """
    table = Table("what", "state", "", box=None, pad_edge=False)
    broken = []
    for name, check in _CHECKS.items():
        try:
            state, detail = "ok", check()
        except (ImportError, RuntimeError, ValueError, OSError) as error:
            state, detail = "broken", " ".join(str(error).split())
            broken.append(name)
        table.add_row(name, state, detail)
    for package, extra in _OPTIONAL.items():
        try:
            table.add_row(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "absent", f'optional: pip install "mambastyle[{extra}]"')
    Console().print(table)
    if broken:
        typer.echo(f"error: {', '.join(broken)} broken: see above", err=True)
        raise typer.Exit(1)


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _device() -> str:
    import torch

    if not torch.accelerator.is_available():
        return "no accelerator, so the CPU"
    return str(torch.accelerator.current_accelerator())


def _scan() -> str:
    """Every backend that says it can run must agree with the reference."""
    import torch

    from mambastyle.ops import available_backends, scan_backend, selective_scan

    random = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 1, 4, 9, generator=random)
    A = -torch.rand(4, 3, generator=random)
    B, C = torch.randn(2, 1, 1, 3, 9, generator=random)
    expected = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="reference")
    for backend in available_backends():
        y = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
        if not torch.allclose(y, expected, atol=1e-5):  # type: ignore[arg-type]
            raise RuntimeError(f"the backend {backend} disagrees with the reference: please report it")
    return f"{', '.join(available_backends())}; auto is {scan_backend('auto', u)}"


def _pillow() -> str:
    from PIL import Image, features

    if missing := [name for name in ("jpg", "zlib", "webp", "freetype2") if not features.check(name)]:
        raise RuntimeError(f"Pillow was built without {', '.join(missing)}: install its wheel from PyPI")
    return Image.__version__


def _presets() -> str:
    from mambastyle import checkpoints
    from mambastyle.presets import PRESETS

    states = []
    for preset in PRESETS.values():
        missing = preset.missing()
        for name in preset.files:
            if name not in missing:
                checkpoints.load(preset.folder / name)
        states.append(f"{preset.name} lacks {', '.join(missing)}" if missing else f"{preset.name} verified")
    return "; ".join(states)


_CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "torch": _torch,
    "device": _device,
    "selective scan": _scan,
    "pictures": _pillow,
    "presets": _presets,
}
_OPTIONAL = {
    "accelerate": "train",
    "tensorboard": "train",
    "torchmetrics": "eval",
    "scikit-learn": "directions",
}
