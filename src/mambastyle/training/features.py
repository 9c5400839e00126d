"""Trains the small network that judges (features/small.py) on labelled packs, with SqueezeNet as its teacher.

Labels: gender and status of KaoKore, the classes of classify80, the styles and textures of the style pack.
Teacher: the pooled features and two maps of SqueezeNet (Hinton et al. 2015, arXiv:1503.02531; Romero et al.
2014, arXiv:1412.6550), so that the network also sees what no label says. All labels are unbalanced: pictures
are drawn by the size of their class to the power of -1/2, and the rest is a logit adjustment (Menon et al.
2020, arXiv:2007.07314), so that the logits assume equally likely labels.
"""

import dataclasses
import json
import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from mambastyle.compute import channels_last
from mambastyle.data.packs import Pack, from_bytes, open_pack
from mambastyle.features import small
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig, pool
from mambastyle.features.squeezenet import CHANNELS, SqueezeNetFeatures
from mambastyle.training.config import RunConfig, Section
from mambastyle.training.loop import Player, Terms, train
from mambastyle.training.random import StepRandom
from mambastyle.training.schedules import cosine

logger = logging.getLogger(__name__)

NO_LABEL = -1
GENDERS = ("male", "female")
STATUSES = ("noble", "warrior", "incarnation", "commoner")
# Student map -> teacher map of about the same stride.
_TEACHER_MAPS = {"stage2": "fire4", "stage3": "fire7"}
# One in so many pictures of the packs without a split of their own is held out.
_HELD_OUT = 5


class ModelSection(Section):
    """Sizes of the network; the heads come from the packs."""

    resolution: int = 64
    widths: tuple[int, ...] = (32, 96, 192, 224)
    blocks: tuple[int, ...] = (1, 2, 2, 1)


class PacksSection(Section):
    """Where the pictures are, and which half of KaoKore's training split is used.

    Two networks trained on the two halves can label generated pictures and judge the edits independently.
    """

    kaokore: str
    classify80: str
    style: str
    kaokore_half: Literal["first", "second", "both"] = "both"


class FeaturesConfig(RunConfig):
    """A run of the small network. `shares`: parts of a batch by pack; `weights`: of terms, 1 unless given."""

    model: ModelSection = ModelSection()
    packs: PacksSection
    squeezenet: str | None = None
    shares: dict[str, float] = Field(default={"kaokore": 0.5, "classify80": 0.3, "style": 0.2})
    weights: dict[str, float] = Field(default={})
    learning_rate: float = 2e-3
    warm_up: int = 100
    weight_decay: float = 0.05
    label_smoothing: float = 0.1


@dataclass
class LabelledPictures:
    """Pictures in memory with the labels that are known of each.

    images: bytes, 0..255; labels: per head the index of the label, or -1; sources, names: per picture its
    pack and its file.
    """

    images: UInt8[Tensor, "count 3 height width"]
    labels: dict[str, Int[Tensor, " count"]]
    sources: list[str]
    names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def select(self, keep: list[bool]) -> "LabelledPictures":
        """The pictures where `keep` is true."""
        mask = torch.tensor(keep)
        return LabelledPictures(
            self.images[mask],
            {name: values[mask] for name, values in self.labels.items()},
            [source for source, kept in zip(self.sources, keep, strict=True) if kept],
            [name for name, kept in zip(self.names, keep, strict=True) if kept],
        )


def concatenate(parts: list[LabelledPictures]) -> LabelledPictures:
    """All pictures of several sets; heads that a set does not know are filled with -1."""
    heads = list(dict.fromkeys(head for part in parts for head in part.labels))
    labels = {
        head: torch.cat(
            [part.labels.get(head, torch.full((len(part),), NO_LABEL, dtype=torch.long)) for part in parts]
        )
        for head in heads
    }
    return LabelledPictures(
        torch.cat([part.images for part in parts]),
        labels,
        [source for part in parts for source in part.sources],
        [name for part in parts for name in part.names],
    )


def bucket(name: str, count: int) -> int:
    """A number in 0..count-1 that depends on a file's name alone: splits that survive a reordering."""
    return zlib.crc32(name.encode()) % count


