"""How well edits work: who is changed, how real it looks, and what else moved, against strength.

A are originals that have an attribute, B those without it, B' is B edited to have it. The protocol of SFE and
StyleRes, the Frechet distance of A and B', stands beside that of A and B; the judge is a classifier that
labelled no picture for the directions and saw none of their training pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambastyle.evaluation import metrics
from mambastyle.evaluation.inversion import (
    EncoderMethod,
    Judges,
    Method,
    encode_all,
    load_faces,
    load_method,
    render_all,
)
from mambastyle.evaluation.table import Table
from mambastyle.features import small
from mambastyle.features.small import SmallFeatures
from mambastyle.latents.directions import Direction, Directions
from mambastyle.models.mambastyle import Inversion

# The part of a picture that may change: the pixels that the generator itself changes most.
CHANGED = 0.3
COLUMNS = {
    "method": "method",
    "edit": "edit",
    "count": "N",
    "strength": "strength",
    "changed": "judged as having it",
    "fd_squeeze": "fd_squeeze(A, B')",
    "fd_squeeze_originals": "fd_squeeze(A, B)",
    "fd_small": "fd_small(A, B')",
    "fd_small_originals": "fd_small(A, B)",
    "l2_outside": "L2 outside the changed region",
}


@dataclass(frozen=True)
class Edit:
    """One edit to measure: along a direction (sign 1) or against it (-1), towards a label of the judge."""

    name: str
    direction: Direction
    head: str
    label: str
    sign: float = 1.0


def standard_edits(directions: Sequence[Direction], statuses: Sequence[str]) -> list[Edit]:
    """Gender both ways, and some statuses, for directions named like those of `latents.discover`."""
    by_name = {direction.name: direction for direction in directions}
    for name in ("gender", *statuses):
        if name not in by_name:
            raise ValueError(f"no direction named {name!r} among {list(by_name)}: discover boundaries first")
    return [
        Edit("to female", by_name["gender"], "gender", "female"),
        Edit("to male", by_name["gender"], "gender", "male", -1.0),
        *(Edit(f"to {status}", by_name[status], "status", status) for status in statuses),
    ]


@torch.no_grad()
def changed_region(
    before: Float[Tensor, "batch 3 height width"],
    after: Float[Tensor, "batch 3 height width"],
    part: float = CHANGED,
) -> Bool[Tensor, "batch 1 height width"]:
    """Per picture the `part` of the pixels that changed most: |after - before|, mean over channels, blurred.

    The blur is Gaussian with a deviation of a 32nd of the height; a picture without any change has no region.
    """
    change = (after - before).abs().mean(1, keepdim=True)
    deviation = max(before.shape[-2] / 32, 0.5)
    radius = max(1, round(2 * deviation))
    offsets = torch.arange(-radius, radius + 1, device=change.device, dtype=change.dtype)
    kernel = torch.exp(-offsets.square() / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    change = F.pad(change, [radius] * 4, mode="replicate")
    change = F.conv2d(F.conv2d(change, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    threshold = change.flatten(1).quantile(1 - part, dim=1).view(-1, 1, 1, 1)
    return (change >= threshold) & (change > 0)


def l2_outside(
    image: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    region: Bool[Tensor, "batch 1 height width"],
) -> Float[Tensor, " batch"]:
    """Mean squared difference on [-1, 1] over the pixels outside a region."""
    outside = (~region).float()
    difference = (image - other).square().mean(1, keepdim=True) * outside
    return difference.sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp(min=1)


@torch.no_grad()
def share_judged(
    judge: SmallFeatures, images: Float[Tensor, "count 3 height width"], head: str, label: str
) -> float:
    """Part of the pictures whose likeliest label in `head` is `label`."""
    wanted = _number(judge, head, label)
    parts = [judge.predict(part, head) == wanted for part in images.split(128)]
    return float(torch.cat(parts).double().mean())


@torch.no_grad()
def compare(
    originals: Float[Tensor, "count 3 height width"],
    labels: dict[str, Int[Tensor, " count"]],
    methods: Sequence[Method],
    edits: Sequence[Edit],
    judge: SmallFeatures,
    judges: Judges,
    *,
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
    data: str = "held-out pictures",
    batch: int = 32,
) -> Table:
    """The editing table: a row per method, edit and strength.

    labels: per head of the judge the true label of each original, in the order of `judge.labels(head)`.
    Strength 0 is the inversion alone: what it changes is no merit of the edit. The region of a picture is
    that which its W+ latents, rendered without a feature, change at the largest strength, so it is the same
    for all strengths; L2 is against the original, so at strength 0 it is the inversion's.
    """
    count, _, height, width = originals.shape
    columns = {
        key: heading
        for key, heading in COLUMNS.items()
        if (judges.squeeze is not None or "squeeze" not in key)
        and (judges.small is not None or "small" not in key)
    }
    table = Table(
        f"Editing of {count} {data}, {height} x {width} px",
        columns,
        notes=[
            "A: originals with the attribute; B: originals without it (N of them); B': B edited.",
            "judged as having it: by a classifier that was trained on other pictures than the one behind the"
            " directions.",
            f"changed region: the {CHANGED:.0%} of a picture's pixels that |G(w + d) - G(w)| at the largest"
            " strength, blurred, changes most.",
        ],
    )
    features = judges.pooled(originals)
    recall = {edit.name: _recall(judge, originals, labels, edit) for edit in edits}
    for method in methods:
        encoded, _ = encode_all(method, originals, batch)
        every = _concatenate(encoded)
        for edit in edits:
            has = labels[edit.head] == _number(judge, edit.head, edit.label)
            if not has.any() or has.all():
                raise ValueError(f"{edit.name}: expected originals with and without {edit.label}")
            without = _select(every, ~has, batch)
            b = originals[~has]
            largest = edit.direction.offset(edit.sign * max(strengths, key=abs))
            region = _region(method, without, largest)
            real = {
                f"fd_{name}_originals": metrics.frechet_distance(values[has], values[~has])
                for name, values in features.items()
                if has.sum() > 1 and len(b) > 1
            }
            for strength in strengths:
                offset = edit.direction.offset(edit.sign * strength)
                edited = render_all(method, without, offset)
                row = {
                    "method": method.name,
                    "edit": edit.name,
                    "count": len(b),
                    "strength": float(strength),
                    "changed": share_judged(judge, edited, edit.head, edit.label),
                    "judge_recall_on_originals": recall[edit.name],
                    "l2_outside": float(l2_outside(edited, b, region).mean()),
                    **real,
                }
                if has.sum() > 1 and len(b) > 1:
                    for name, values in judges.pooled(edited).items():
                        row[f"fd_{name}"] = metrics.frechet_distance(features[name][has], values)
                        row[f"kd_{name}"] = metrics.kernel_distance(features[name][has], values)[0]
                table.rows.append(row)
    return table


def run(
    models: Mapping[str, str | Path],
    pack: str | Path,
    directions: str | Path,
    judge: str | Path,
    *,
    statuses: Sequence[str] = ("noble", "warrior"),
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
    w_plus_only: Iterable[str] = (),
    count: int | None = None,
    judges: Judges | None = None,
    device: Any = None,
) -> Table:
    """The editing table for models on disk, on the test split of a pack with the columns gender and status.

    models: name -> preset or folder. directions, judge: their files; the judge must not be the classifier
    that labelled the pictures behind the directions. w_plus_only: names whose feature is not rendered.
    """
    methods: list[Method] = [
        load_method(name, model, use_feature=name not in set(w_plus_only), device=device)
        for name, model in models.items()
    ]
    network = small.load(judge)
    edits = standard_edits(list(Directions.load(directions).values()), statuses)
    resolution = network.config.resolution
    for method in methods:
        if isinstance(method, EncoderMethod):
            resolution, device = method.generator.config.resolution, method.generator.mapping.w_avg.device
    faces, rows = load_faces(pack, resolution)
    faces, rows = faces[:count].to(device), rows[:count]
    labels = {
        head: torch.tensor([network.labels(head).index(row[head]) for row in rows])
        for head in {edit.head for edit in edits}
    }
    judges = (Judges.found() if judges is None else judges).to(faces.device)
    data = f"test pictures of {Path(pack).stem}"
    return compare(
        faces, labels, methods, edits, network.to(faces.device), judges, strengths=strengths, data=data
    )


def _number(judge: SmallFeatures, head: str, label: str) -> int:
    known = judge.labels(head)
    if label not in known:
        raise ValueError(f"the judge's head {head!r} has no label {label!r}: it has {', '.join(known)}")
    return known.index(label)


def _recall(judge: SmallFeatures, originals: Tensor, labels: dict[str, Tensor], edit: Edit) -> float:
    has = labels[edit.head] == _number(judge, edit.head, edit.label)
    return share_judged(judge, originals[has], edit.head, edit.label) if has.any() else float("nan")


def _region(method: Method, encoded: Sequence[Inversion], offset: Tensor) -> Tensor:
    """What W+ alone changes, picture by picture: no feature can hide or add to it."""
    latents = [Inversion(inversion.ws, None) for inversion in encoded]
    zero = torch.zeros_like(offset)
    parts = [changed_region(method.render(part, zero), method.render(part, offset)) for part in latents]
    return torch.cat(parts)


def _concatenate(encoded: Sequence[Inversion]) -> Inversion:
    features = [inversion.feature for inversion in encoded if inversion.feature is not None]
    return Inversion(
        torch.cat([inversion.ws for inversion in encoded]), torch.cat(features) if features else None
    )


def _select(inversion: Inversion, keep: Tensor, batch: int) -> list[Inversion]:
    """The kept pictures of one large inversion, in batches."""
    indices = keep.nonzero()[:, 0].split(batch)
    feature = inversion.feature
    return [Inversion(inversion.ws[i], None if feature is None else feature[i]) for i in indices]
