"""Where outputs go: single files, or webdataset tars. What `put` and `close` give back is on the disk."""

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from mambastyle.files import sync_folder, write_error, write_whole
from mambastyle.jobs.items import Item
from mambastyle.jobs.manifest import Line, Manifest


class Sink(Protocol):
    """Takes the outputs of items, one after the other."""

    def put(self, item: Item, outputs: Mapping[str, bytes]) -> list[Line]:
        """Take an item's outputs by suffix; what is on the disk since the last call, or is lost."""
        ...

    def close(self) -> list[Line]:
        """Finish; the rest."""
        ...


class FolderSink:
    """OUT/NAME.LABEL + suffix, each file written whole or not at all."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label

    def put(self, item: Item, outputs: Mapping[str, bytes]) -> list[Line]:
        names = []
        for suffix, data in outputs.items():
            names.append(f"{item.name}.{self.label}{suffix}")
            write_whole(self.folder / names[-1], data)
        return [Line(item.key, tuple(names))]

    def close(self) -> list[Line]:
        return []


class TarSink:
    """OUT/PREFIX-000000.tar and so on, of `per_tar` samples each; a tar that has its name is whole.

    `first` numbers the first tar. A sample is the outputs and what stood beside the input in its own tar.
    """

    def __init__(self, folder: Path, prefix: str, first: int, per_tar: int) -> None:
        self.folder, self.prefix, self.number, self.per_tar = folder, prefix, first, per_tar
        self._file: IO[bytes] | None = None
        self._archive: tarfile.TarFile | None = None
        self._keys: list[str] = []

    def put(self, item: Item, outputs: Mapping[str, bytes]) -> list[Line]:
        # Read first: a sample goes in whole or not at all.
        members = {**outputs, **item.read_beside()}
        try:
            archive = self._archive or self._open()
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{item.name}{suffix}")
                info.size, info.mode = len(data), 0o644
                archive.addfile(info, io.BytesIO(data))
        except OSError as error:
            return self._give_up(error, item.key)
        self._keys.append(item.key)
        return self.close() if len(self._keys) >= self.per_tar else []

    def close(self) -> list[Line]:
        """Give the open tar its name."""
        if self._archive is None or self._file is None:
            return []
        try:
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.part, self.path)
        except OSError as error:
            return self._give_up(error)
        sync_folder(self.folder)
        lines = [Line(key, (self.path.name,)) for key in self._keys]
        self._archive, self._file, self._keys = None, None, []
        self.number += 1
        return lines

    @property
    def path(self) -> Path:
        return self.folder / f"{self.prefix}-{self.number:06d}.tar"

    @property
    def part(self) -> Path:
        """The open tar, not yet under its name."""
        return self.folder / f".{self.path.name}.part"

    def _open(self) -> tarfile.TarFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.part, "wb")  # noqa: SIM115 - stays open between the calls
        self._archive = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        return self._archive

    def _give_up(self, error: OSError, *more: str) -> list[Line]:
        """Drop the open tar: all of its samples failed, and those of `more`."""
        reason = " ".join(str(write_error(self.path, error)).split())
        lines = [Line(key, error=reason) for key in (*self._keys, *more)]
        if self._file is not None:
            # What could not be written is still in its buffer, and cannot be written now either.
            with contextlib.suppress(OSError):
                self._file.close()
        self.part.unlink(missing_ok=True)
        self._archive, self._file, self._keys = None, None, []
        return lines


def adopt_tars(manifest: Manifest, items: Sequence[Item]) -> None:
    """Note the samples of tars that got their names just before a crash."""
    by_name = {item.name: item.key for item in items}
    known = {name for outputs in manifest.done.values() for name in outputs}
    for path in sorted(manifest.folder.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar")):
        if path.name not in known:
            with tarfile.open(path, "r:") as archive:
                names = dict.fromkeys(_sample_name(member.name) for member in archive)
            keys = [by_name[name] for name in names if name in by_name]
            manifest.add([Line(key, (path.name,)) for key in keys])


def next_number(folder: Path, prefix: str) -> int:
    """The number behind that of the last tar of this prefix; tars that a crash left open are removed."""
    pattern = re.compile(r"\.?" + re.escape(prefix) + r"-(\d{6})\.tar(\.part)?")
    found = [-1]
    for name in os.listdir(folder):
        if match := pattern.fullmatch(name):
            if match[2]:
                (folder / name).unlink()
            else:
                found.append(int(match[1]))
    return max(found) + 1


def _sample_name(member: str) -> str:
    folder, _, file = member.rpartition("/")
    stem = file.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem
