"""The paper's table 1 in its own columns: inversion, editing and cost of every method beside each other."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambastyle.api.methods import MethodName
from mambastyle.evaluation import editing, inversion
from mambastyle.evaluation.editing import standard_edits, true_labels
from mambastyle.evaluation.inversion import invert_all, load_faces, load_methods
from mambastyle.evaluation.judges import HEADINGS, Judges
from mambastyle.evaluation.table import Table
from mambastyle.features import small
from mambastyle.latents.directions import Directions

COLUMNS = ("method", "count", "lpips", "perceptual_squeeze", "l2", "fd_inception", "fd_squeeze", "ms_ssim")
COST = ("parameters", "gmacs", "milliseconds")
STRENGTH = 1.5


def run(
    models: Mapping[str, str | Path],
    pack: str | Path,
    directions: str | Path,
    judge: str | Path,
    *,
    w_plus_only: Iterable[str] = (),
    others: Sequence[tuple[MethodName, int | None]] = (),
    others_count: int | None = None,
    keep_in: str | Path | None = None,
    strength: float = STRENGTH,
    seed: int = 0,
    count: int | None = None,
    judges: Judges | None = None,
    device: Any = None,
    progress: bool = False,
) -> Table:
    """Table 1 for models on disk (see `inversion.load_methods`): per edit a column of fd(A, B')."""
    methods = load_methods(
        models,
        w_plus_only=w_plus_only,
        others=others,
        others_count=others_count,
        keep_in=keep_in,
        seed=seed,
        device=device,
    )
    network = small.load(judge)
    edits = standard_edits(list(Directions.load(directions).values()), ("noble", "warrior"))
    faces, rows = load_faces(pack, methods[0].inverter.resolution)
    faces, rows = faces[:count], rows[:count]
    names = [Path(row["file"]).stem for row in rows]
    labels = true_labels(rows, network, edits)
    data = f"test pictures of {Path(pack).stem}"
    judges = (Judges.found() if judges is None else judges).to(methods[0].inverter.device)
    # Each picture is inverted once, for both halves of the table.
    found = {method.name: invert_all(method, faces, progress=progress) for method in methods}
    left = inversion.compare(faces, methods, judges, data=data, names=names, found=found)
    right = editing.compare(
        faces, labels, methods, edits, network, judges, strengths=(strength,), data=data, found=found
    )
    return merge(left, right, strength)


def merge(left: Table, right: Table, strength: float) -> Table:
    """The columns of both, a row per method of the inversion table."""
    network = "inception" if "fd_inception" in left.columns else "squeeze"
    if f"fd_{network}" not in left.columns:
        network = "small"
    distance = f"fd_{network}"
    columns = {key: left.columns[key] for key in (*COLUMNS, distance) if key in left.columns}
    rows = [dict(row) for row in left.rows]
    for edited in right.rows:
        key = f"edit_{edited['edit'].replace(' ', '_')}"
        columns[key] = f"{HEADINGS[distance]}(A, B') {edited['edit']}"
        for row in rows:
            if row["method"] == edited["method"]:
                row[key] = edited.get(distance)
                row[f"{key}_changed"] = edited["changed"]
    columns |= {key: left.columns[key] for key in COST if key in left.columns}
    title = f"{left.title}; edits at strength {strength:g}"
    return Table(title, columns, rows, [*left.notes, *right.notes], left.figures | right.figures)
