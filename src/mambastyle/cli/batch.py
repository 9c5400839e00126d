"""Many files through one command: a failure costs one file, and all failures are listed at the end."""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
# What a file, a folder or a disk can cause; anything else is a mistake of ours and ends the command.
EXPECTED = (ValueError, OSError)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with a remedy where Python itself gives none."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = {"accelerate": "train", "tensorboard": "train", "torchmetrics": "eval", "scipy": "eval"}
        extra |= {"sklearn": "directions", "av": "video", "huggingface_hub": "hub", "ray": "ray"}
        extra |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx")
        extra |= {"transformers": "text", "gradio": "ui"}
        package = extra.get(error.name.split(".")[0])
        remedy = f'pip install "mambastyle[{package}]"' if package else "install the package again"
        return f"{error.name} is not installed: {remedy}"
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return f"out of memory ({text[:80]}): use a smaller --batch"
    return text


@dataclasses.dataclass
class Batch:
    """Counts what was done, keeps what failed and what there is to note."""

    done: int = 0
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def attempt(self, name: object) -> Iterator[None]:
        """Inside, an expected error counts as a failure of `name`, and warnings become notes."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        except EXPECTED as error:
            self.failures.append((str(name), one_line(error)))
        self.notes += [str(warning.message) for warning in caught]

    def find(
        self, sources: Sequence[str], *, suffixes: Sequence[str] | None = None, what: str = "saved inversions"
    ) -> list[Path]:
        """What the sources stand for, each source apart: a mistyped one does not cost the others."""
        from mambastyle import images

        found: dict[Path, None] = {}
        for source in sources:
            with self.attempt(source):
                if suffixes is None:
                    found.update(dict.fromkeys(images.find(source)))
                else:
                    found.update(dict.fromkeys(images.find(source, suffixes=suffixes, what=what)))
        return list(found)

    def finish(self, out: Path | None = None) -> None:
        """Print notes, the count and the failures; typer.Exit(1) when there was a failure."""
        for note in dict.fromkeys(self.notes):
            typer.echo(f"note: {note}", err=True)
        total = self.done + len(self.failures)
        where = f", written to {out}" if out is not None and self.done else ""
        if not self.failures:
            typer.echo(f"{self.done} done{where}")
            return
        typer.echo(f"{self.done} of {total} done{where}; {len(self.failures)} failed:", err=True)
        for name, reason in self.failures:
            # Most messages begin with the file's name already.
            typer.echo(f"  {reason}" if name in reason else f"  {name}: {reason}", err=True)
        raise typer.Exit(1)


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Runs of `size` items; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """A bar on stderr with the time left, silent when stderr is no terminal; `bar.advance` moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        bar.add_task(description, total=total)
        yield bar
