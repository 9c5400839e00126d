"""Training of Mamba-ST and SaMam: photographs stylized by paintings, judged by a frozen network.

A step stylizes contents by styles, and each picture by itself (the identity terms): three passes, of which
the latter two may run on a part of the batch. The maps of contents and styles are computed once.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mambastyle import checkpoints, images
from mambastyle.compute import channels_last
from mambastyle.data.packs import from_bytes, open_pack
from mambastyle.features.squeezenet import SqueezeNetFeatures
from mambastyle.losses import style_transfer as losses
from mambastyle.losses.reconstruction import Maps, total_variation
from mambastyle.models.mamba_st import MAMBA_ST_SMALL, MambaST, MambaSTConfig
from mambastyle.models.samam import SAMAM_PATCH4, SAMAM_SMALL, SaMam, SaMamConfig
from mambastyle.training.config import RunConfig, Section
from mambastyle.training.loop import Player, Terms, train
from mambastyle.training.random import StepRandom
from mambastyle.training.schedules import cosine

CONFIGS: dict[str, dict[str, SaMamConfig | MambaSTConfig]] = {
    "samam": {"paper": SaMamConfig(), "patch4": SAMAM_PATCH4, "small": SAMAM_SMALL},
    "mamba-st": {"paper": MambaSTConfig(), "small": MAMBA_ST_SMALL},
}


class PicturesSection(Section):
    """Where contents and styles come from and how they are cut and varied."""

    content: str
    """Pack of photographs."""
    style: str
    """Pack of paintings and textures."""
    content_select: dict[str, str] = Field(default_factory=dict)
    style_select: dict[str, str] = Field(default_factory=dict)
    size: int = Field(default=192, ge=16)
    """Side of the squares in memory."""
    crop: int = Field(default=128, ge=16)
    """Side of the pictures that are trained on."""
    zoom: bool = True
    """Crop squares between `crop` and `size`, scaled to `crop`; otherwise always of `crop`."""
    jitter: float = Field(default=0.5, ge=0, le=1)
    """The share of styles whose colours are varied."""

    @model_validator(mode="after")
    def _check_sizes(self) -> "PicturesSection":
        if self.crop > self.size:
            raise ValueError(f"crop {self.crop} must not be larger than size {self.size}")
        return self


class JudgeSection(Section):
    """The frozen network of the losses, and which of its maps are compared; empty for the network's own."""

    network: Literal["squeezenet", "vgg-normalised"] = "squeezenet"
    file: str | None = None
    """squeezenet: torchvision layout, by default from the environment; vgg-normalised: as published."""
    content: tuple[str, ...] = ()
    style: tuple[str, ...] = ()


class WeightsSection(Section):
    """Weight of every term; 0 leaves a term and what it needs out. The defaults are SaMam's."""

    content: float = Field(default=7.0, ge=0)
    style: float = Field(default=7.0, ge=0)
    identity_1: float = Field(default=70.0, ge=0)
    identity_2: float = Field(default=1.0, ge=0)

    # Not in the papers: VGG's first layer sees single pixels, SqueezeNet's does not.
    pixel_style: float = Field(default=0.0, ge=0)
    total_variation: float = Field(default=0.0, ge=0)
    grid: float = Field(default=0.0, ge=0)
    """On the network's own patches: `losses.style_transfer.grid`."""
    shuffle: float = Field(default=0.0, ge=0)
    """Mamba-ST alone: `losses.style_transfer.shuffles`."""


