"""How well edits work: who is changed, how real it looks, and what else moved, against strength.

A are originals that have an attribute, B those without it, B' is B edited to have it. The protocol of SFE and
StyleRes, the Frechet distance of A and B', stands beside the one that the paper's text names, of B and B',
and beside that of A and B; the judge is a classifier that labelled no picture for the directions and saw none
of their training pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambastyle import images
from mambastyle.api import Inverted
from mambastyle.api.methods import MethodName
from mambastyle.evaluation.inversion import Found, Method, invert_all, load_faces, load_methods, summary
from mambastyle.evaluation.judges import HEADINGS, Judges
from mambastyle.evaluation.table import Table
from mambastyle.features import small
from mambastyle.features.small import SmallFeatures
from mambastyle.latents.directions import Direction, Directions

# The part of a picture that may change: the pixels that the generator itself changes most.
CHANGED = 0.3
COLUMNS = {
    "method": "method",
    "edit": "edit",
    "count": "N",
    "strength": "strength",
    "changed": "judged as having it",
    "judge_recall_on_originals": "of A judged so",
    **{
        f"{distance}_{network}{pair}": f"{HEADINGS[f'{distance}_{network}']}({sets})"
        for network in ("inception", "squeeze", "small")
        for distance, pair, sets in (
            ("fd", "", "A, B'"),
            ("kd", "", "A, B'"),
            ("fd", "_kept", "B, B'"),
            ("fd", "_originals", "A, B"),
        )
        if network != "small" or distance == "fd"
    },
    "identity": HEADINGS["identity"],
    "similarity_small": "similarity (small)",
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
    change = images.blur(change, deviation, radius=max(1, round(2 * deviation)))
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
    found: Mapping[str, Found] | None = None,
    progress: bool = False,
) -> Table:
    """The editing table: a row per method, edit and strength.

    found: what `invert_all` gave already, by a method's name.
    labels: per head of the judge the true label of each original, in the order of `judge.labels(head)`.
    Strength 0 is the inversion alone: what it changes is no merit of the edit. The region of a picture is
    that which its W+ latents, rendered without a feature, change at the largest strength, so it is the same
    for all strengths; L2 is against the original, so at strength 0 it is the inversion's.
    """
    count, _, height, width = originals.shape
    table = Table(
        f"Editing of {count} {data}, {height} x {width} px",
        {key: heading for key, heading in COLUMNS.items() if judges.measures(key)},
        notes=[
            "A: originals with the attribute; B: originals without it (N of them); B': B edited. The protocol"
            " of the field is the distance of A and B'; the paper's text says B and B'.",
            "judged as having it: by a classifier that was trained on other pictures than the one behind the"
            " directions; of A judged so: what it says of real pictures with the attribute, so that an edit"
            " which reaches that is as convincing as they are.",
            "identity, similarity: cosine between an original and its edit in ArcFace or our small network.",
            f"changed region: the {CHANGED:.0%} of a picture's pixels that |G(w + d) - G(w)| at the largest"
            " strength, blurred, changes most.",
            "strength 0 is the inversion alone.",
        ],
    )
    features = judges.pooled(originals)
    recall = {edit.name: _recall(judge, originals, labels, edit) for edit in edits}
    unedited: dict[tuple[str, int], dict[str, float]] = {}  # A and B are the same for every method
    for method in methods:
        part = originals[: method.count]
        sets = {name: values[: method.count] for name, values in features.items()}
        done = (found or {}).get(method.name)
        encoded = (done or invert_all(method, part, batch, progress=progress)).inverted
        for edit in edits:
            has = (labels[edit.head] == _number(judge, edit.head, edit.label))[: method.count]
            if not has.any() or has.all():
                raise ValueError(f"{edit.name}: expected originals with and without {edit.label}")
            without = _select(encoded, ~has)
            b = part[~has]
            of_a = {name: values[has] for name, values in sets.items()}
            of_b = {name: values[~has] for name, values in sets.items()}
            comparable = min(len(b), int(has.sum())) > 1
            if comparable and (edit.name, len(part)) not in unedited:
                unedited[edit.name, len(part)] = judges.set_distances(of_a, of_b, "_originals")
            region = _region(method, without, edit.direction.offset(edit.sign * max(strengths, key=abs)))
            sheets: dict[float, Tensor] = {}
            for strength in strengths:
                edited = _render(method, without, edit.direction.offset(edit.sign * strength))
                sheets[strength] = edited
                outside = l2_outside(edited, b, region)
                pairs = {"l2_outside": outside}
                if judges.identity is not None:
                    pairs["identity"] = judges.same_face(b, edited)
                if judges.small is not None:
                    pairs["similarity_small"] = judges.similarity(b, edited)
                row = {
                    "method": method.name,
                    "edit": edit.name,
                    "count": len(b),
                    "strength": float(strength),
                    "changed": share_judged(judge, edited, edit.head, edit.label),
                    "judge_recall_on_originals": recall[edit.name],
                    **summary(pairs),
                    **unedited.get((edit.name, len(part)), {}),
                }
                if comparable:
                    after = judges.pooled(edited)
                    row |= judges.set_distances(of_a, after) | judges.set_distances(of_b, after, "_kept")
                table.rows.append(row)
            if method is methods[0]:
                table.figures[edit.name.replace(" ", "-")] = _strip(b, sheets, region)
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
    others: Iterable[tuple[MethodName, int | None]] = (),
    others_count: int | None = None,
    keep_in: str | Path | None = None,
    seed: int = 0,
    count: int | None = None,
    judges: Judges | None = None,
    device: Any = None,
    progress: bool = False,
) -> Table:
    """The editing table for models on disk, on the test split of a pack with the columns gender and status.

    models to keep_in: as of `inversion.load_methods`. directions, judge: their files; the judge must not be
    the classifier that labelled the pictures behind the directions.
    """
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
    edits = standard_edits(list(Directions.load(directions).values()), statuses)
    faces, rows = load_faces(pack, methods[0].inverter.resolution)
    faces, rows = faces[:count], rows[:count]
    labels = true_labels(rows, network, edits)
    judges = (Judges.found() if judges is None else judges).to(methods[0].inverter.device)
    data = f"test pictures of {Path(pack).stem}"
    return compare(
        faces,
        labels,
        methods,
        edits,
        network,
        judges,
        strengths=strengths,
        data=data,
        progress=progress,
    )


def true_labels(
    rows: Sequence[Mapping[str, str]], judge: SmallFeatures, edits: Sequence[Edit]
) -> dict[str, Int[Tensor, " count"]]:
    """What the pack's rows say of each picture, in the judge's numbers, for the heads that edits ask for."""
    return {
        head: torch.tensor([judge.labels(head).index(row[head]) for row in rows])
        for head in {edit.head for edit in edits}
    }


def _number(judge: SmallFeatures, head: str, label: str) -> int:
    known = judge.labels(head)
    if label not in known:
        raise ValueError(f"the judge's head {head!r} has no label {label!r}: it has {', '.join(known)}")
    return known.index(label)


def _recall(judge: SmallFeatures, originals: Tensor, labels: dict[str, Tensor], edit: Edit) -> float:
    has = labels[edit.head] == _number(judge, edit.head, edit.label)
    return share_judged(judge, originals[has], edit.head, edit.label) if has.any() else float("nan")


def _render(method: Method, inverted: Sequence[Inverted], offset: Tensor) -> Tensor:
    return torch.cat([method.render(part, offset) for part in inverted])


def _region(method: Method, inverted: Sequence[Inverted], offset: Tensor) -> Tensor:
    """What W+ alone changes, picture by picture: no feature can hide or add to it."""
    latents = [replace(part, feature=None) for part in inverted]
    return torch.cat([changed_region(method.render(part), method.render(part, offset)) for part in latents])


def _select(inverted: Sequence[Inverted], keep: Tensor) -> list[Inverted]:
    """The kept pictures, batch by batch; batches of which none is kept are left out."""
    flags = keep.split([len(part) for part in inverted])
    return [part.select(flag) for part, flag in zip(inverted, flags, strict=True) if flag.any()]


def _strip(originals: Tensor, sheets: Mapping[float, Tensor], region: Tensor) -> Tensor:
    """The pictures with least, median and most change outside their region at strength 1, by strength."""
    strengths = sorted(sheets)
    at = min(strengths, key=lambda strength: abs(strength - 1))
    order = l2_outside(sheets[at], originals, region).argsort().tolist()
    chosen = {"least": order[0], "median": order[len(order) // 2], "most": order[-1]}
    tiles = [p[index] for index in chosen.values() for p in (originals, *(sheets[s] for s in strengths))]
    labels = ["original", *(f"{strength:g}" for strength in strengths)]
    scale = max(1, 128 // originals.shape[-1])
    return images.grid(tiles, len(labels), column_labels=labels, row_labels=list(chosen), scale=scale)
