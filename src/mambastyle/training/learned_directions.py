"""Learns directions of W+ from labelled pictures, through the model that inverts them.

A boundary (latents.discover) separates w of generated pictures; nothing in it asks what its edits make of
real ones. Here d is what turns real pictures without an attribute, inverted and edited, into pictures like
those that have it: for a classifier, and in the mean and spread of features over a batch, which keeps edits
among the pictures there are. Ours, from no paper; that d itself is optimised is StyleCLIP's (Patashnik et al.
2021, section 4).
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from tqdm import tqdm

from mambastyle import images
from mambastyle.data.packs import from_bytes, open_pack
from mambastyle.features import squeezenet
from mambastyle.features.small import SmallFeatures
from mambastyle.latents.directions import Direction
from mambastyle.latents.discover import log_odds
from mambastyle.models.mambastyle import MambaStyle
from mambastyle.models.stylegan2 import Generator
from mambastyle.training.directions import FACE_HEADS
from mambastyle.training.features import half_of

# A picture as places of one mean colour: what a set of edited pictures may not drift from.
PLACES = 8
# The layers of the last resolution draw strokes and tints: left free, they painted faces blue.
FINE_LAYERS = 3
SMALLEST_SET = 10


Space: TypeAlias = Callable[[Tensor], Tensor]
"""Pictures (batch 3 height width) to the features (batch features) in which sets of them are compared."""


@dataclass(frozen=True)
class Settings:
    """How a direction is learned.

    steps, batch: pictures seen are their product. learning_rate: Adam's, in standard deviations of the
    inverted w; it falls to zero along a cosine. strengths: every step draws one between these. attribute,
    likeness, spread, places, colour: weights of the terms of `learn_direction`.
    """

    steps: int = 150
    batch: int = 32
    learning_rate: float = 0.035
    strengths: tuple[float, float] = (1.0, 2.5)
    attribute: float = 1.5
    likeness: float = 1.0
    spread: float = 0.5
    places: float = 0.5
    colour: float = 200.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2:
            raise ValueError(f"expected 1 step and a batch of 2 or more, got {self.steps} and {self.batch}")
        if not 0 < self.strengths[0] <= self.strengths[1]:
            raise ValueError(f"expected two strengths, 0 < first <= second, got {self.strengths}")


class Moments(NamedTuple):
    """Mean and standard deviation of a set's features, each (features,)."""

    mean: Float[Tensor, " features"]
    deviation: Float[Tensor, " features"]


@dataclass(frozen=True)
class Way:
    """One way along a direction: the pictures to edit, the label to reach, the sets' moments by space."""

    sign: float
    label: int
    sources: UInt8[Tensor, "count 3 side side"]
    before: Mapping[str, Moments]
    after: Mapping[str, Moments]