class StyleTransferConfig(RunConfig):
    """A run of SaMam or Mamba-ST; defaults are SaMam's published ones (Mamba-ST: style 10, constant rate)."""

    network: Literal["samam", "mamba-st"]
    model: SaMamConfig | MambaSTConfig
    """A size by name ("paper", "small", for SaMam "patch4"), or fields that differ from `base`."""
    start: str | None = None
    """A checkpoint of the same network and sizes to start from (fine-tuning, or another mix of weights)."""
    pictures: PicturesSection
    judge: JudgeSection = JudgeSection()
    weights: WeightsSection = WeightsSection()
    identity_share: float = Field(default=1.0, gt=0, le=1)
    """The share of the batch on which the identity terms are computed, and that of the shuffle."""
    grid_patches: int = Field(default=1, ge=1)
    """Patches a side that the grid's term takes for one: 2 also sees what alternates from patch to patch."""

    learning_rate: float = 1e-4
    warm_up: int = Field(default=0, ge=0)
    schedule: Literal["inverse", "cosine"] = "inverse"
    """inverse: 1 / (1 + decay * step), as published; cosine: down to 0 at the last step."""
    decay: float = 2e-5

    @field_validator("model", mode="before")
    @classmethod
    def _read_model(cls, values: Any, info: Any) -> Any:
        return _model_config(info.data["network"], values) if "network" in info.data else values

    @model_validator(mode="after")
    def _check_shuffle(self) -> "StyleTransferConfig":
        if self.weights.shuffle and not (isinstance(self.model, MambaSTConfig) and self.model.shuffle):
            raise ValueError("weights.shuffle needs a network that shuffles (mamba-st): set it to 0")
        return self


def _model_config(network: str, values: Any) -> Any:
    """The network's Config from a name, or from fields that differ from those of `base`."""
    known = CONFIGS[network]
    if isinstance(values, str):
        if values not in known:
            raise ValueError(f"no model {values!r} of {network}: choose among {', '.join(known)}")
        return known[values]
    if isinstance(values, dict):
        values = dict(values)
        base = _model_config(network, values.pop("base", "paper"))
        return checkpoints.config_from_dict(type(base), checkpoints.config_to_dict(base) | values)
    if not isinstance(values, type(known["paper"])):
        raise ValueError(f"{network} needs a {type(known['paper']).__name__}, got {type(values).__name__}")
    return values


class Pairs(NamedTuple):
    """What a step trains on, in [-1, 1]."""

    content: Float[Tensor, "batch 3 crop crop"]
    style: Float[Tensor, "batch 3 crop crop"]


