"""The paper's table 3: recipes trained alike, over seeds, each beside the first one picture by picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambastyle.api import load_inverter
from mambastyle.evaluation import editing, metrics
from mambastyle.evaluation.editing import standard_edits
from mambastyle.evaluation.inversion import Found, Method, invert_all, load_faces, pair_values, summary
from mambastyle.evaluation.judges import HEADINGS, Judges
from mambastyle.evaluation.table import Table
from mambastyle.features import small
from mambastyle.latents.directions import Directions
from mambastyle.training.config import read_run_file
from mambastyle.training.inversion import InversionConfig

# Variants whose parameters the paper holds close to Final's, and how close we ask.
MATCHED = ("vit", "no-le", "no-ss2d", "base")
TOLERANCE = 0.05
COLUMNS = {
    "recipe": "recipe",
    "seeds": "seeds",
    "l2": "L2",
    "lpips": HEADINGS["lpips"],
    "perceptual_squeeze": HEADINGS["perceptual_squeeze"],
    "fd_inception": HEADINGS["fd_inception"],
    "fd_squeeze": HEADINGS["fd_squeeze"],
    "kd_squeeze": HEADINGS["kd_squeeze"],
    "ms_ssim": "MS-SSIM",
    "parameters": "M parameters",
    "gmacs": "GMACs",
    "milliseconds": "ms per picture",
}
PAIRED = ("l2", "perceptual_squeeze", "ms_ssim")


@dataclasses.dataclass
class Run:
    """One trained model, measured. The recipe is what its runs are called, without the seed."""

    recipe: str
    variant: str
    seed: int
    row: dict[str, Any]
    values: dict[str, Tensor]


def find_runs(folders: Sequence[str | Path]) -> list[tuple[Path, InversionConfig]]:
    """Finished runs with their settings, Final's first; ValueError for an unfinished one."""
    found = []
    for folder in map(Path, folders):
        settings = read_run_file(folder / "run.yaml", InversionConfig)
        if not (folder / "inversion.safetensors").is_file():
            raise ValueError(f"{folder} has no inversion.safetensors: train it to the end first")
        found.append((folder, settings))
    steps = {settings.steps for _, settings in found}
    if len(steps) > 1:
        raise ValueError(f"runs of {sorted(steps)} steps: only runs of one length can be compared")
    return sorted(found, key=lambda pair: (recipe_of(pair[1]) != "final", pair[0].name))


def recipe_of(settings: InversionConfig) -> str:
    """ "final" of "ablation-final-0": what the runs of one recipe and several seeds have in common."""
    return settings.name.removesuffix(f"-{settings.seed}").removeprefix("ablation-")


def run(
    folders: Sequence[str | Path],
    pack: str | Path,
    *,
    directions: str | Path | None = None,
    judge: str | Path | None = None,
    strength: float = 1.5,
    count: int | None = None,
    batch: int = 32,
    judges: Judges | None = None,
    device: Any = None,
    progress: bool = False,
) -> tuple[Table, Table]:
    """The table of recipes (means over seeds, paired differences to the first) and that of single runs.

    folders: of finished runs; run.yaml says which recipe, variant and seed. directions, judge: give both
    for the editing columns. Intervals are of the mean over pictures, of values that are means over the seeds:
    how much seeds differ is in the table of runs.
    """
    runs = find_runs(folders)
    if not runs:
        raise ValueError("no runs to compare: name their folders, such as runs/ablation-*")
    inverters = [(settings, load_inverter(folder, device=device)) for folder, settings in runs]
    resolution = inverters[0][1].resolution
    judges = (Judges.found() if judges is None else judges).to(inverters[0][1].device)
    faces, rows = load_faces(pack, resolution)
    faces, rows = faces[:count], rows[:count]
    edits = None
    if directions is not None and judge is not None:
        network = small.load(judge)
        statuses = ("noble", "warrior")
        edits = (network, standard_edits(list(Directions.load(directions).values()), statuses), strength)
    real = judges.pooled(faces)
    measured: list[Run] = []
    for settings, inverter in inverters:
        recipe = recipe_of(settings)
        method = Method(f"{recipe}, seed {settings.seed}", inverter)
        found = invert_all(method, faces, batch, progress=progress)
        values = pair_values(faces, found.rendered, judges)
        cost = method.cost()
        row = {**summary(values), **judges.set_distances(real, judges.pooled(found.rendered))}
        row |= {"parameters": cost.parameters / 1e6, "gmacs": cost.paper_macs / 1e9}
        row["milliseconds"] = 1000 * found.seconds / len(faces)
        if edits is not None:
            row |= _edited(method, found, faces, rows, judges, edits)
        measured.append(Run(recipe, settings.variant or "final", settings.seed, row, values))
    steps = runs[0][1].steps
    title = f"Ablation, {steps} steps each, {len(faces)} test pictures of {Path(pack).stem}, {resolution} px"
    return variants_table(measured, title, judges), runs_table(measured, title, judges)


