"""Our own small network: pooled features for `fd_small`, and heads that name what a 64 px picture shows.

A residual network in the manner of He et al. 2015 (arXiv:1512.03385, section 3), narrow and shallow. It is
trained here (training/features.py), so it ships with the package, and nothing has to be downloaded to measure
a generator, to label its pictures for a boundary or to judge an edit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambastyle import checkpoints, images
from mambastyle.nn.pointwise import StridedPointwise

KIND = "small-features"


@dataclass(frozen=True)
class Head:
    """One question that the network answers: its name and the labels, in the order of the logits."""

    name: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"head {self.name!r} needs two or more different labels, got {self.labels}")


@dataclass(frozen=True)
class SmallFeaturesConfig:
    """Sizes of SmallFeatures. Stage i runs at `resolution / 2**(i + 1)` with `blocks[i]` residual blocks.

    resolution: short side that pictures are resized to (antialiased) before the first convolution.
    widths, blocks: channels and residual blocks of each stage; the last width is the number of features.
    heads: the questions; names must differ.
    """

    resolution: int = 64
    widths: tuple[int, ...] = (32, 96, 192, 224)
    blocks: tuple[int, ...] = (1, 2, 2, 1)
    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.blocks) or min(self.blocks) < 1:
            raise ValueError(
                f"expected one count of blocks (>= 1) per width, got {self.blocks} for {self.widths}"
            )
        if self.resolution % 2 ** len(self.widths):
            raise ValueError(f"resolution {self.resolution} is not a multiple of {2 ** len(self.widths)}")
        names = [head.name for head in self.heads]
        if len(set(names)) != len(names):
            raise ValueError(f"names of heads must differ, got {names}")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation beside a shortcut (figure 2; 1x1 where shapes differ)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                StridedPointwise(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )
        # The block begins as its shortcut (Goyal et al. 2017, section 5.1).
        nn.init.zeros_(self.norm2.weight)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return F.relu(h + self.shortcut(x))


class SmallFeatures(nn.Module):
    """Maps, pooled features and answers for pictures in [-1, 1] of any size."""

    def __init__(self, config: SmallFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        in_channels = widths[0]
        for i, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            stage = [ResidualBlock(in_channels, width, stride=1 if i == 0 else 2)]
            stage += [ResidualBlock(width, width) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            in_channels = width
        self.heads = nn.ModuleDict(
            {head.name: nn.Linear(widths[-1], len(head.labels)) for head in config.heads}
        )

    @property
    def num_features(self) -> int:
        """Length of the pooled features."""
        return self.config.widths[-1]

    def labels(self, head: str) -> tuple[str, ...]:
        """The labels of a head in the order of its logits; ValueError if there is no such head."""
        for known in self.config.heads:
            if known.name == head:
                return known.labels
        raise ValueError(f"no head {head!r}: this network has {[known.name for known in self.config.heads]}")

    def forward(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch _ _ _"]]:
        """The maps of all stages, `stage1` (half the resolution) to the last, after the rectifier."""
        x = self.stem(resize_short_side(image, self.config.resolution))
        maps: dict[str, Tensor] = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps[f"stage{i + 1}"] = x
        return maps

    def pooled(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Global average of the last map, float32: the features of `fd_small` and the input of the heads."""
        return pool(self(image))

    def classify(
        self, image: Float[Tensor, "batch 3 height width"], heads: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "batch _"]]:
        """Logits of the named heads (default all); they assume that all labels are equally likely."""
        return self.answer(self.pooled(image), heads)

    def answer(
        self, features: Float[Tensor, "batch features"], heads: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "batch _"]]:
        """Logits of the named heads for pooled features."""
        names = [head.name for head in self.config.heads] if heads is None else list(heads)
        return {name: self.heads[name](features) for name in names if self.labels(name)}

    def predict(self, image: Float[Tensor, "batch 3 height width"], head: str) -> Int[Tensor, " batch"]:
        """Index of the likeliest label of one head."""
        return self.classify(image, [head])[head].argmax(1)


def pool(maps: dict[str, Float[Tensor, "batch _ _ _"]]) -> Float[Tensor, "batch features"]:
    """Global average of the last of a dict of maps, in float32."""
    return maps[next(reversed(maps))].float().mean((2, 3))


def resize_short_side(
    image: Float[Tensor, "batch 3 height width"], size: int
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """Scale to a short side of `size` (images.resize); the same tensor if it has that already."""
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    return images.resize(image, max(size, round(height * scale)), max(size, round(width * scale)))


def save(path: str | Path, network: SmallFeatures, card: dict | None = None) -> None:
    """Write a network in half precision, config and card in the metadata."""
    checkpoints.save(
        path,
        checkpoints.to_half(network.state_dict()),
        kind=KIND,
        config=network.config,
        card=card,
    )


def load(path: str | Path) -> SmallFeatures:
    """Read a network: frozen, evaluating, float32; CheckpointError if the file holds another thing."""
    checkpoint = checkpoints.load(path, kind=KIND)
    network = SmallFeatures(checkpoints.config_from_dict(SmallFeaturesConfig, checkpoint.config))
    expected = network.state_dict()
    network.load_state_dict({name: t.to(expected[name].dtype) for name, t in checkpoint.tensors.items()})
    return network.requires_grad_(False).eval()
