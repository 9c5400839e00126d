"""The pictures of a job: files of folders and globs, and the samples of webdataset tars, read at random."""

import dataclasses
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from mambastyle import images
from mambastyle.files import stems

Span = tuple[int, int]  # where in a tar the bytes begin, and how many they are


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture: what the manifest calls it, what its outputs are called, and where its bytes are."""

    key: str
    name: str
    path: Path
    span: Span | None = None
    beside: tuple[tuple[str, Span], ...] = ()
    """The other members of a tar's sample by suffix: labels and captions, handed on as they are."""

    def read(self) -> bytes:
        """The bytes of the picture; OSError when they cannot be read."""
        return _read(self.path, self.span)

    def read_beside(self) -> dict[str, bytes]:
        """The bytes of the other members of its sample."""
        return {suffix: _read(self.path, span) for suffix, span in self.beside}


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal ones: every `count`-th picture."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"the shard {self} does not exist: give 0/{self.count} to {self.count - 1}/{self.count}"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """'0/4' as the first of four; ValueError for anything else."""
        match = re.fullmatch(r"(\d{1,9})/([1-9]\d{0,8})", text)
        if match is None:
            raise ValueError(f"the shard is {text!r}, expected I/N such as 0/4, the first of four")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items of this part."""
        return list(items[self.index :: self.count])


def find_items(
    sources: Iterable[str], attempt: Callable[[object], AbstractContextManager[None]]
) -> list[Item]:
    """All pictures of files, folders, globs and tars (`*.tar`, with the keys that webdataset gives samples).

    Each source is looked at inside `attempt(source)`, which may keep its error. Outputs get names of which
    no two are the same, also where the file system takes no account of case.
    """
    found: dict[Path, tuple[Path, Span | None, tuple[tuple[str, Span], ...]]] = {}
    for source in sources:
        with attempt(source):
            for path in images.find(source, suffixes=(*images.SUFFIXES, ".tar"), what="pictures or tars"):
                if path.suffix.lower() != ".tar":
                    found[path] = (path, None, ())
                    continue
                with attempt(path):
                    for member, span, beside in _samples(path):
                        found[path / member] = (path, span, beside)
    # webdataset's key ends at the first dot.
    names = stems(found, dots=False)
    return [Item(str(place), names[place], *where) for place, where in found.items()]


def _samples(path: Path) -> list[tuple[str, Span, tuple[tuple[str, Span], ...]]]:
    """The samples of a tar: runs of members that agree up to the first dot, with one picture each."""
    groups: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, file = member.name.rpartition("/")
                    stem, _, suffix = file.partition(".")
                    groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[f".{suffix}"] = (
                        member.offset_data,
                        member.size,
                    )
    except (tarfile.TarError, EOFError) as error:
        raise images.ImageError(
            f"{path} is no tar that can be read ({error}): copy it again, and unpack .tar.gz to .tar"
        ) from error
    samples = []
    for key, members in groups.items():
        pictures = [
            suffix for suffix in members if f".{suffix.rpartition('.')[2].lower()}" in images.SUFFIXES
        ]
        if pictures:
            beside = tuple((suffix, span) for suffix, span in members.items() if suffix not in pictures)
            samples.append((f"{key}{pictures[0]}", members[pictures[0]], beside))
    if not samples:
        raise images.ImageError(
            f"no pictures in the tar {path}: expected samples with one of {images.SUFFIXES}"
        )
    return samples


def _read(path: Path, span: Span | None) -> bytes:
    if span is None:
        return path.read_bytes()
    start, size = span
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"{os.fspath(path)} ends too early: it changed since the job began")
    return data
