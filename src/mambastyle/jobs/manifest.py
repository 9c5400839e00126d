"""What of a job is done: JSON lines, appended and synced only after the outputs they name are on the disk.

A job's folder holds one or more of them: manifest.jsonl, manifest-1-of-4.jsonl for a shard, one for each
worker on Ray. All are read, so a job may go on with another number of shards or another engine. The first
line of each says which job it is; a line that was cut off by a crash counts as not written.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambastyle.files import write_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class JobError(ValueError):
    """A job that cannot run in this folder; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Line:
    """An item and its outputs, or why it failed."""

    key: str
    outputs: tuple[str, ...] = ()
    error: str | None = None


class Manifest:
    """The manifests of a folder, of which this process writes `part` ("" for manifest.jsonl).

    Raises JobError when the folder holds another job, or when another process writes this part.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], part: str = "") -> None:
        self.folder, self.job = folder, json.loads(json.dumps(job))
        self.path = folder / f"manifest{f'-{part}' if part else ''}.jsonl"
        self.done: dict[str, tuple[str, ...]] = {}
        self.failed: dict[str, str] = {}
        self.writer = f"{socket.gethostname()}:{os.getpid()}"
        self._read_to: dict[Path, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            self._lock()
            self.refresh()
            self._repair()
        except BaseException:
            os.close(self._descriptor)
            raise

    def refresh(self) -> None:
        """Read what was added to any manifest of the folder since the last time."""
        for path in sorted(self.folder.glob("manifest*.jsonl")):
            start = self._read_to.get(path, 0)
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.splitlines():
                self._take(path, line)
            self._read_to[path] = start + len(whole)

    def add(self, lines: Sequence[Line]) -> None:
        """Append lines and sync them to the disk: only now do the items count as done."""
        for line in lines:
            self._keep(line)
        records = [{k: v for k, v in dataclasses.asdict(line).items() if v} for line in lines]
        self._append([record | {"writer": self.writer} for record in records])

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        # The lock goes with the process, however it ends.
        if fcntl is not None:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JobError(
                    f"another process works on {self.path}: wait for it, or give each its own --shard"
                ) from error

    def _repair(self) -> None:
        """Cut off what a crash left of a line, and begin a new file with the job."""
        size = self._read_to.get(self.path, 0)
        os.ftruncate(self._descriptor, size)
        if size == 0:
            self._append([{"job": self.job}])

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._read_to[self.path] = self._read_to.get(self.path, 0) + len(data)

    def _take(self, path: Path, data: bytes) -> None:
        try:
            record = json.loads(data)
            if "job" in record:
                if record["job"] != self.job:
                    changed = sorted(
                        k
                        for k in self.job.keys() | record["job"].keys()
                        if self.job.get(k) != record["job"].get(k)
                    )
                    raise JobError(
                        f"{self.folder} holds another job (by {', '.join(changed)}): choose another --out, "
                        "or remove its manifest*.jsonl"
                    )
                return
            self._keep(Line(record["key"], tuple(record.get("outputs", ())), record.get("error")))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{path} is no manifest of a job: remove it, or choose another --out") from error

    def _keep(self, line: Line) -> None:
        if line.error is None:
            self.done[line.key] = line.outputs
            self.failed.pop(line.key, None)
        elif line.key not in self.done:
            self.failed[line.key] = line.error
