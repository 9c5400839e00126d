"""Training of MambaStyle (section 3.4): encoder and fuser against a frozen generator, in a single stage.

The pictures are the generator's own, made on the fly: w = M(z), X = G(w), and for a direction d also
X_e = G(w + d). Each step inverts X, edits the inversion by d, and goes back by -d. Real pictures may be a
part of the batch: they have no known w, so the terms that compare with w or with X_e leave them out.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Float, UInt8
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambastyle import checkpoints, images
from mambastyle.compute import channels_last
from mambastyle.data.packs import from_bytes, open_pack
from mambastyle.files import write_whole
from mambastyle.latents.directions import Directions
from mambastyle.losses import inversion as losses
from mambastyle.models.mambastyle import (
    CONFIGS,
    FACES1024,
    Inversion,
    MambaStyle,
    MambaStyleConfig,
    variant_of,
)
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config, mix_styles
from mambastyle.training.config import RunConfig, Section
from mambastyle.training.judges import Judge, JudgeSection, Term
from mambastyle.training.loop import Player, Terms, train
from mambastyle.training.random import StepRandom

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def _mambastyle_config(values: Any) -> Any:
    """A size by name, or a mapping of its fields, or of those that differ from `base`."""
    if isinstance(values, str):
        if values not in CONFIGS:
            raise ValueError(f"no model {values!r}: choose among {', '.join(CONFIGS)} or give its fields")
        return CONFIGS[values]
    if isinstance(values, dict):
        values = dict(values)
        base = checkpoints.config_to_dict(_mambastyle_config(values.pop("base", "faces1024")))
        return checkpoints.config_from_dict(MambaStyleConfig, base | values)
    return values


class LatentsSection(Section):
    """How w is drawn: one z per picture, at times two that share the layers."""

    truncation_psi: float = 1.0
    style_mixing: float = Field(default=0.0, ge=0, le=1)
    """The share of pictures whose latents come from two z."""


class DirectionsSection(Section):
    """How d is drawn. A strength of 1 is one natural unit of its direction."""

    file: str | None = None
    """Known directions (principal components, attributes); None leaves the random ones alone."""
    names: tuple[str, ...] = ()
    """Which of the file's, in the order in which they join; empty for all in the file's order."""
    strength: float = Field(default=2.0, gt=0)
    """Known directions: uniform in [-strength, strength]."""
    first: int = Field(default=1, ge=1)
    """How many known directions take part from the start."""
    join_every: int = Field(default=0, ge=0)
    """Another one joins after so many steps; 0: all from the start."""
    random_share: float = Field(default=0.5, ge=0, le=1)
    """The share of pictures edited towards another w instead of along a known direction."""
    random_strength: float = Field(default=0.7, gt=0)
    """Random directions: uniform in [0, random_strength] of the way to another w."""
    random_layers: float = Field(default=0.5, ge=0, le=1)
    """The share of random directions that act on a run of layers alone."""


class WeightsSection(Section):
    """Weight of every term; 0 leaves a term and what it needs out. The defaults are the published ones.

    The terms on F (feature, edit_feature) drop out of a model without a feature.
    """

    l2: float = 5.0
    smooth_l1: float = 5.0
    perceptual: float = 0.8
    identity: float = 0.1
    structure: float = 1.0
    w_norm: float = 0.005
    feature: float = 1.0
    edit_feature: float = 1.0
    total_variation: float = 4.0
    cycle: float = 5.0
    edit_consistency: float = 2.0

    # Not in the paper: w and X_e are known exactly for the generator's own pictures.
    latent: float = 0.0
    edit_l2: float = 0.0
    edit_perceptual: float = 0.0
    # Nor is this: what an edited real picture should be is unknown, and these hold it to a composite of the
    # picture and of what the edit does to G(w) (losses.inversion.composite). They drop out with F.
    real_edit_l2: float = 0.0
    real_edit_perceptual: float = 0.0


class InversionConfig(RunConfig):
    """A MambaStyle run; defaults are the published ones where the paper or its code gives them."""

    model: Annotated[MambaStyleConfig, BeforeValidator(_mambastyle_config)] = FACES1024
    variant: str | None = None
    """A row of the ablation (models.mambastyle.VARIANTS), applied to the model and the weights."""
    generator: str
    """Checkpoint of the frozen generator, kind "stylegan2"."""
    start: str | None = None
    """A checkpoint of the same sizes to start from, perhaps trained for another generator."""
    latents: LatentsSection = LatentsSection()
    directions: DirectionsSection = DirectionsSection()
    judges: dict[Term, JudgeSection] = Field(default_factory=dict)
    """The networks behind L_perc, L_id and L_struct; a term without one is left out, and said."""
    weights: WeightsSection = WeightsSection()

    pack: str | None = None
    select: dict[str, str] = Field(default_factory=lambda: {"split": "train"})
    real_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of each batch that is real pictures of `pack`."""
    edit_share: float = Field(default=1.0, ge=0, le=1)
    """The share of the generated pictures, and of the real ones, that are edited as well as inverted."""
    feature_dropout: float = Field(default=0.0, ge=0, lt=1)
    """The share of pictures that are inverted without F: w has to carry what it can, and F only the rest.

    Not in the paper, whose F of 64 px in 1024 px is coarse; at 64 px F alone can carry the whole picture,
    and an edit of w then changes nothing.
    """
    feature_target: Literal["encoder", "generator"] = "encoder"
    """What F is held to without an edit: H as published, or what G's activations lack."""
    edit_feature_target: Literal["gap", "generator"] = "gap"
    """With an edit: what G's activations lack, or, as published, G's activations for w_e themselves."""
    gradient_checkpointing: bool = False
    """Keep of encoder, fuser, generator and judges only what goes in; a third more time, much less memory."""
    l2_size: int | None = 256
    smooth_l1_sizes: tuple[int | None, ...] = (512, 768, 1024)

    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warm_up: int = Field(default=0, ge=0)
    """Steps in which the rate grows to `learning_rate`; those of the restarts count from there."""
    restart_steps: int = 15_000
    restart_factor: int = 2
    minimum_learning_rate: float = 1e-6

    @model_validator(mode="before")
    @classmethod
    def _apply_variant(cls, values: Any) -> Any:
        variant = values.get("variant") if isinstance(values, dict) else None
        if variant is None:
            return values
        model = variant_of(_mambastyle_config(values.get("model", "faces1024")), variant)
        values = values | {"model": model}
        if variant == "no-le":
            values["weights"] = dict(values.get("weights", {})) | {"edit_consistency": 0.0}
        return values


