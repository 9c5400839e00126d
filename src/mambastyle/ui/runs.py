"""Trainings as the page starts, watches and stops them: one process each, one folder each under `folder`."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# What `mambastyle train` can be asked for.
TASKS = ("gan", "inversion", "style-transfer", "features")
OUTPUT = "output.txt"
# Numbers of a line of the log that are no loss.
COUNTERS = ("step", "pictures", "pictures_per_second")
POINTS = 400


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder shows it: `curves` maps a term to (step, value) pairs."""

    name: str
    state: str
    step: int
    pictures_per_second: float
    curves: dict[str, list[tuple[int, float]]]
    samples: list[Path]
    output: str


class Runs:
    """The runs in one folder, and the processes of those that were started here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def names(self) -> list[str]:
        """All runs of the folder, the newest first."""
        if not self.folder.is_dir():
            return []
        found = [
            path for path in self.folder.iterdir() if any((path / f).is_file() for f in (OUTPUT, "run.yaml"))
        ]
        return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]

    def start(self, task: str, recipe: Path, name: str, overrides: Sequence[str] = ()) -> None:
        """Start `mambastyle train TASK RECIPE`, or go on with it where its last checkpoint stands.

        Raises ValueError when it runs already, or when the name or the recipe cannot be used.
        """
        if task not in TASKS:
            raise ValueError(f"there is no task {task!r}: choose one of {', '.join(TASKS)}")
        if not recipe.is_file():
            raise ValueError(f"there is no recipe {recipe}: choose one of the list")
        if not re.fullmatch(r"\w[\w.-]{0,60}", name):
            raise ValueError(f"the name {name!r} cannot be that of a folder: use letters, digits, - and _")
        if self._alive(name):
            raise ValueError(f"{name} is running: stop it first, or choose another name")
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        settings = [f"name={json.dumps(name)}", f"output={json.dumps(str(self.folder))}", *overrides]
        command = [sys.executable, "-m", "mambastyle", "train", task, str(recipe)]
        for setting in settings:
            command += ["--set", setting]
        with open(folder / OUTPUT, "wb") as output:
            # A session of its own: Ctrl+C in the page's terminal reaches it through `stop_all`, gently.
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def stop(self, name: str) -> None:
        """Ask a run to save and end at its next step. Raises ValueError when it does not run here."""
        if not self._alive(name):
            raise ValueError(f"{name or 'no run'} is not running from this page")
        self._processes[name].send_signal(signal.SIGTERM)

    def stop_all(self, timeout: float = 60) -> None:
        """Stop every run that was started here, and wait until each has saved."""
        for name in list(self._processes):
            with contextlib.suppress(ValueError):
                self.stop(name)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)

    def look(self, name: str) -> Run:
        """A run as it stands now."""
        folder = self.folder / name
        lines = _log(folder / "log.jsonl")
        last = lines[-1] if lines else {}
        curves: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            for term, value in line.items():
                if term not in COUNTERS:
                    curves.setdefault(term, []).append((int(line["step"]), float(value)))
        return Run(
            name=name,
            state=self._state(name),
            step=int(last.get("step", 0)),
            pictures_per_second=float(last.get("pictures_per_second", 0)),
            curves={term: _thinned(points) for term, points in curves.items()},
            samples=sorted((folder / "samples").glob("*.png"), reverse=True)[:8],
            output=_tail(folder / OUTPUT),
        )

    def _alive(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def _state(self, name: str) -> str:
        if name not in self._processes:
            return "not started from this page"
        code = self._processes[name].poll()
        if code is None:
            return "running"
        return "ended" if code == 0 else f"failed with exit code {code}"


def _log(path: Path) -> list[dict[str, float]]:
    """The lines of log.jsonl; one that is being written, or was cut off by a kill, is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` of them, evenly, the last among them."""
    stride = -(-len(points) // POINTS)
    return points[::-1][::stride][::-1] if stride > 1 else points


def _tail(path: Path, lines: int = 8) -> str:
    """The end of what the process has printed; of a progress bar its last state."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(
        line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")[-lines - 1 :]
    ).strip()
