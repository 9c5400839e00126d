"""What a protocol hands back: one table with its conditions in the heading, as Markdown and as JSON."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambastyle.files import write_whole


@dataclass
class Table:
    """Rows of numbers and names. title: what was measured on how many pictures of what size.

    columns: key -> heading, in order; a row may lack a key (shown as a dash). notes: one sentence each on
    conventions. Keys of rows that are no column (intervals, settings) are written to the JSON alone.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """A GitHub table under its title, the notes below it."""
        lines = ["| " + " | ".join(self.columns.values()) + " |", "|" + "---|" * len(self.columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(_cell(row.get(key)) for key in self.columns) + " |")
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", *lines, *([""] if notes else []), *notes]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values; NaN and infinity become null."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows]
        return {"title": self.title, "columns": self.columns, "rows": rows, "notes": list(self.notes)}

    def write(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write PATH.md and PATH.json (whatever suffix `path` has); returns both."""
        path = Path(path)
        markdown = write_whole(path.with_suffix(".md"), self.markdown().encode())
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        return markdown, write_whole(path.with_suffix(".json"), text.encode())


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
