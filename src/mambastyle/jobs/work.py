"""What a job does with each picture: a description that travels, and what `build` makes of it there."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mambastyle import images
from mambastyle.api import Inverter, Stylizer, load_inverter, load_stylizer
from mambastyle.checkpoints import read_header
from mambastyle.compute import Precision
from mambastyle.files import file_name
from mambastyle.latents.directions import Direction, Directions, parse_edit
from mambastyle.presets import find_model, find_stylizer


class Work(Protocol):
    """One operation on pictures: `prepare` and `encode` run in several threads, `compute` in one."""

    batch_size: int

    def prepare(self, data: bytes) -> Tensor:
        """The picture in a file's bytes, as `compute` takes it; ValueError when there is none."""
        ...

    def compute(self, pictures: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results for a batch."""
        ...

    def encode(self, result: Tensor) -> dict[str, bytes | memoryview]:
        """A result as files by suffix."""
        ...


class Job(Protocol):
    """The description of a work: what the manifest compares, and what makes the work in any process."""

    @property
    def label(self) -> str:
        """What goes between the name and the suffix of a single file."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that the outputs depend on, as JSON. ValueError for what is wrong about the description itself,
        before a folder belongs to it.
        """
        ...

    def build(self) -> Work: ...


@dataclasses.dataclass(frozen=True)
class EditJob:
    """Invert each picture and render it edited; `edits` as on the command line, such as "age@0:4=-1"."""

    model: str
    edits: tuple[str, ...]
    suffix: str = ".png"
    batch_size: int = 16
    device: str | None = None
    precision: Precision = "fp32"

    @property
    def label(self) -> str:
        parts = [parse_edit(text) for text in self.edits]
        return ".".join(f"{file_name(name)}{strength:+g}" for name, strength in parts if strength is not None)

    def identity(self) -> dict[str, Any]:
        files = find_model(self.model)
        hashes = {path.stem: read_header(path).sha256 for path in (files.generator, files.inversion)}
        known = Directions()
        if files.directions is not None:
            hashes["directions"] = read_header(files.directions).sha256
            known = Directions.load(files.directions)
        for text in self.edits:
            known.at(parse_edit(text)[0])
        named = ("edits", "suffix", "precision")
        return {"verb": "edit", **{key: getattr(self, key) for key in named}, **hashes}

    def build(self) -> "EditWork":
        inverter = load_inverter(
            self.model, device=self.device, precision=self.precision, batch_size=self.batch_size
        )
        parsed = [parse_edit(text) for text in self.edits]
        edits = [(inverter.directions.at(name), strength or 0.0) for name, strength in parsed]
        return EditWork(inverter, edits, self.suffix)


class EditWork:
    """Edits batches with one inverter."""

    def __init__(self, inverter: Inverter, edits: list[tuple[Direction, float]], suffix: str) -> None:
        self.inverter, self.edits, self.suffix = inverter, edits, suffix
        self.batch_size = inverter.batch_size

    def prepare(self, data: bytes) -> Tensor:
        return self.inverter.prepare(data)

    def compute(self, pictures: Sequence[Tensor]) -> Sequence[Tensor]:
        edited = self.inverter.edit(list(pictures), self.edits)
        return list(self.inverter.render(edited, output="tensor"))

    def encode(self, result: Tensor) -> dict[str, bytes | memoryview]:
        return {self.suffix: images.encode(result, self.suffix)}


@dataclasses.dataclass(frozen=True)
class StylizeJob:
    """Stylize each picture by one style, or by several mixed; the options are those of `Stylizer.stylize`."""

    model: str
    styles: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    strength: float = 1.0
    keep_color: bool = False
    seed: int = 0
    average: int = 1
    suffix: str = ".png"
    device: str | None = None
    precision: Precision = "fp32"

    @property
    def label(self) -> str:
        return "stylized"

    def identity(self) -> dict[str, Any]:
        named = ("weights", "strength", "keep_color", "seed", "average", "suffix", "precision")
        options = {key: getattr(self, key) for key in named}
        for style in self.styles:
            images.read(style)
        styles = [hashlib.sha256(Path(style).read_bytes()).hexdigest() for style in self.styles]
        network = read_header(find_stylizer(self.model).path).sha256
        return {"verb": "stylize", "styles": styles, "network": network, **options}

    def build(self) -> "StylizeWork":
        return StylizeWork(load_stylizer(self.model, device=self.device, precision=self.precision), self)


class StylizeWork:
    """Stylizes one picture after the other, each in its own size."""

    batch_size = 1

    def __init__(self, stylizer: Stylizer, job: StylizeJob) -> None:
        self.stylizer, self.job = stylizer, job

    def prepare(self, data: bytes) -> Tensor:
        return images.read(data)

    def compute(self, pictures: Sequence[Tensor]) -> Sequence[Tensor]:
        job = self.job
        return self.stylizer.stylize(
            list(pictures),
            styles=list(job.styles),
            weights=job.weights,
            strength=job.strength,
            keep_color=job.keep_color,
            seed=job.seed,
            average=job.average,
            output="tensor",
        )

    def encode(self, result: Tensor) -> dict[str, bytes | memoryview]:
        return {self.job.suffix: images.encode(result, self.job.suffix)}
