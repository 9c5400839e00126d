"""Presets: the trained models that a name stands for, with licence and what they reach. The only registry."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mambastyle.checkpoints import CheckpointError, nearest

# What a folder must and may hold to be loaded as a model.
REQUIRED_FILES = ("generator.safetensors", "inversion.safetensors")
OPTIONAL_FILES = ("directions.safetensors", "features.safetensors")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A trained model inside the package: a folder of checkpoints, each with a card (*.md) beside it."""

    name: str
    description: str
    data: str
    licence: str
    reaches: str
    """Its measured numbers, in one line; docs/reproduction.md has the commands."""
    demo_edits: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """What `mambastyle demo` shows: directions and strengths, the strongest last."""
    files: tuple[str, ...] = (*REQUIRED_FILES, *OPTIONAL_FILES)

    @property
    def folder(self) -> Path:
        return Path(__file__).with_name("weights") / self.name

    def missing(self) -> list[str]:
        """The files that this installation lacks."""
        return [name for name in self.files if not (self.folder / name).is_file()]


_KAOKORE64 = Preset(
    name="kaokore64",
    description="Faces from Japanese illustrations of the 16th and 17th century, 64 px",
    data=(
        '"KaoKore Dataset" (collected by CODH from multiple organizations), doi:10.20676/00000353; '
        "Tian et al., arXiv:2002.08595"
    ),
    licence="CC BY-SA 4.0",
    reaches="559 test faces: L2 0.0061 on [-1, 1], MS-SSIM 0.954 (docs/reproduction.md); edits are weak yet",
    demo_edits=(("gender", (-1.0, 1.0, 2.0)), ("noble", (1.0, 2.0)), ("warrior", (1.0, 2.0))),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (_KAOKORE64,)})


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where the parts of one model lie; `directions` and `features` may be absent."""

    name: str
    generator: Path
    inversion: Path
    directions: Path | None
    features: Path | None


def find_model(source: str | os.PathLike[str]) -> ModelFiles:
    """The files that a preset's name, a folder, or the inversion checkpoint inside one stands for.

    Raises CheckpointError when there is no such preset or path (naming the nearest preset), or when the
    folder lacks a required file.
    """
    if isinstance(source, str) and source in PRESETS:
        preset = PRESETS[source]
        if missing := [name for name in REQUIRED_FILES if name in preset.missing()]:
            raise CheckpointError(
                f"this installation lacks {', '.join(missing)} of the preset {source!r}: install the package "
                "again, or train them with the recipes"
            )
        return _model_in(preset.folder, source)
    path = Path(source).expanduser()
    if path.is_file():
        path = path.parent
    if path.is_dir():
        if missing := [name for name in REQUIRED_FILES if not (path / name).is_file()]:
            raise CheckpointError(
                f"the folder {path} lacks {' and '.join(missing)}: a model is a folder with "
                f"{', '.join(REQUIRED_FILES)} (and {', '.join(OPTIONAL_FILES)})"
            )
        return _model_in(path, path.name)
    near = nearest(str(source), PRESETS)
    hint = f"did you mean {near!r}?" if near else f"the presets are: {', '.join(PRESETS)}"
    raise CheckpointError(f"no preset or folder named {str(source)!r}: {hint}")


def _model_in(folder: Path, name: str) -> ModelFiles:
    directions, features = (folder / file if (folder / file).is_file() else None for file in OPTIONAL_FILES)
    generator, inversion = (folder / file for file in REQUIRED_FILES)
    return ModelFiles(name, generator, inversion, directions, features)