def variants_table(measured: Sequence[Run], title: str, judges: Judges) -> Table:
    """Means over the seeds; differences to the first variant, picture by picture, with their intervals."""
    columns = {key: heading for key, heading in COLUMNS.items() if judges.measures(key)}
    paired = [key for key in PAIRED if key in measured[0].values]
    recipes = list(dict.fromkeys(one.recipe for one in measured))
    first = recipes[0]
    columns |= {f"{key}_less": f"{columns[key]} less {first}'s" for key in paired if key in columns}
    columns |= _edit_columns(measured)
    table = Table(title, columns)
    per_picture = {
        recipe: {
            key: torch.stack([one.values[key] for one in measured if one.recipe == recipe]).mean(0)
            for key in measured[0].values
        }
        for recipe in recipes
    }
    for recipe in recipes:
        its = [one for one in measured if one.recipe == recipe]
        row: dict[str, Any] = {"recipe": recipe, "seeds": ", ".join(str(one.seed) for one in its)}
        for key, value in its[0].row.items():
            if isinstance(value, float):
                row[key] = sum(one.row[key] for one in its) / len(its)
        row |= summary(per_picture[recipe])
        if recipe != first:
            for key in paired:
                interval = metrics.bootstrap(per_picture[recipe][key] - per_picture[first][key])
                row[f"{key}_less"] = interval.mean
                row[f"{key}_less_interval"] = [interval.low, interval.high]
        table.rows.append(row)
    table.notes = [
        "means over the seeds; in brackets 95 % intervals, bootstrap over the pictures.",
        f"less {first}'s: the mean difference picture by picture; an interval without 0 is an ordering that"
        " holds on other such pictures (not on other seeds: see the table of runs).",
        *_parameter_notes(table.rows, {one.recipe: one.variant for one in measured}),
    ]
    return table


def runs_table(measured: Sequence[Run], title: str, judges: Judges) -> Table:
    """Every run by itself: what a seed changes."""
    columns = {key: heading for key, heading in COLUMNS.items() if judges.measures(key)}
    columns["seeds"] = "seed"
    table = Table(f"{title}: every run", columns | _edit_columns(measured))
    table.rows += [{"recipe": one.recipe, "seeds": one.seed, **one.row} for one in measured]
    return table


def _edit_columns(measured: Sequence[Run]) -> dict[str, str]:
    keys = [key for key in measured[0].row if key.startswith("edit_")]
    return {key: key.removeprefix("edit_").replace("_", " ") for key in keys}


def _edited(
    method: Method, found: Found, faces: Tensor, rows: list[dict[str, str]], judges: Judges, edits: Any
) -> dict[str, Any]:
    """Two columns for each edit: how many are judged as having the attribute, and fd(A, B')."""
    network, wanted, strength = edits
    labels = editing.true_labels(rows, network, wanted)
    done = {method.name: found}
    table = editing.compare(
        faces, labels, [method], wanted, network, judges, strengths=(strength,), found=done
    )
    distance = next((key for key in ("fd_inception", "fd_squeeze", "fd_small") if key in table.columns), None)
    columns = {}
    for row in table.rows:
        if distance is not None:
            columns[f"edit_{distance}(A, B') {row['edit']}"] = row.get(distance)
        columns[f"edit_changed {row['edit']}"] = row["changed"]
    return columns


def _parameter_notes(rows: Sequence[dict[str, Any]], variants: dict[str, str]) -> list[str]:
    """Whether the parameters of each variant are as close to the first one's as the paper's."""
    notes = []
    first = variants[rows[0]["recipe"]]
    for row in rows[1:]:
        recipe = row["recipe"]
        if variants[recipe] == first:
            continue  # the same network, trained otherwise
        apart = row["parameters"] / rows[0]["parameters"] - 1
        if variants[recipe] in MATCHED:
            state = "within" if abs(apart) <= TOLERANCE else "NOT within"
            notes.append(f"{recipe}: parameters {apart:+.1%}, {state} {TOLERANCE:.0%} of Final's.")
        else:
            notes.append(f"{recipe}: parameters {apart:+.1%}, as the variant implies.")
    return notes
