"""Presets: the trained models that a name stands for, with licence and what they reach. The only registry."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mambastyle.checkpoints import CheckpointError, nearest, read_header

# What a folder must and may hold to be loaded as a model that inverts.
REQUIRED_FILES = ("generator.safetensors", "inversion.safetensors")
OPTIONAL_FILES = ("directions.safetensors", "features.safetensors")
# What a folder holds to be loaded as a model that stylizes: one of these, named after its kind.
STYLIZER_FILES = ("samam.safetensors", "mamba-st.safetensors")


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
    def stylizes(self) -> bool:
        """Whether it stylizes pictures; otherwise it inverts them."""
        return not set(self.files).isdisjoint(STYLIZER_FILES)

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
    reaches="559 test faces: L2 0.0044 on [-1, 1], MS-SSIM 0.959 (docs/reproduction.md)",
    demo_edits=(("gender", (-2.0, 2.0, 3.0)), ("noble", (1.5, 2.5)), ("warrior", (1.5, 2.5))),
)

_STYLE_DATA = (
    "photographs of BSDS500, Caltech-101, Oxford-IIIT Pet, Urban100 and clothing; paintings of WikiArt, "
    "textures of DTD"
)
_STYLE_LICENCE = "research use, not commercial (as its data, of which BSDS500 is non-commercial)"

_SAMAM_SMALL = Preset(
    name="samam-small",
    description="SaMam at a quarter of the published width: any photograph in the manner of any painting",
    data=_STYLE_DATA,
    licence=_STYLE_LICENCE,
    reaches="docs/reproduction.md has the table of `mambastyle evaluate style-transfer`",
    files=("samam.safetensors",),
)
_MAMBA_ST_SMALL = Preset(
    name="mamba-st-small",
    description="Mamba-ST at a fifth of the published width: any photograph in the manner of any painting",
    data=_STYLE_DATA,
    licence=_STYLE_LICENCE,
    reaches="docs/reproduction.md has the table of `mambastyle evaluate style-transfer`",
    files=("mamba-st.safetensors",),
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {preset.name: preset for preset in (_KAOKORE64, _SAMAM_SMALL, _MAMBA_ST_SMALL)}
)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where the parts of one model that inverts lie; `directions` and `features` may be absent."""

    name: str
    generator: Path
    inversion: Path
    directions: Path | None
    features: Path | None

    @property
    def paths(self) -> list[Path]:
        """Those that are there."""
        return [p for p in (self.generator, self.inversion, self.directions, self.features) if p is not None]


@dataclasses.dataclass(frozen=True)
class StylizerFile:
    """Where a model that stylizes lies."""

    name: str
    path: Path

    @property
    def paths(self) -> list[Path]:
        """The one file, as a list."""
        return [self.path]


def find(source: str | os.PathLike[str]) -> ModelFiles | StylizerFile:
    """The files that a preset's name, a folder, or a checkpoint stands for.

    A checkpoint is that of a model that stylizes, or the inversion checkpoint in its folder. Raises
    CheckpointError when there is no such preset or path (naming the nearest preset), or when the folder lacks
    a required file.
    """
    if isinstance(source, str) and source in PRESETS:
        preset = PRESETS[source]
        required = preset.files if preset.stylizes else REQUIRED_FILES
        if missing := [name for name in required if name in preset.missing()]:
            raise CheckpointError(
                f"this installation lacks {', '.join(missing)} of the preset {source!r}: install the package "
                "again, or train them with the recipes"
            )
        if preset.stylizes:
            return StylizerFile(source, preset.folder / preset.files[0])
        return _model_in(preset.folder, source)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors" and f"{read_header(path).kind}.safetensors" in STYLIZER_FILES:
            return StylizerFile(path.stem, path)
        path = path.parent
    if path.is_dir():
        if missing := [name for name in REQUIRED_FILES if not (path / name).is_file()]:
            styles = [path / name for name in STYLIZER_FILES if (path / name).is_file()]
            if len(styles) == 1:
                return StylizerFile(path.name, styles[0])
            if styles:
                raise CheckpointError(
                    f"the folder {path} holds two models that stylize: name one of the files"
                )
            raise CheckpointError(
                f"the folder {path} lacks {' and '.join(missing)}: a model is a folder with "
                f"{', '.join(REQUIRED_FILES)} (and {', '.join(OPTIONAL_FILES)}), or with one of "
                f"{', '.join(STYLIZER_FILES)}"
            )
        return _model_in(path, path.name)
    near = nearest(str(source), PRESETS)
    hint = f"did you mean {near!r}?" if near else f"the presets are: {', '.join(PRESETS)}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        hint += f"; from the Hugging Face hub: Inverter.from_pretrained({str(source)!r}, download=True)"
    raise CheckpointError(f"no preset or folder named {str(source)!r}: {hint}")


def find_model(source: str | os.PathLike[str]) -> ModelFiles:
    """`find` for a model that inverts; CheckpointError for one that stylizes."""
    found = find(source)
    if isinstance(found, StylizerFile):
        raise CheckpointError(
            f"{str(source)!r} stylizes pictures, it does not invert them: give it to `mambastyle stylize`, "
            f"and here {_names(stylizes=False)}"
        )
    return found


def find_stylizer(source: str | os.PathLike[str]) -> StylizerFile:
    """`find` for a model that stylizes; CheckpointError for one that inverts."""
    found = find(source)
    if isinstance(found, ModelFiles):
        raise CheckpointError(
            f"{str(source)!r} inverts pictures, it does not stylize them: give it to `mambastyle invert` or "
            f"`edit`, and here {_names(stylizes=True)}"
        )
    return found


def _names(*, stylizes: bool) -> str:
    return " or ".join(preset.name for preset in PRESETS.values() if preset.stylizes == stylizes)


def _model_in(folder: Path, name: str) -> ModelFiles:
    directions, features = (folder / file if (folder / file).is_file() else None for file in OPTIONAL_FILES)
    generator, inversion = (folder / file for file in REQUIRED_FILES)
    return ModelFiles(name, generator, inversion, directions, features)
