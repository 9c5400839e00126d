"""Writing files whole or not at all: a temporary neighbour, fsync, rename.

A reader never sees half a file, a full disk leaves the old one, and a killed process leaves at most a hidden
`.NAME.*.part` behind.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a disk that is not read-only",
    errno.ENOTDIR: "a part of this path is a file: choose another folder",
    errno.EISDIR: "this path is a folder: add a file name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class WriteError(OSError):
    """A file that could not be written; the message names the file, the reason and a remedy."""


def write_whole(path: str | os.PathLike[str], data: bytes | memoryview) -> Path:
    """Write `data` to `path`, making its folders: afterwards the file is whole, or as it was before.

    Raises WriteError (an OSError) when the folder cannot be made or written, or when the disk is full.
    """
    with whole(path) as part:
        # Not tempfile: its files are 0600 and would stay so after the rename.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return Path(path)


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden neighbour to write instead of `path`, which takes its place when the block ends well.

    For writers that want a name of their own; they flush to the disk themselves. Raises WriteError for every
    OSError inside, and removes the neighbour after any error.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise write_error(path, error) from error
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_error(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """The WriteError that tells of `error`, which writing `path` met."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = _REMEDIES.get(error.errno or 0, "choose another folder")
    # Set by hand: OSError(errno, text) would print "[Errno 28]" before the sentence.
    failure = WriteError(f"cannot write {path}: {reason}; {remedy}")
    failure.errno = error.errno
    return failure


def stems(paths: Iterable[Path], *, dots: bool = True) -> dict[Path, str]:
    """A name for the outputs of each input, no two the same: the stem, or with its suffix, or numbered.

    Without `dots` each dot in a stem becomes "_".
    """
    named: dict[Path, str] = {}
    taken: set[str] = set()
    counts: dict[str, int] = {}
    for path in paths:
        stem = path.stem.removesuffix(".inversion")
        stem = stem if dots else stem.replace(".", "_")
        name, fallback = stem, f"{stem}_{path.suffix.lstrip('.')}"
        while name.casefold() in taken:
            # From where the last one of this stem stopped: many of one name cost no more than others.
            count = counts[stem] = counts.get(stem, 0) + 1
            name = fallback if count == 1 else f"{stem}-{count}"
        # Some file systems take no account of case.
        named[path] = name
        taken.add(name.casefold())
    return named


def file_name(text: str) -> str:
    """A text as part of a file's name: `age@0:4` becomes `age_0-4`."""
    return re.sub(r"[^\w-]", "_", text.replace("@", "_").replace(":", "-"))


def distinct(texts: Iterable[str]) -> list[str]:
    """Each text as part of a file's name, in order, no two the same: what comes again is numbered."""
    found: list[str] = []
    taken: set[str] = set()
    for text in texts:
        name = stem = file_name(text)
        count = 1
        while name.casefold() in taken:
            count += 1
            name = f"{stem}-{count}"
        found.append(name)
        taken.add(name.casefold())
    return found


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can (Windows and some network disks cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
