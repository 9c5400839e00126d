"""What a protocol hands back: one table with its conditions in the heading, as Markdown and as JSON."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mambastyle import images
from mambastyle.files import write_whole


@dataclass
class Table:
    """Rows of numbers and names. title: what was measured on how many pictures of what size.

    columns: key -> heading, in order; a row may lack a key (shown as a dash). A row's KEY_interval stands in
    brackets behind its KEY. notes: one sentence each on conventions. Keys of rows that are no column
    (settings) are written to the JSON alone. figures: pictures (3 height width) that belong to it, by name.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: Sequence[str] = ()
    figures: dict[str, Tensor] = field(default_factory=dict)

    def markdown(self) -> str:
        """A GitHub table under its title, the notes below it."""
        lines = ["| " + " | ".join(self.columns.values()) + " |", "|" + "---|" * len(self.columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(_cell(row, key) for key in self.columns) + " |")
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", *lines, *([""] if notes else []), *notes]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values; NaN and infinity become null."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows]
        return {"title": self.title, "columns": self.columns, "rows": rows, "notes": list(self.notes)}

    def write(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write PATH.md, PATH.json (whatever suffix it has) and PATH-FIGURE.png; returns the first two."""
        path = Path(path).with_suffix("")
        shown = []
        for name, picture in self.figures.items():
            file = images.write(path.with_name(f"{path.name}-{name}.png"), picture)
            shown.append(f"\n![{name}]({file.name})\n")
        markdown = write_whole(path.with_suffix(".md"), "".join([self.markdown(), *shown]).encode())
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        return markdown, write_whole(path.with_suffix(".json"), text.encode())


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if interval is None else f"{text} ({interval[0]:.3g} to {interval[1]:.3g})"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