class Pairs(NamedTuple):
    """What a step trains on: real pictures first, then the generator's own."""

    image: Float[Tensor, "batch 3 height width"]
    direction: Float[Tensor, "batch num_ws w_dim"]
    ws: Float[Tensor, "generated num_ws w_dim"]
    """The true latents of the generated pictures, `w_avg` included."""
    edited: Float[Tensor, "batch 3 height width"] | None
    """X_e = G(w + d) of the generated pictures that are edited; None where no term needs it."""
    real: int
    edits: Tensor
    """Positions in the batch of the pictures that are edited."""
    edited_generated: Tensor
    """Which of the edited ones are generated (a mask over `edits`)."""


class InversionTask:
    """One player: encoder and fuser. The generator and the judges are frozen and not saved with it."""

    def __init__(self, config: InversionConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        source = checkpoints.load(config.generator, kind="stylegan2")
        # Where the feature enters is MambaStyle's choice.
        layer = config.model.feature_layer if config.model.feature else 0
        self.generator = channels_last(Generator.from_checkpoint(source, layer), device)
        self.generator.synthesis.keep_kernels()
        check_match(config.model, self.generator.config)
        self.model = channels_last(MambaStyle(config.model), device)
        if config.start is not None:
            checkpoints.start_from(self.model, config.start, kind="mambastyle", config=config.model)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.averaged: dict[str, nn.Module] = {"model": self.model}
        self.offsets = self._known_directions()
        self.weights = config.weights.model_dump()
        # A judge that no term asks for need not be there.
        self.judges = {
            name: Judge(name, section, device)
            for name, section in config.judges.items()
            if self._any(name)
            or (name == "perceptual" and self._any("edit_perceptual", "real_edit_perceptual"))
        }
        for name in ("edit_perceptual", "real_edit_perceptual"):
            if self.weights[name] and "perceptual" not in self.judges:
                raise ValueError(f"{name} needs a judge named perceptual: add it under judges")
        self.pictures: UInt8[Tensor, "n 3 r r"] | None = None
        if config.real_share:
            if config.model.frame is not None:
                raise ValueError(
                    f"real_share is {config.real_share}: packs hold squares, this model's pictures are "
                    f"{config.model.frame}; set it to 0"
                )
            if config.pack is None:
                raise ValueError(
                    f"real_share is {config.real_share}: name the pictures with pack, or set it to 0"
                )
            self.pictures = (
                open_pack(config.pack).select(**config.select).load(self.generator.config.resolution)
            )
        if absent := [name for name in get_args(Term) if self.weights[name] and name not in self.judges]:
            logger.warning(
                "no judge for %s, so the loss lacks them: name their networks under judges", ", ".join(absent)
            )
        self.players = [self._player()]

    # ---- What a step draws

    def pairs(self, random: StepRandom) -> Pairs:
        """Draw pictures and directions. All randomness comes from `random`."""
        batch = random.local_batch
        real = random.part(self.config.real_share, batch, "real_share")
        ws = self.sample_ws(random)
        direction = self.sample_directions(random, ws)
        # The first of each kind; the pictures come in random order.
        known, drawn = (random.part(self.config.edit_share, n, "edit_share") for n in (real, batch - real))
        edits = torch.cat([torch.arange(known), torch.arange(real, real + drawn)]).to(self.device)
        with torch.no_grad():
            image = self.render(ws[real:]).clamp(-1, 1)
            edited = None
            generated = edits[edits >= real]
            if len(generated) and self._any("edit_consistency", "edit_l2", "edit_perceptual"):
                edited = self.render(ws[generated] + direction[generated]).clamp(-1, 1)
        if real and self.pictures is not None:
            chosen = random.epoch_indices(len(self.pictures))[:real]
            found = from_bytes(self.pictures[chosen].to(self.device))
            flips = random.uniform("flip")[:real, None, None, None] < 0.5
            image = torch.cat([torch.where(flips, found.flip(3), found), image])
        return Pairs(image, direction, ws[real:], edited, real, edits, edits >= real)

    def sample_ws(self, random: StepRandom) -> Float[Tensor, "batch num_ws w_dim"]:
        """One z per picture, or two mixed at a random layer; `w_avg` is part of what the mapping gives."""
        mapping, section = self.generator.mapping, self.config.latents
        num_ws = self.config.model.num_ws
        z = random.normal("z", 2, self.generator.config.z_dim)
        with torch.no_grad():
            ws = mapping(z[:, 0], truncation_psi=section.truncation_psi)
            if not section.style_mixing:
                return ws
            other = mapping(z[:, 1], truncation_psi=section.truncation_psi)
        cutoff = 1 + random.integers("mixing layer", num_ws - 1)
        mixes = random.uniform("mixes") < section.style_mixing
        return mix_styles(ws, other, torch.where(mixes, cutoff, num_ws))

    def sample_directions(
        self, random: StepRandom, ws: Float[Tensor, "batch num_ws w_dim"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """One direction, strength included, for each picture."""
        section, num_ws = self.config.directions, self.config.model.num_ws
        with torch.no_grad():
            other = self.generator.mapping(random.normal("z of directions", self.generator.config.z_dim))
        towards = (other - ws) * (random.uniform("random strength") * section.random_strength)[:, None, None]
        # A run of layers between two cuts; the cuts are ordered, and equal ones leave one layer.
        first, last = (
            torch.stack([random.integers("first layer", num_ws), random.integers("last layer", num_ws)])
            .sort(0)
            .values
        )
        layers = torch.arange(num_ws, device=ws.device)
        inside = (layers >= first[:, None]) & (layers <= last[:, None])
        whole = random.uniform("layers") >= section.random_layers
        towards = towards * (inside | whole[:, None])[..., None]

        known = self.known_count(random.step)
        if not known:
            return towards
        chosen = self.offsets[random.integers("direction", known)]
        strength = (2 * random.uniform("strength") - 1) * section.strength
        along = chosen * strength[:, None, None]
        is_random = random.uniform("random direction") < section.random_share
        return torch.where(is_random[:, None, None], towards, along)

    def known_count(self, step: int) -> int:
        """How many known directions take part in a step: they join one by one."""
        section = self.config.directions
        if not section.join_every:
            return len(self.offsets)
        return min(len(self.offsets), section.first + step // section.join_every)

    # ---- The loss

    def terms(self, random: StepRandom) -> Terms:
        """Named unweighted terms of one step; those of weight 0 are left out."""
        pairs = self.pairs(random)
        # X and X_e go through the encoder together: one pass, and one set of batch statistics.
        together = pairs.image if pairs.edited is None else torch.cat([pairs.image, pairs.edited])
        ws, feature = self.encode(together)
        batch = len(pairs.image)
        encoded = Inversion(ws[:batch], None if feature is None else feature[:batch])
        terms = self._inversion_terms(pairs, encoded, random)
        if len(pairs.edits):
            terms |= self._edit_terms(pairs, encoded, ws[batch:])
        return {name: term for name, term in terms.items() if self.weights[name]}

    def _inversion_terms(self, pairs: Pairs, encoded: Inversion, random: StepRandom) -> Terms:
        """d = 0: X^ = G(w^, F)."""
        config = self.config
        inverted = self.edit(encoded)
        ws = inverted.ws + self.w_avg
        feature = inverted.feature
        if config.feature_dropout and feature is not None:
            kept = random.uniform("feature dropout") >= config.feature_dropout
            feature = feature * kept[:, None, None, None]
        rendered = self.render(ws, feature)
        terms = losses.reconstruction_terms(
            rendered, pairs.image, l2_size=config.l2_size, smooth_l1_sizes=config.smooth_l1_sizes
        )
        terms |= self._judge_terms(rendered, pairs.image)
        terms["w_norm"] = losses.w_norm(inverted.ws.float())
        if self._any("latent") and len(pairs.ws):
            terms["latent"] = (ws[pairs.real :].float() - pairs.ws).abs().mean()
        if self._any("feature") and inverted.feature is not None and encoded.feature is not None:
            if config.feature_target == "encoder":
                # Without a fuser F is H, and the term is zero.
                terms["feature"] = losses.feature(inverted.feature.float(), encoded.feature.float())
            elif len(pairs.ws):
                target = self._gap(pairs.ws, ws[pairs.real :])
                terms["feature"] = losses.feature(inverted.feature[pairs.real :].float(), target)
        return terms

    def _edit_terms(
        self, pairs: Pairs, encoded: Inversion, ws_edited: Float[Tensor, "edited num_ws w_dim"]
    ) -> Terms:
        """d != 0: X^_e = G(w^ + d, F_d), held to G's own edit and to the way back."""
        at, generated = pairs.edits, pairs.edited_generated
        direction, image = pairs.direction[at], pairs.image[at]
        before = Inversion(encoded.ws[at], None if encoded.feature is None else encoded.feature[at])
        terms: Terms = {}
        if self._any("edit_consistency") and pairs.edited is not None:
            terms["edit_consistency"] = losses.edit_consistency(
                before.ws[generated].float(), ws_edited.float(), direction[generated]
            )
        real = ~generated
        composed = (
            real.any() and self.config.model.feature and self._any("real_edit_l2", "real_edit_perceptual")
        )
        if not composed and not self._any(
            "edit_feature", "total_variation", "cycle", "edit_l2", "edit_perceptual"
        ):
            return terms

        edited = self.edit(before, direction)
        ws = edited.ws + self.w_avg
        if self._any("edit_feature") and edited.feature is not None and generated.any():
            wanted = pairs.ws[at[generated] - pairs.real] + direction[generated]
            if self.config.edit_feature_target == "gap":
                target = self._gap(wanted, ws[generated])
            else:
                target = self._features_at(wanted)
            terms["edit_feature"] = losses.feature(edited.feature[generated].float(), target)
        if not composed and not self._any("total_variation", "cycle", "edit_l2", "edit_perceptual"):
            return terms

        rendered = self.render(ws, edited.feature)
        if composed:
            with torch.no_grad():
                plain, moved = self.render(ws[real] - direction[real]), self.render(ws[real])
            target = losses.composite(image[real], plain, moved)
            if self._any("real_edit_l2"):
                terms["real_edit_l2"] = losses.reconstruction.l2(rendered[real], target, self.config.l2_size)
            if self._any("real_edit_perceptual"):
                terms["real_edit_perceptual"] = self._segment(
                    self.judges["perceptual"], rendered[real], target
                )
        terms["total_variation"] = losses.total_variation(rendered)
        if pairs.edited is not None and self._any("edit_l2"):
            terms["edit_l2"] = losses.reconstruction.l2(
                rendered[generated], pairs.edited, self.config.l2_size
            )
        if pairs.edited is not None and self._any("edit_perceptual"):
            terms["edit_perceptual"] = self._segment(
                self.judges["perceptual"], rendered[generated], pairs.edited
            )
        if self._any("cycle"):
            returned = self.edit(self.encode(rendered.clamp(-1, 1)), -direction)
            terms["cycle"] = losses.cycle(self.render(returned.ws + self.w_avg, returned.feature), image)
        return terms

    def _judge_terms(self, rendered: Tensor, image: Tensor) -> Terms:
        return {
            name: self._segment(judge, rendered, image)
            for name, judge in self.judges.items()
            if self._any(name)
        }

    # ---- The networks

    @property
    def w_avg(self) -> Float[Tensor, " w_dim"]:
        return self.generator.mapping.w_avg

    def prepare(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 side side"]:
        """Pictures as the encoder takes them: in the bars of their frame, if they have one, and resized."""
        size = self.config.model.image_size
        if self.config.model.frame is not None:
            image = images.pad_middle(image, max(image.shape[2:]), max(image.shape[2:]))
        return images.resize(image, size, size)

    def encode(self, image: Float[Tensor, "batch 3 height width"]) -> Inversion:
        """The encoder on pictures of any size."""
        return self._segment(self.model.encoder, self.prepare(image))

    def edit(self, encoded: Inversion, direction: Tensor | None = None) -> Inversion:
        """`MambaStyle.edit`; without a direction the inversion itself."""
        return self._segment(self.model.edit, encoded, direction)

    def render(self, ws: Tensor, feature: Tensor | None = None) -> Float[Tensor, "batch 3 height width"]:
        """G in float32's range, with its fixed noise: the same latents are always the same picture.

        Of a generator that draws bars around its frame, the frame alone.
        """
        image = self._segment(self.generator.synthesis, ws, feature).float()
        frame = self.config.model.frame
        return image if frame is None else images.crop_middle(image, *frame)

    def _segment(self, function: Callable[..., Result], *inputs: Any) -> Result:
        """Call it; with gradient checkpointing, keep its inputs alone and run it again for the gradients."""
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            return function(*inputs)
        return checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), keep_statistics(self.model)),
        )

    @torch.no_grad()
    def _features_at(self, ws: Tensor) -> Float[Tensor, "batch channels height width"]:
        return self.generator.synthesis.features_at(ws, self.config.model.feature_layer).float()

    def _gap(self, wanted: Tensor, rendered: Tensor) -> Float[Tensor, "batch channels height width"]:
        return losses.feature_gap(self._features_at(wanted), self._features_at(rendered.detach()))

    # ---- What the loop asks for

    def _player(self) -> Player:
        config, parameters = self.config, list(self.model.parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        rates = torch.optim.lr_scheduler
        scheduler: torch.optim.lr_scheduler.LRScheduler = rates.CosineAnnealingWarmRestarts(
            optimizer, config.restart_steps, config.restart_factor, config.minimum_learning_rate
        )
        if config.warm_up:
            grow = rates.LinearLR(optimizer, 1 / config.warm_up, total_iters=config.warm_up - 1)
            scheduler = rates.SequentialLR(optimizer, [grow, scheduler], [config.warm_up])
        return Player("inversion", parameters, optimizer, self.terms, self.weights, scheduler)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing beside the modules changes."""

    def samples(self, averages: Mapping[str, nn.Module]) -> Tensor:
        """Eighteen pairs, picture and inversion side by side; real pictures first where there are any."""
        random = StepRandom(seed=0, step=0, batch=18, device=self.device)
        image = self.render(self.sample_ws(random)).clamp(-1, 1)
        if self.pictures is not None:
            real = from_bytes(self.pictures[:9].to(self.device))
            image = torch.cat([real, image[len(real) :]])
        inverted = averages["model"](self.prepare(image))
        rendered = self.render(inverted.ws + self.w_avg, inverted.feature).clamp(-1, 1)
        return torch.stack([image, rendered], 1).flatten(0, 1)

    def export(self, averages: Mapping[str, nn.Module], folder: Path, card: dict[str, Any]) -> None:
        """inversion.safetensors, the averaged encoder and fuser, with its generator and directions beside it.

        So the run's folder is a model that `mambastyle.load` and every command take.
        """
        beside = {"generator.safetensors": self.config.generator}
        if self.config.directions.file is not None:
            beside["directions.safetensors"] = self.config.directions.file
        for name, source in beside.items():
            write_whole(folder / name, Path(source).read_bytes())
        checkpoints.save(
            folder / "inversion.safetensors",
            averages["model"].state_dict(),
            kind="mambastyle",
            config=self.config.model,
            card=card | {"generator": Path(self.config.generator).name},
        )

    def _known_directions(self) -> Float[Tensor, "known num_ws w_dim"]:
        section, model = self.config.directions, self.config.model
        if section.file is None:
            return torch.zeros(0, model.num_ws, model.w_dim, device=self.device)
        found = Directions.load(section.file)
        offsets = torch.stack([found[name].offset() for name in section.names or found])
        if offsets.shape[1:] != (model.num_ws, model.w_dim):
            raise ValueError(
                f"{section.file}: directions of {tuple(offsets.shape[1:])}, expected "
                f"({model.num_ws}, {model.w_dim}): discover them in the generator of this run"
            )
        return offsets.to(self.device)

    def _any(self, *names: str) -> bool:
        return any(self.weights[name] for name in names)


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training use their batch and leave the running statistics as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def check_match(model: MambaStyleConfig, generator: StyleGAN2Config) -> None:
    """ValueError unless the latents and the feature of a MambaStyle fit a generator."""
    pairs = [("num_ws", model.num_ws, generator.num_ws), ("w_dim", model.w_dim, generator.w_dim)]
    where = ""
    if model.feature:
        channels, size = generator.layer_shape(model.feature_layer)
        pairs += [
            ("feature_channels", model.feature_channels, channels),
            ("feature_size", model.feature_size, size),
        ]
        where = f" (feature_layer {model.feature_layer}; strides decide feature_size)"
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(
                f"the model's {name} is {ours}, and this generator needs {theirs}{where}: "
                "change the model section"
            )


def run(config: InversionConfig) -> Path:
    """Train (or go on training) the encoder and fuser of this run file; returns the run's folder."""
    return train(config, lambda device: InversionTask(config, device))