class Teaching(nn.Module):
    """Linear maps from the student's features to the teacher's; thrown away after the training."""

    def __init__(self, config: SmallFeaturesConfig) -> None:
        super().__init__()
        self.pooled = nn.Linear(config.widths[-1], SqueezeNetFeatures.num_features)
        self.maps = nn.ModuleDict(
            {
                student: nn.Conv2d(config.widths[int(student[-1]) - 1], CHANNELS[teacher], 1)
                for student, teacher in _TEACHER_MAPS.items()
            }
        )

    def forward(
        self, maps: dict[str, Float[Tensor, "batch _ _ _"]], teacher: dict[str, Float[Tensor, "batch _ _ _"]]
    ) -> dict[str, Float[Tensor, ""]]:
        """Terms `teacher_pooled` and `teacher_maps`: mean of 1 - cosine, over pictures or over positions."""
        wanted = teacher["fire9"].float().mean((2, 3))
        terms = {"teacher_pooled": _one_minus_cosine(self.pooled(pool(maps)), wanted)}
        distances = []
        for student, name in _TEACHER_MAPS.items():
            # A part of the batch is enough for the maps: neighbouring positions say the same.
            theirs = teacher[name][: len(wanted) // 4].float()
            ours = self.maps[student](maps[student][: len(theirs)]).float()
            ours = F.interpolate(ours, theirs.shape[-2:], mode="bilinear")
            distances.append(_one_minus_cosine(ours, theirs))
        terms["teacher_maps"] = torch.stack(distances).mean()
        return terms


class FeaturesTask:
    """One player: the network, with the teaching maps beside it, on pictures held in memory."""

    def __init__(
        self,
        config: FeaturesConfig,
        training: LabelledPictures,
        validation: LabelledPictures,
        heads: tuple[Head, ...],
        device: torch.device,
    ) -> None:
        self.config, self.pictures, self.validation = config, training, validation
        self.network = SmallFeatures(SmallFeaturesConfig(**config.model.model_dump(), heads=heads))
        self.teaching = Teaching(self.network.config)
        self.teacher = SqueezeNetFeatures(config.squeezenet)
        self.modules: dict[str, nn.Module] = {"network": self.network, "teaching": self.teaching}
        for module in (self.teacher, *self.modules.values()):
            channels_last(module, device)
        self.averaged: dict[str, nn.Module] = {"network": self.network}
        self.draw_weights = draw_weights(training, config.shares)
        self.log_priors = {
            head.name: log_prior(training.labels[head.name], self.draw_weights, len(head.labels)).to(device)
            for head in heads
        }
        terms = [head.name for head in heads] + ["teacher_pooled", "teacher_maps"]
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_cosine(config))
        weights = {name: 1.0 for name in terms} | config.weights
        self.players = [Player("features", parameters, optimizer, self.terms, weights, scheduler)]

    def terms(self, random: StepRandom) -> Terms:
        """Named, unweighted terms: one per head and two of the teacher."""
        # On the CPU, where the pictures and their weights are.
        draws = dataclasses.replace(random, device=torch.device("cpu")).stream("pictures")
        chosen = torch.multinomial(self.draw_weights, random.local_batch, replacement=True, generator=draws)
        images = from_bytes(self.pictures.images[chosen].to(random.device))
        images = distort(images, random.stream("distort")).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            teacher = self.teacher(images, {*_TEACHER_MAPS.values(), "fire9"})
        maps = self.network(images)
        terms = {}
        for head, logits in self.network.answer(pool(maps)).items():
            labels = self.pictures.labels[head][chosen].to(random.device)
            terms[head] = labelled_loss(logits, labels, self.log_priors[head], self.config.label_smoothing)
        return terms | self.teaching(maps, teacher)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing beside the modules: pictures are drawn anew for each step."""

    def samples(self, averages: Mapping[str, nn.Module]) -> None:
        """A classifier makes no pictures."""

    def export(self, averages: Mapping[str, nn.Module], folder: Path, card: dict[str, Any]) -> None:
        """features.safetensors, with its accuracies on the validation pictures in the card."""
        network = averages["network"]
        if not isinstance(network, SmallFeatures):
            raise AssertionError("the average of a SmallFeatures is one")
        measured = accuracies(network, self.validation)
        with open(folder / "validation.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": card["step"], **measured}) + "\n")
        logger.info("validation after step %s: %s", card["step"], measured)
        half = self.config.packs.kaokore_half
        small.save(
            folder / "features.safetensors", network, card | {"kaokore_half": half, "validation": measured}
        )


def labelled_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    log_prior: Float[Tensor, " classes"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of logits + log prior over the pictures that have a label; 0 if none has.

    With the prior inside the loss, the logits alone assume equally likely labels (logit adjustment, eq. 10).
    """
    known = labels != NO_LABEL
    total = F.cross_entropy(
        logits.float() + log_prior,
        labels,
        ignore_index=NO_LABEL,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / known.sum().clamp(min=1)


def _warm_up_and_cosine(config: FeaturesConfig) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / config.warm_up) * cosine(step, config.steps)

    return factor