class StyleTransferTask:
    """One player: the network. The judge is frozen and not saved with it."""

    def __init__(self, config: StyleTransferConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = channels_last(make_model(config.model), device)
        if config.start is not None:
            # Neither has to do with sizes: a run may start from one with another grain.
            free = ("grain", "token_limit")
            kind = config.network
            checkpoints.start_from(self.model, config.start, kind=kind, config=config.model, free=free)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.averaged: dict[str, nn.Module] = {"model": self.model}
        section = config.pictures
        self.contents = open_pack(section.content).select(**section.content_select).load(section.size)
        self.styles = open_pack(section.style).select(**section.style_select).load(section.size)
        self.judge = Judge(config.judge, device)
        self.weights = config.weights.model_dump()
        optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate)
        # A plain function is left out of the scheduler's state, a bound method is not.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step))
        self.players = [
            Player(
                "style_transfer",
                list(self.model.parameters()),
                optimizer,
                self.terms,
                self.weights,
                scheduler,
            )
        ]

    def rate(self, step: int) -> float:
        """The learning rate of a step over `learning_rate`."""
        config = self.config
        warm = min(1.0, (step + 1) / (config.warm_up + 1))
        if config.schedule == "inverse":
            return warm / (1 + config.decay * step)
        return warm * cosine(step, config.steps)

    # ---- What a step draws

    def pairs(self, random: StepRandom) -> Pairs:
        """Draw contents and styles. All randomness comes from `random`."""
        section = self.config.pictures
        contents = self.contents[random.epoch_indices(len(self.contents))].to(self.device)
        styles = self.styles[random.integers("style", len(self.styles)).cpu()].to(self.device)
        content = crops(contents, section.crop, random.uniform("content crop", 4), zoom=section.zoom)
        style = crops(styles, section.crop, random.uniform("style crop", 4), zoom=section.zoom)
        chosen = random.uniform("jitter") < section.jitter
        varied = vary_colours(style, random.uniform("colours", 4))
        return Pairs(content, torch.where(chosen[:, None, None, None], varied, style))

    # ---- What a step minimises

    def terms(self, random: StepRandom) -> Terms:
        content, style = self.pairs(random)
        share = math.ceil(len(content) * self.config.identity_share)
        with torch.no_grad():
            of_content, of_style = self.judge(content), self.judge(style)
        stylized = self.stylize(content, style, random, "shuffle")
        terms = self.style_transfer_terms(stylized, style, of_content, of_style)
        if self.weights["shuffle"]:
            again = self.stylize(content[:share], style[:share], random, "shuffle again")
            terms["shuffle"] = losses.shuffles(stylized[:share], again)
        if self.weights["identity_1"] or self.weights["identity_2"]:
            for name, picture, maps in (("content", content, of_content), ("style", style, of_style)):
                picture = picture[:share]
                again = self.stylize(picture, picture, random, f"shuffle {name}")
                for term, value in self.identity_terms(
                    again, picture, {key: value[:share] for key, value in maps.items()}
                ).items():
                    terms[term] = terms.get(term, 0) + value
        return terms

    def stylize(self, content: Tensor, style: Tensor, random: StepRandom, name: str) -> Tensor:
        """Run the network; grain and Mamba-ST's shuffles are the step's own."""
        if grain := self.config.model.grain:
            # Drawn for the whole batch, so that two processes see the noise that one sees.
            content = content + grain * random.normal(f"grain {name}", *content.shape[1:])[: len(content)]
        if isinstance(self.model, MambaST):
            return self.model(content, style, generator=random.stream(name, local=False))
        return self.model(content, style)

    def style_transfer_terms(
        self, stylized: Tensor, style: Tensor, of_content: Maps, of_style: Maps
    ) -> Terms:
        """What the stylized pictures are held to."""
        judge, weights = self.judge, self.weights
        terms: Terms = {}
        if weights["content"] or weights["style"]:
            maps = judge(stylized)
            if weights["content"]:
                terms["content"] = losses.content(pick(maps, judge.content), pick(of_content, judge.content))
            if weights["style"]:
                terms["style"] = losses.style(
                    pick(maps, judge.style), pick(of_style, judge.style), judge.scales
                )
        if weights["pixel_style"]:
            terms["pixel_style"] = losses.pixel_style(stylized, style)
        if weights["total_variation"]:
            terms["total_variation"] = total_variation(stylized)
        if weights["grid"]:
            terms["grid"] = losses.grid(stylized, self.config.model.patch * self.config.grid_patches)
        return terms

    def identity_terms(self, again: Tensor, picture: Tensor, maps: Maps) -> Terms:
        """What a picture stylized by itself is held to."""
        judge, terms = self.judge, {}
        if self.weights["identity_1"]:
            terms["identity_1"] = losses.identity_pixels(again, picture)
        if self.weights["identity_2"]:
            terms["identity_2"] = losses.identity_features(
                pick(judge(again, judge.style), judge.style), pick(maps, judge.style), judge.scales
            )
        return terms

    # ---- What the loop asks for

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing beside the modules changes."""

    def samples(self, averages: Mapping[str, nn.Module]) -> Tensor:
        """Twelve triples side by side: content, style, stylized; the same ones every time."""
        section = self.config.pictures
        count = min(12, len(self.contents), len(self.styles))
        centre = torch.full((count, 4), 0.5, device=self.device)
        spread = torch.arange(count)
        content, style = (
            crops(
                pictures[spread * (len(pictures) // count)].to(self.device), section.crop, centre, zoom=True
            )
            for pictures in (self.contents, self.styles)
        )
        grain = torch.Generator(self.device).manual_seed(0)
        stylized = averages["model"](images.add_grain(content, self.config.model.grain, grain), style)
        stylized = stylized.clamp(-1, 1)
        return torch.stack([content, style, stylized], 1).flatten(0, 1)

    def export(self, averages: Mapping[str, nn.Module], folder: Path, card: dict[str, Any]) -> None:
        """samam.safetensors or mamba-st.safetensors: the averaged network."""
        checkpoints.save(
            folder / f"{self.config.network}.safetensors",
            averages["model"].state_dict(),
            kind=self.config.network,
            config=self.config.model,
            card=card,
        )


class Judge:
    """A frozen network as a callable from pictures to maps, with the names and scales that the losses use."""

    def __init__(self, section: JudgeSection, device: torch.device) -> None:
        self.maps: Callable[[Tensor, Iterable[str]], Maps]
        if section.network == "squeezenet":
            self.maps = channels_last(SqueezeNetFeatures(section.file), device)
            self.content = section.content or losses.SQUEEZENET_CONTENT
            self.style = section.style or losses.SQUEEZENET_STYLE
            self.scales: Mapping[str, float] | None = losses.SQUEEZENET_SCALES
        else:
            from mambastyle import published

            if section.file is None:
                raise ValueError("the judge vgg-normalised needs its published weights: name their file")
            network = published.load(section.file, kind="vgg-normalised")
            assert isinstance(network, nn.Module)
            self.maps = channels_last(network, device)
            self.content = section.content or losses.VGG_CONTENT
            self.style = section.style or losses.VGG_STYLE
            self.scales = None
        self.names = tuple(dict.fromkeys(self.content + self.style))

    def __call__(self, image: Tensor, names: Iterable[str] | None = None) -> Maps:
        return self.maps(image, self.names if names is None else names)


def make_model(config: SaMamConfig | MambaSTConfig) -> SaMam | MambaST:
    """The network of a Config, with new weights."""
    return SaMam(config) if isinstance(config, SaMamConfig) else MambaST(config)


def pick(maps: Maps, names: Iterable[str]) -> Maps:
    """Some of the maps, in the order of `names`."""
    return {name: maps[name] for name in names}


def crops(
    pictures: UInt8[Tensor, "batch 3 size size"],
    crop: int,
    draws: Float[Tensor, "batch 4"],
    *,
    zoom: bool,
) -> Float[Tensor, "batch 3 crop crop"]:
    """A square from each picture, flipped or not, antialiased down to `crop` px, in [-1, 1].

    draws: for each picture, in [0, 1): the side between `crop` and the whole, top, left, and the flip
    (from 0.5 on not).
    """
    size = pictures.shape[-1]
    cut = []
    for picture, (zoomed, top, left, flip) in zip(pictures, draws.tolist(), strict=True):
        side = crop + int(zoomed * (size - crop + 1)) if zoom else crop
        y, x = int(top * (size - side + 1)), int(left * (size - side + 1))
        square = from_bytes(picture[:, y : y + side, x : x + side])
        if side != crop:
            square = F.interpolate(square[None], (crop, crop), mode="bilinear", antialias=True)[0]
        cut.append(square.flip(2) if flip < 0.5 else square)
    return torch.stack(cut)


def vary_colours(
    image: Float[Tensor, "batch 3 height width"], draws: Float[Tensor, "batch 4"]
) -> Float[Tensor, "batch 3 height width"]:
    """Turn the hues, and change contrast, saturation and brightness, of each picture; clamped to [-1, 1].

    draws: for each picture, in [0, 1): hue by up to a quarter turn either way, contrast by 0.8 to 1.25,
    saturation by 0.6 to 1.5, brightness by up to 0.15 either way.
    """
    hue, contrast, saturation, brightness = draws.unbind(1)
    angle = (hue - 0.5) * math.pi
    contrast, saturation = (0.8 * 1.5625**contrast)[:, None, None], (0.6 * 2.5**saturation)[:, None, None]
    grey = image.new_full((3, 3), 1 / 3)
    # Rotation about the grey axis (Rodrigues): across it by cos, and by sin in the perpendicular direction.
    across = torch.eye(3, device=image.device) - grey
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=image.device) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    matrix = contrast * (grey + saturation * (cos * across + sin * turn))
    shift = (brightness - 0.5)[:, None, None] * 0.3
    return (matrix @ image.flatten(2) + shift).clamp(-1, 1).view_as(image)


def run(config: StyleTransferConfig) -> Path:
    """Train (or go on training) the network of this run file; returns the run's folder."""
    return train(config, lambda device: StyleTransferTask(config, device))
