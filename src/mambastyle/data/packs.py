"""Labelled picture packs: a zip (or folder) with pictures and one labels.csv whose first column is `file`."""

import csv
import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mambastyle import images
from mambastyle.checkpoints import nearest

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 28
"""Of a file in a pack, unpacked."""


@dataclass(frozen=True)
class Pack:
    """One pack, opened: its rows (file, label columns) and where the bytes are."""

    path: Path
    rows: tuple[dict[str, str], ...]

    def select(self, **wanted: str) -> "Pack":
        """The rows whose columns have these values, such as split="train"; ValueError when none has."""
        for column in wanted:
            if self.rows and column not in self.rows[0]:
                known = ", ".join(self.rows[0])
                raise ValueError(f"{self.path} has no column {column!r}: it has {known}")
        rows = tuple(row for row in self.rows if all(row[key] == value for key, value in wanted.items()))
        if not rows:
            raise ValueError(f"{self.path} has no picture with {wanted}: check the split or label")
        return Pack(self.path, rows)

    def labels(self, column: str, classes: Sequence[str]) -> Tensor:
        """Column as class numbers (count,) int64 in the order of `classes`; ValueError for another value."""
        numbers = {name: number for number, name in enumerate(classes)}
        for row in self.rows:
            if row[column] not in numbers:
                raise ValueError(
                    f"{self.path}: {row['file']} has {column} {row[column]!r}, expected one of {classes}"
                )
        return torch.tensor([numbers[row[column]] for row in self.rows])

    def read(self) -> Iterator[tuple[dict[str, str], bytes]]:
        """Each row with the bytes of its picture; ValueError for one outside the pack, or too large."""
        with reader_of(self.path) as read:
            for row in self.rows:
                yield row, read(row["file"])

    def load(
        self, size: int, *, crop: Callable[[Image.Image], Image.Image] | None = None, progress: bool = True
    ) -> UInt8[Tensor, "count 3 size size"]:
        """All pictures in memory as RGB bytes: centre-cropped to a square, then antialiased down to `size`.

        The resize is `images.resize`, the one that the models' own inputs go through. The decoded bytes
        are kept in the user's cache folder, where there is one that can be written.
        """
        cached = None if crop else self._cache_file(size)
        if cached is not None and cached.is_file():
            stored = np.load(cached, allow_pickle=False)
            if stored.shape == (len(self.rows), 3, size, size):
                return torch.from_numpy(stored)
        out = torch.empty(len(self.rows), 3, size, size, dtype=torch.uint8)
        bar = tqdm(self.read(), total=len(self.rows), desc=f"read {self.path.name}", disable=not progress)
        for number, (_, data) in enumerate(bar):
            with Image.open(io.BytesIO(data)) as opened:
                picture = opened.convert("RGB")
            picture = crop(picture) if crop else picture
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
            square = images.resize(images.center_crop_square(pixels), size, size)
            out[number] = to_bytes(square)
        if cached is not None:
            _write_cache(cached, out.numpy())
        return out

    def _cache_file(self, size: int) -> Path:
        """Where these pictures at this size are kept: named by the pack, its time stamps and the rows."""
        names = [row["file"] for row in self.rows]
        # A folder's own time stamp does not change with a picture in it.
        files = [self.path / name for name in names] if self.path.is_dir() else [self.path]
        stamps = [(stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, files)]
        key = f"{self.path.resolve()}:{stamps}:{size}:{names}"
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        return root / "mambastyle" / "packs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def open_pack(path: str | os.PathLike[str]) -> Pack:
    """Open a zip or folder with a labels.csv; ValueError that names what is missing."""
    path = Path(path).expanduser()
    if (path / "labels.csv").is_file() or (path.is_file() and zipfile.is_zipfile(path)):
        with reader_of(path) as read:
            text = read("labels.csv").decode("utf-8")
    else:
        near = nearest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else None
        hint = f" (is it {near}?)" if near else ""
        raise ValueError(f"no picture pack at {path}{hint}: expected a zip or a folder with labels.csv")
    rows = tuple(csv.DictReader(io.StringIO(text)))
    if not rows or "file" not in rows[0]:
        raise ValueError(f"{path}: labels.csv has no rows, or no column named file")
    return Pack(path, rows)


@contextmanager
def reader_of(path: Path) -> Iterator[Callable[[str], bytes]]:
    """What reads a file of a pack, zip or folder, by its name in there.

    A pack may come from a stranger: ValueError for a name that leads out of it or is not in it, and for a
    file of more than 256 MiB, which a zip of some kilobytes can hold.
    """
    if path.is_dir():
        root = path.resolve()

        def read(name: str) -> bytes:
            file = (root / name).resolve()
            if not file.is_relative_to(root):
                raise ValueError(f"{path}: {name} lies outside of the pack: list files of its own folder")
            try:
                _check_size(path, name, file.stat().st_size)
                return file.read_bytes()
            except OSError as error:
                raise ValueError(f"{path}: cannot read {name} ({error.strerror or error})") from error

        yield read
        return
    with zipfile.ZipFile(path) as archive:

        def read(name: str) -> bytes:
            try:
                _check_size(path, name, archive.getinfo(name).file_size)
                return archive.read(name)
            except KeyError:
                raise ValueError(f"{path} has no {name}") from None
            except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{path}: cannot read {name} ({error})") from error

        yield read


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{path}: {name} has {size:,} bytes, more than a picture may ({MOST_BYTES:,})")


def _write_cache(path: Path, values: np.ndarray) -> None:
    """Keep it if that works; a cache that cannot be written costs time at the next start, nothing else."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.save(file, values)
        partial.replace(path)
    except OSError as error:
        logger.info("not cached (%s)", error)


def to_bytes(image: Tensor) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to 0..255, rounded."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(image: UInt8[Tensor, "*shape"]) -> Tensor:
    """0..255 to [-1, 1], float32."""
    return image.float() / 127.5 - 1