def draw_weights(pictures: LabelledPictures, shares: dict[str, float]) -> Float[Tensor, " count"]:
    """Probability of each picture: its source's share, by -1/2 powers of how many are labelled alike."""
    keys = [
        (source, *(int(values[i]) for values in pictures.labels.values()))
        for i, source in enumerate(pictures.sources)
    ]
    counts: dict[tuple, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    if unknown := sorted(set(pictures.sources) - set(shares)):
        raise ValueError(f"no share of the batch given for {unknown[0]!r}: shares are {shares}")
    weights = torch.tensor([1 / math.sqrt(counts[key]) for key in keys], dtype=torch.float64)
    for source in set(pictures.sources):
        of_source = torch.tensor([name == source for name in pictures.sources])
        weights[of_source] *= shares[source] / weights[of_source].sum()
    return (weights / weights.sum()).float()


def log_prior(
    labels: Int[Tensor, " count"], weights: Float[Tensor, " count"], classes: int
) -> Float[Tensor, " classes"]:
    """Logarithm of how often each label is drawn, among the pictures that have one."""
    known = labels != NO_LABEL
    mass = torch.zeros(classes).index_add_(0, labels[known], weights[known])
    if (mass == 0).any():
        raise ValueError(f"no training picture has label {int(mass.argmin())}: every label needs one")
    return (mass / mass.sum()).log()


def distort(
    x: Float[Tensor, "batch 3 height width"], generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Pictures in [-1, 1], mirrored, zoomed, shifted, turned, recoloured and partly covered at random.

    A quarter keeps its pixel grid (only mirrored), since resampling blurs and the network must know sharp
    pictures too.
    """
    batch, _, height, width = x.shape
    device = x.device

    def uniform(low: float, high: float) -> Float[Tensor, "batch 1 1 1"]:
        return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator, device=device)

    # Geometry: one affine map per picture; coordinates run from -1 to 1.
    moved = (uniform(0.0, 1.0) > 0.25).float().view(batch)
    angle = uniform(-0.2, 0.2).view(batch) * moved
    zoom = 1 + (uniform(0.75, 1.1).view(batch) - 1) * moved
    mirror = torch.where(uniform(0.0, 1.0).view(batch) < 0.5, -1.0, 1.0)
    shift_x, shift_y = (uniform(-0.12, 0.12).view(batch) * moved for _ in range(2))
    theta = torch.stack(
        [
            torch.stack([mirror * zoom * angle.cos(), -zoom * angle.sin(), shift_x], 1),
            torch.stack([mirror * zoom * angle.sin(), zoom * angle.cos(), shift_y], 1),
        ],
        1,
    )  # (batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 3, height, width], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # Colour: contrast, saturation, brightness, and a tint per channel.
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * uniform(0.7, 1.3) + mean + uniform(-0.2, 0.2)
    grey = x.mean(1, keepdim=True)
    tint = torch.randn(batch, 3, 1, 1, generator=generator, device=device)
    x = (x - grey) * uniform(0.4, 1.4) + grey + 0.06 * tint
    # A grey rectangle over half of the pictures (Zhong et al. 2017, arXiv:1708.04896).
    rows = torch.arange(height, device=device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, 1, -1)
    size = uniform(0.1, 0.35) * (uniform(0.0, 1.0) < 0.5)
    top, left = uniform(0.0, 0.8), uniform(0.0, 0.8)
    covered = (rows >= top * height) & (rows < (top + size) * height)
    covered = covered & (columns >= left * width) & (columns < (left + size) * width)
    return x.masked_fill(covered, 0.0).clamp(-1, 1)


@torch.no_grad()
def accuracies(
    network: SmallFeatures, pictures: LabelledPictures, batch: int = 256
) -> dict[str, dict[str, float]]:
    """Per head: `accuracy`, `balanced_accuracy` (mean over labels of the recall) and `count`, undistorted."""
    logits: dict[str, list[Tensor]] = {head.name: [] for head in network.config.heads}
    device = next(network.parameters()).device
    for pixels in pictures.images.split(batch):
        images = from_bytes(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        for head, values in network.classify(images).items():
            logits[head].append(values.cpu())
    result = {}
    for head, values in logits.items():
        labels = pictures.labels.get(head, torch.full((len(pictures),), NO_LABEL))
        known = labels != NO_LABEL
        if not known.any():
            continue
        right = (torch.cat(values).argmax(1) == labels)[known].double()
        present = labels[known].unique()
        recalls = torch.stack([right[labels[known] == label].mean() for label in present])
        result[head] = {
            "accuracy": right.mean().item(),
            "balanced_accuracy": recalls.mean().item(),
            "count": int(known.sum()),
        }
    return result


def _one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    # Standardised per channel: the rectified maps share a large mean, which alone gives a cosine near one.
    b = F.batch_norm(b, None, None, training=True)
    return 1 - F.cosine_similarity(a.float(), b, dim=1, eps=1e-6).mean()


@dataclass(frozen=True)
class Splits:
    """The pictures of all packs: for training, for choosing (KaoKore's val split), for reporting."""

    training: LabelledPictures
    validation: LabelledPictures
    test: LabelledPictures
    heads: tuple[Head, ...]


def load_splits(packs: PacksSection, resolution: int) -> Splits:
    """Read the packs into memory.

    KaoKore comes with its splits; of its training split the asked half is kept (`half_of`). Of the two other
    packs every fifth picture, chosen by its name, is held out for the report.
    """
    kaokore = open_pack(packs.kaokore)
    classify80 = open_pack(packs.classify80)
    style = open_pack(packs.style)
    heads = (
        Head("gender", GENDERS),
        Head("status", STATUSES),
        Head("class", _found(classify80, "")),
        Head("style", _found(style, "wikiart:")),
        Head("texture", _found(style, "texture:")),
    )
    by_name = {head.name: head.labels for head in heads}
    training, validation, test = [], [], []
    pictures = load_labelled(
        kaokore, "kaokore", resolution, {n: (n, by_name[n]) for n in ("gender", "status")}
    )
    splits = [row["split"] for row in kaokore.rows]
    halves = [half_of(name) for name in pictures.names]
    wanted = ("first", "second") if packs.kaokore_half == "both" else (packs.kaokore_half,)
    training.append(
        pictures.select([s == "train" and h in wanted for s, h in zip(splits, halves, strict=True)])
    )
    validation.append(pictures.select([split == "val" for split in splits]))
    test.append(pictures.select([split == "test" for split in splits]))
    for pack, source, columns in (
        (classify80, "classify80", {"class": ("label", by_name["class"])}),
        (
            style,
            "style",
            {
                "style": ("label", tuple(f"wikiart:{label}" for label in by_name["style"])),
                "texture": ("label", tuple(f"texture:{label}" for label in by_name["texture"])),
            },
        ),
    ):
        pictures = load_labelled(pack, source, resolution, columns)
        held_out = [bucket(name, _HELD_OUT) == 0 for name in pictures.names]
        training.append(pictures.select([not held for held in held_out]))
        test.append(pictures.select(held_out))
    return Splits(concatenate(training), concatenate(validation), concatenate(test), heads)


def half_of(name: str) -> Literal["first", "second"]:
    """The half of KaoKore's training split that a file belongs to, by its name alone."""
    return "first" if bucket(name, 2) == 0 else "second"


def load_labelled(
    pack: Pack, source: str, resolution: int, columns: Mapping[str, tuple[str, Sequence[str]]]
) -> LabelledPictures:
    """The pictures of a pack; `columns`: head -> (column, values in order); others are unknown."""
    labels = {}
    for head, (column, values) in columns.items():
        numbers = {value: number for number, value in enumerate(values)}
        labels[head] = torch.tensor([numbers.get(row[column], NO_LABEL) for row in pack.rows])
    names = [row["file"] for row in pack.rows]
    return LabelledPictures(pack.load(resolution), labels, [source] * len(names), names)


def _found(pack: Pack, prefix: str) -> tuple[str, ...]:
    found = {row["label"] for row in pack.rows if row["label"].startswith(prefix)}
    return tuple(sorted(label.removeprefix(prefix) for label in found))


def run(config: FeaturesConfig) -> Path:
    """Train (or go on training) the small network of this run file; returns the run's folder."""
    splits = load_splits(config.packs, config.model.resolution)
    return train(
        config,
        lambda device: FeaturesTask(config, splits.training, splits.validation, splits.heads, device),
    )


def report(weights: str | Path, packs: PacksSection) -> dict[str, dict[str, float]]:
    """Accuracies of a saved network on the pictures that no training saw: the numbers of its card."""
    network = small.load(weights)
    return accuracies(network, load_splits(packs, network.config.resolution).test)