def learn_direction(
    name: str,
    pictures: UInt8[Tensor, "count 3 side side"],
    has: Bool[Tensor, " count"],
    *,
    model: MambaStyle,
    generator: Generator,
    classifier: SmallFeatures,
    head: str,
    label: str,
    spaces: Mapping[str, Space] | None = None,
    start: Direction | None = None,
    layers: tuple[int, int] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Direction:
    """The direction towards `label` of the classifier's `head`, for pictures of the generator's size.

    has: which of the pictures have the attribute. Where the head has two labels the direction is learned both
    ways, and a negative strength leads to the other one. With x' = the edit of a batch x without the
    attribute, at a strength s drawn for the step, the loss is

        attribute softplus(s - 1 - log odds(x')) + sum over spaces of what |mean(x') - mean(with)|^2 and
        spread |deviation(x') - deviation(with)|^2 are of those of pictures without it + colour |chroma(x') -
        chroma(x)|^2

    so a strength of 1 is asked to leave the classifier in two minds. spaces: features to compare sets in,
    beside the classifier's own and the colours of an 8 x 8 grid; None for these alone. layers: those that may
    move; by default all but the finest three. start: where to begin, best a direction that the fuser was
    trained with (from others F keeps more of the old picture); by default the difference of the mean inverted
    w.

    Raises ValueError where one side has less than ten pictures, or a label is unknown.
    """
    settings = settings or Settings()
    if model.config.frame is not None:
        raise ValueError(f"{name}: packs hold squares, this model's pictures are {model.config.frame}")
    labels = classifier.labels(head)
    if label not in labels:
        raise ValueError(f"the classifier's head {head!r} has no label {label!r}: it has {', '.join(labels)}")
    for part, which in ((has, "with"), (~has, "without")):
        if int(part.sum()) < SMALLEST_SET:
            raise ValueError(
                f"{name}: {int(part.sum())} pictures {which} {label!r}, expected {SMALLEST_SET} or more:"
                " take more pictures"
            )
    device, config = generator.mapping.w_avg.device, generator.config
    first, stop = layers or (0, max(config.num_ws - FINE_LAYERS, 1))
    free = torch.zeros(config.num_ws, 1, device=device)
    free[first:stop] = 1
    features: dict[str, Space] = {"classifier": classifier.pooled, "places": places, **(spaces or {})}
    sets = {value: pictures[has == value] for value in (True, False)}
    moments = {value: _moments(features, part, device) for value, part in sets.items()}
    ways = [Way(1.0, labels.index(label), sets[False], moments[False], moments[True])]
    if len(labels) == 2:
        ways.append(Way(-1.0, 1 - labels.index(label), sets[True], moments[True], moments[False]))

    means, unit = _latents(model, list(sets.values()), device)
    begin = means[0] - means[1] if start is None else start.offset().to(device)
    d = (begin * free).requires_grad_()
    optimizer = torch.optim.Adam([d], settings.learning_rate * unit, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    random = torch.Generator().manual_seed(seed)
    bar = tqdm(range(settings.steps), desc=name, unit="step", disable=not progress)
    reached = 0.5
    for step in bar:
        way = ways[step % len(ways)]
        chosen = torch.randint(len(way.sources), (settings.batch,), generator=random)
        low, high = settings.strengths
        strength = low + (high - low) * float(torch.rand((), generator=random))
        image = from_bytes(way.sources[chosen].to(device))
        edited = _edited(model, generator, image, way.sign * strength * d * free)
        seen = classifier.pooled(edited)
        odds = log_odds(classifier.answer(seen, [head])[head], way.label)
        loss = settings.attribute * F.softplus(strength - 1 - odds).mean()
        for space, pooled in features.items():
            found = seen if space == "classifier" else pooled(edited)
            weight = settings.places if space == "places" else settings.likeness
            loss = loss + weight * _unlikeness(found, way.before[space], way.after[space], settings.spread)
        loss = loss + settings.colour * _tint(edited, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        reached = 0.9 * reached + 0.1 * float((odds > 0).float().mean())
        bar.set_postfix_str(f"{reached:.0%} changed")
    return Direction(
        name,
        (d.detach() * free).float().cpu(),
        layers=None if (first, stop) == (0, config.num_ws) else (first, stop),
        description=(
            f"{' to '.join(labels) if len(ways) == 2 else f'towards {label} ({head})'}; learned from"
            f" {len(sets[True])} pictures with and {len(sets[False])} without it"
        ),
    )


def learn_from_pack(
    pack: str | Path,
    model: MambaStyle,
    generator: Generator,
    classifier: SmallFeatures,
    *,
    heads: Sequence[str] = FACE_HEADS,
    only: Sequence[str] = (),
    done: Container[str] = (),
    starts: Mapping[str, Direction] | None = None,
    split: str = "train",
    half: Literal["first", "second", "both"] = "both",
    layers: tuple[int, int] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[Direction]:
    """Directions for the labels of a pack's pictures, one after the other.

    The pack's columns have the names of the classifier's heads.

    As `latents.discover`: a head with two labels gives one direction with its name, towards the second label;
    one with more gives one for each label (or each of `only`). Names in `done` are left out. Each begins at
    that of `starts` with its name, where there is one. half: of the split, by the names of files, as in
    training.features, so that no picture is one that a judge was trained on. With SqueezeNet at hand
    (MAMBASTYLE_SQUEEZENET) sets are compared in its features too.

    Raises ValueError for a head, label, split or column that is not there.
    """
    opened = open_pack(pack).select(split=split)
    rows = [row for row in opened.rows if half in ("both", half_of(row["file"]))]
    opened = replace(opened, rows=tuple(rows))
    device = generator.mapping.w_avg.device
    spaces = {"squeeze": squeezenet.SqueezeNetFeatures().to(device).pooled} if squeezenet.is_known() else {}
    known = {label for head in heads for label in classifier.labels(head)}
    if unknown := [label for label in only if label not in known]:
        raise ValueError(f"no label {unknown[0]!r}: the heads {', '.join(heads)} have {', '.join(known)}")
    pictures = opened.load(generator.config.resolution)
    for head in heads:
        labels = classifier.labels(head)
        numbers = opened.labels(head, labels)
        wanted = labels[1:] if len(labels) == 2 else [label for label in labels if not only or label in only]
        for label in wanted:
            name = head if len(labels) == 2 else label
            if name in done:
                continue
            yield learn_direction(
                name,
                pictures,
                numbers == labels.index(label),
                model=model,
                generator=generator,
                classifier=classifier,
                head=head,
                label=label,
                spaces=spaces,
                start=(starts or {}).get(name),
                layers=layers,
                settings=settings,
                seed=seed,
                progress=progress,
            )


def places(image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
    """A picture as the mean colours of a grid."""
    return F.adaptive_avg_pool2d(image, PLACES).flatten(1)


def _edited(model: MambaStyle, generator: Generator, image: Tensor, direction: Tensor) -> Tensor:
    """What the model makes of pictures; gradients reach the direction alone."""
    size = model.config.image_size
    with torch.no_grad():
        encoded = model.encoder(images.resize(image, size, size))
    # One direction for all: its branch runs once.
    shared = None
    if model.fuser is not None and encoded.feature is not None:
        height, width = encoded.feature.shape[2:]
        shared = model.fuser.direction_feature(direction[None], (height, width))
    found = model.edit(encoded, direction.expand(len(image), -1, -1), shared)
    # A little beyond the range: a clamped pixel has no gradient.
    return generator.synthesis(found.ws + generator.mapping.w_avg, found.feature).float().clamp(-1.2, 1.2)


def _unlikeness(found: Tensor, before: Moments, after: Moments, spread: float) -> Tensor:
    """How far a batch's moments are from a set's, where those of unedited pictures have 1 and 1."""
    means = (before.mean - after.mean).square().sum()
    deviations = torch.maximum((before.deviation - after.deviation).square().sum(), 0.1 * means)
    away = (found.mean(0) - after.mean).square().sum() / means
    return away + spread * (found.std(0) - after.deviation).square().sum() / deviations


def _tint(edited: Tensor, image: Tensor) -> Tensor:
    """The change of colour, and a tenth of that of brightness, in squares of a 16th of the side."""
    gap = F.adaptive_avg_pool2d(edited, 2 * PLACES) - F.adaptive_avg_pool2d(image, 2 * PLACES)
    chroma = gap - gap.mean(1, keepdim=True)
    return chroma.square().mean() + 0.1 * gap.square().mean()


@torch.no_grad()
def _moments(spaces: Mapping[str, Space], pictures: Tensor, device: torch.device) -> dict[str, Moments]:
    parts: dict[str, list[Tensor]] = {space: [] for space in spaces}
    for part in pictures.split(128):
        image = from_bytes(part.to(device))
        for space, pooled in spaces.items():
            parts[space].append(pooled(image))
    found = {space: torch.cat(values) for space, values in parts.items()}
    return {space: Moments(values.mean(0), values.std(0)) for space, values in found.items()}


@torch.no_grad()
def _latents(
    model: MambaStyle, sets: Sequence[Tensor], device: torch.device, most: int = 512
) -> tuple[list[Float[Tensor, "num_ws w_dim"]], float]:
    """The mean inverted w of each set (of its first pictures), and the deviation of w over all of them."""
    size = model.config.image_size
    found = [
        torch.cat(
            [
                model.encoder(images.resize(from_bytes(part.to(device)), size, size)).ws
                for part in pictures[:most].split(32)
            ]
        )
        for pictures in sets
    ]
    spread = float(torch.cat(found).std(0).square().mean().sqrt())
    return [ws.mean(0) for ws in found], spread
