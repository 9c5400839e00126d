"""What `mambastyle edit --paste-back` does: faces or the middle edited inside of whole photographs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambastyle.cli.batch import Batch, progress

if TYPE_CHECKING:
    from mambastyle.api import Inverter

PasteBack = Annotated[
    bool,
    typer.Option(
        "--paste-back", help="Give back whole pictures: the middle square edited, with a soft seam around it."
    ),
]
Faces = Annotated[
    bool,
    typer.Option(
        "--faces", help="Whole photographs, every face in them edited; for models of aligned faces (FFHQ)."
    ),
]
Landmarks = Annotated[
    Path | None,
    typer.Option(
        help="As --faces, with landmarks of your own: a JSON file of 5 or 68 [x, y] pairs, or several such."
    ),
]


def read_landmarks(path: Path) -> Any:
    """The table in a JSON file; what it has to look like is checked where it is used."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): write 5 or 68 [x, y] pairs") from error


def edit_photos(
    inverter: "Inverter",
    paths: Sequence[Path],
    edits: list[Any],
    targets: Sequence[Path],
    batch: Batch,
    *,
    find_faces: bool,
    landmarks: Any = None,
) -> None:
    """Edit each photograph and write it whole to its target."""
    from mambastyle import images

    with progress("edit", len(paths)) as bar:
        for path, target in zip(paths, targets, strict=True):
            with batch.attempt(path):
                edited = inverter.edit_photo(path, edits, find_faces=find_faces, landmarks=landmarks)
                images.write(target, edited)
                batch.done += 1
            bar.advance(bar.task_ids[0], 1)
