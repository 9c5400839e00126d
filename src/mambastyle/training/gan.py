"""GAN training of StyleGAN2 on a picture pack (Karras et al. 2020, 2020b).

The image discriminator has the non-saturating loss, lazy R1 and adaptive augmentation; projected ones (Sauer
et al. 2021) look at frozen SqueezeNet maps and speed up the first 100k pictures several times, but alone they
ruin the colours, so they stand beside it with a small weight.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from mambastyle import checkpoints
from mambastyle.compute import channels_last
from mambastyle.data.packs import from_bytes, open_pack
from mambastyle.features.squeezenet import CHANNELS, SqueezeNetFeatures
from mambastyle.losses import adversarial, reconstruction
from mambastyle.models.stylegan2 import Discriminator, Generator, StyleGAN2Config, mix_styles
from mambastyle.ops.resample import blur
from mambastyle.training.augment import AdaptiveProbability, augment
from mambastyle.training.config import RunConfig, Section
from mambastyle.training.latent_encoder import LatentEncoder, fit_prior
from mambastyle.training.loop import Player, Terms, process_mean, train
from mambastyle.training.random import StepRandom
from mambastyle.training.schedules import cosine

logger = logging.getLogger(__name__)


def _stylegan2_config(values: Any) -> Any:
    return checkpoints.config_from_dict(StyleGAN2Config, values) if isinstance(values, dict) else values


class DataSection(Section):
    """Which pictures: a pack with labels.csv, and the rows of it to use."""

    pack: str
    select: dict[str, str] = Field({"split": "train"})
    flip: bool = True


class ProjectedSection(Section):
    """Discriminators on frozen features; weight 0 leaves them out."""

    weight: float = 1.0
    squeezenet: str | None = None
    layers: tuple[str, ...] = ("relu1", "fire4", "fire8", "fire9")
    width: int = 64
    learning_rate: float = 0.0002


class ReconstructionSection(Section):
    """A share of the pictures are not drawn but reconstructed, from a z that an encoder finds; share 0: none.

    Not in StyleGAN2 (see `latent_encoder`). The discriminators see these pictures like all others.
    """

    share: float = Field(default=0.0, ge=0, lt=1)
    l2: float = Field(default=5.0, ge=0)
    perceptual: float = Field(default=0.5, ge=0)
    """Weight of the distance of SqueezeNet's maps; it needs the `projected` section's network."""
    divergence: float = Field(default=2e-4, ge=0)
    """Weight of a nat of KL(z of the picture, standard normal)."""
    layers: tuple[str, ...] = ("relu1", "fire2", "fire4", "fire7")
    learning_rate: float = 0.0005
    fit_prior: bool = False
    """At the start of a run that goes on from a checkpoint (`start`): give the pictures' z mean 0 and
    covariance 1, so that drawn z fall where pictures are."""


class GANConfig(RunConfig):
    """A GAN run: model, data, losses; defaults near stylegan2-ada's `auto` for small pictures."""

    model: Annotated[StyleGAN2Config, BeforeValidator(_stylegan2_config)]
    data: DataSection
    start: str | None = None
    """A checkpoint to start from (fine-tuning, or going on with a committed one): its generator, and of its
    discriminators those whose shapes fit."""
    projected: ProjectedSection = ProjectedSection()
    reconstruction: ReconstructionSection = ReconstructionSection()
    discriminator_widths: tuple[int, ...] = ()
    learning_rate: float = 0.0025
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: all rates fall to 0 at the last step, for the end of a training (Huang et al. 2024, R3GAN)."""
    betas: tuple[float, float] = (0.0, 0.99)
    r1_gamma: float = 0.1
    r1_every: int = 16
    path_length_weight: float = 2.0
    path_length_every: int = 8
    path_length_after: int = 2000
    """From which step on. At first the running mean is far below the lengths, and the penalty only shrinks
    them (from 0.7 to 0.05 in 500 steps), and with them what w can change."""
    spectrum: float = Field(default=0.0, ge=0)
    """Weight of the distance between the spectra of drawn and real pictures in fine detail; not in StyleGAN2.
    At 64 px it takes out a hatching of two to three pixels that the discriminators hardly mind."""
    style_mixing: float = 0.5
    augment_initial: float = 0.1
    augment_target: float = 0.6


# Without it the heads are past the hinge's margin (d_projected 0.03 of 2) before the generator draws a
# thing, and stop learning while it runs along their last gradient into texture. So small, they stay critics.
_LOGIT_GAIN = 0.1


class ProjectedDiscriminator(nn.Module):
    """Frozen features, mixed across channels and scales by fixed random convolutions, judged at every scale.

    Sauer et al. 2021, sections 3.1 and 3.2, with spectral normalisation and without batch normalisation.
    """

    def __init__(self, features: nn.Module, layers: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.layers = layers
        # Kept out of the module tree: the frozen network is no part of this one's state.
        self._features = [features]
        channels = [nn.Conv2d(CHANNELS[name], width, 1, bias=False) for name in layers]
        scales = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in layers]
        for conv in channels + scales:
            nn.init.kaiming_normal_(conv.weight)
            conv.requires_grad_(False)
        self.across_channels, self.across_scales = nn.ModuleList(channels), nn.ModuleList(scales)
        self.register_buffer("scales", torch.ones(len(layers)))
        heads: list[nn.Module] = []
        for number in range(len(layers)):
            downs = max(0, len(layers) - 2 - number)
            body: list[nn.Module] = []
            for _ in range(downs):
                body += [spectral_norm(nn.Conv2d(width, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            body += [spectral_norm(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2)]
            heads.append(nn.Sequential(*body, spectral_norm(nn.Conv2d(width, 1, 3, padding=1))))
        self.heads = nn.ModuleList(heads)

    scales: Tensor

    @property
    def features(self) -> nn.Module:
        """The frozen network."""
        return self._features[0]

    @torch.no_grad()
    def calibrate(self, image: Float[Tensor, "b 3 h w"]) -> None:
        """Bring every map to unit root mean square on these pictures: SqueezeNet's are tens to hundreds."""
        maps = self._maps(image)
        self.scales.copy_(torch.stack([maps[name].square().mean().rsqrt() for name in self.layers]))

    def _maps(self, image: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        # Seen through a binomial filter of 7 taps: 93 % of the gradient of SqueezeNet's maps is finer than
        # 4 px (18 % of the image discriminator's) and unfiltered it drowned the faces in texture.
        return self.features(blur(blur(image, padding=2), padding=1), self.layers)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b n"]]:
        """Logits of every scale, one tensor each, shallow to deep."""
        maps = self._maps(image)
        mixed, above = [], None
        for number in reversed(range(len(self.layers))):
            x = self.across_channels[number](maps[self.layers[number]] * self.scales[number])
            if above is not None:
                x = x + F.interpolate(above, size=x.shape[2:], mode="nearest")
            above = self.across_scales[number](x) * 0.5
            mixed.append(above)
        judged = zip(self.heads, reversed(mixed), strict=True)
        return [head(x).flatten(1).float() * _LOGIT_GAIN for head, x in judged]


class GANTask:
    """Two players: the discriminators, then the generator on the same pictures."""

    def __init__(self, config: GANConfig, device: torch.device) -> None:
        self.config = config
        pack = open_pack(config.data.pack).select(**config.data.select)
        self.pictures: UInt8[Tensor, "n 3 r r"] = pack.load(config.model.resolution)
        self.generator = Generator(config.model)
        widths = config.discriminator_widths or config.model.channels
        self.discriminator = Discriminator(_with_widths(config.model, tuple(widths)))
        self.modules: dict[str, nn.Module] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
        }
        self.projected: ProjectedDiscriminator | None = None
        if config.projected.weight:
            features = SqueezeNetFeatures(config.projected.squeezenet).to(device)
            section = config.projected
            self.projected = ProjectedDiscriminator(features, section.layers, section.width).to(device)
            self.modules["projected"] = self.projected
            self.projected.calibrate(from_bytes(self.pictures[:64]).to(device))
        self.encoder: LatentEncoder | None = None
        if config.reconstruction.share:
            if self.projected is None and config.reconstruction.perceptual:
                raise ValueError(
                    "reconstruction.perceptual needs SqueezeNet: give projected a weight, or set it to 0"
                )
            model = config.model
            self.encoder = LatentEncoder(model.resolution, model.channels[-2::-1], model.z_dim)
            self.modules["encoder"] = self.encoder
        if config.start is not None:
            self._start_from(checkpoints.load(config.start, kind="stylegan2"))
            if self.encoder is not None and config.reconstruction.fit_prior:
                batches = (from_bytes(part) for part in self.pictures.split(256))
                fit_prior(self.generator.mapping, self.encoder, batches, torch.Generator().manual_seed(0))
        for module in self.modules.values():
            channels_last(module, device)
        self.averaged: dict[str, nn.Module] = {"generator": self.generator}
        self.probability = AdaptiveProbability(config.augment_target)
        self.probability.value = config.augment_initial
        self.path_mean = torch.zeros((), device=device)
        self.signs: list[float] = []
        self.fake: Tensor | None = None
        self.generator_terms: Terms = {}
        """What the discriminators' turn finds out for the generator's."""
        self.players = [self._discriminator_player(), self._generator_player()]
        self.sample_z = torch.randn(64, config.model.z_dim, generator=torch.Generator().manual_seed(0)).to(
            device
        )

    def _start_from(self, checkpoint: checkpoints.Checkpoint) -> None:
        for name, module in self.modules.items():
            tensors = {key: value.float() for key, value in checkpoint.part(f"{name}.").items()}
            own = {key: value.shape for key, value in module.state_dict().items()}
            if own == {key: value.shape for key, value in tensors.items()}:
                module.load_state_dict(tensors)
            elif name == "generator":
                raise ValueError(
                    f"{checkpoint.path}: its generator has other sizes than this run's model section"
                )
            else:
                logger.warning("%s has no %s of this size: a new one is trained", checkpoint.path, name)

    def _discriminator_player(self) -> Player:
        groups: list[dict[str, Any]] = [{"params": list(self.discriminator.parameters())}]
        if self.projected is not None:
            # Their weights are not equalised: the image discriminator's rate turns them over in 20 steps.
            heads = [p for p in self.projected.parameters() if p.requires_grad]
            groups.append({"params": heads, "lr": self.config.projected.learning_rate})
        weights = {
            "d_adversarial": 1.0,
            "d_projected": self.config.projected.weight,
            "r1": self.config.r1_gamma / 2 * self.config.r1_every,
        }
        return self._player("discriminator", groups, self.config.r1_every, self._d_terms, weights)

    def _generator_player(self) -> Player:
        section = self.config.reconstruction
        groups: list[dict[str, Any]] = [{"params": list(self.generator.parameters())}]
        if self.encoder is not None:
            groups.append({"params": list(self.encoder.parameters()), "lr": section.learning_rate})
        every = self.config.path_length_every
        weights = {
            "g_adversarial": 1.0,
            "g_projected": self.config.projected.weight,
            "path_length": self.config.path_length_weight * max(every, 1),
            "spectrum": self.config.spectrum,
            "l2": section.l2,
            "perceptual": section.perceptual,
            "divergence": section.divergence,
        }
        return self._player("generator", groups, every, self._g_terms, weights)

    def _player(
        self,
        name: str,
        groups: list[dict[str, Any]],
        lazy_every: int,
        terms: Callable[[StepRandom], Terms],
        weights: dict[str, float],
    ) -> Player:
        # Lazy regularisation (StyleGAN2, appendix B): the moments see one more gradient per `lazy_every`.
        ratio = lazy_every / (lazy_every + 1) if lazy_every else 1.0
        betas = (self.config.betas[0] ** ratio, self.config.betas[1] ** ratio)
        adam = torch.optim.Adam(
            groups, lr=self.config.learning_rate * ratio, betas=betas, eps=1e-8, fused=True
        )
        parameters = [parameter for group in groups for parameter in group["params"]]
        scheduler = None
        if self.config.schedule == "cosine":
            steps = self.config.steps
            scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: cosine(step, steps))
        return Player(name, parameters, adam, terms, weights, scheduler)

    def _real(self, random: StepRandom) -> Float[Tensor, "b 3 r r"]:
        chosen = random.epoch_indices(len(self.pictures))
        real = from_bytes(self.pictures[chosen].to(random.device))
        if self.config.data.flip:
            flip = random.uniform("flip") < 0.5
            real = torch.where(flip[:, None, None, None], real.flip(3), real)
        return real

    def _ws(self, random: StepRandom, name: str, count: int) -> Float[Tensor, "b num_ws w_dim"]:
        z = random.normal(name, 2, self.config.model.z_dim)[:count]
        w = self.generator.mapping.w(z[:, 0])
        self.generator.mapping.update_w_avg(process_mean(w.detach().mean(0, keepdim=True)))
        num_ws = self.config.model.num_ws
        ws = w[:, None].expand(-1, num_ws, -1)
        if not self.config.style_mixing:
            return ws
        other = self.generator.mapping.w(z[:, 1])[:, None].expand(-1, num_ws, -1)
        cutoff = 1 + random.integers(f"{name} cutoff", num_ws - 1)[:count]
        mixes = random.uniform(f"{name} mixes")[:count] < self.config.style_mixing
        return mix_styles(ws, other, torch.where(mixes, cutoff, num_ws))

    def _d_terms(self, random: StepRandom) -> Terms:
        _requires_grad(self.modules, *self.modules)
        ws = self._ws(random, "z", random.local_batch)
        pictures = self._real(random)
        if self.encoder is not None:
            ws = self._reconstruct(self.encoder, pictures, ws, random)
        rendered = self.generator.synthesis(ws, noise="random", generator=random.stream("noise"))
        if self.encoder is not None:
            self._compare(rendered, pictures)
        if self.config.spectrum:
            self.generator_terms["spectrum"] = adversarial.spectrum_distance(rendered, pictures)
        self.fake = rendered  # the generator's turn goes on with the same pictures: one rendering saved
        p = self.probability.value
        fake = augment(rendered.detach(), p, random.stream("augment fake"))
        real = augment(pictures, p, random.stream("augment real"))
        regularise = self.config.r1_every > 0 and random.step % self.config.r1_every == 0
        real.requires_grad_(regularise)
        both = torch.cat([fake, real]).contiguous(memory_format=torch.channels_last)
        if regularise:
            fake_logits, real_logits = self.discriminator(fake), self.discriminator(real)
        else:
            fake_logits, real_logits = self._apart(self.discriminator, both)
        terms = {"d_adversarial": adversarial.discriminator_loss(fake_logits, real_logits)}
        if self.projected is not None:
            scales = [logits.chunk(2) for logits in self.projected(both.detach())]
            losses = [adversarial.hinge_discriminator_loss(*pair) for pair in scales]
            terms["d_projected"] = torch.stack(losses).mean()
        if regularise:
            terms["r1"] = adversarial.r1_penalty(real, real_logits)
        self.signs.append(float(process_mean(real_logits.detach().sign().mean())))
        if len(self.signs) == 4:
            self.probability.update(sum(self.signs) / 4, 4 * random.batch)
            self.signs = []
        return terms

    def _reconstruct(
        self, encoder: LatentEncoder, pictures: Tensor, ws: Tensor, random: StepRandom
    ) -> Float[Tensor, "b num_ws w_dim"]:
        """Put the latents of the first pictures in the place of drawn ones."""
        count = random.part(self.config.reconstruction.share, len(pictures), "reconstruction.share")
        found = encoder(pictures[:count])
        self.generator_terms["divergence"] = found.divergence()
        z = found.sample(random.normal("z of pictures", self.config.model.z_dim)[:count])
        own = self.generator.mapping.w(z)[:, None].expand(-1, ws.shape[1], -1)
        return torch.cat([own, ws[count:]])

    def _compare(self, rendered: Tensor, pictures: Tensor) -> None:
        """The terms of the reconstructions, which the generator's turn takes."""
        section = self.config.reconstruction
        count = round(len(pictures) * section.share)
        ours, theirs = rendered[:count].float(), pictures[:count]
        self.generator_terms["l2"] = reconstruction.l2(ours, theirs)
        if section.perceptual and self.projected is not None:
            squeezenet = self.projected.features
            with torch.no_grad():
                target = squeezenet(theirs, section.layers)
            self.generator_terms["perceptual"] = reconstruction.perceptual(
                squeezenet(ours, section.layers), target
            )

    def _g_terms(self, random: StepRandom) -> Terms:
        _requires_grad(self.modules, "generator", "encoder")
        if self.fake is None:
            raise AssertionError("the discriminators' turn comes first and renders the pictures")
        fake = augment(self.fake, self.probability.value, random.stream("augment g"))
        fake = fake.contiguous(memory_format=torch.channels_last)
        terms = {"g_adversarial": adversarial.generator_loss(self.discriminator(fake))}
        if self.projected is not None:
            losses = [adversarial.hinge_generator_loss(logits) for logits in self.projected(fake)]
            terms["g_projected"] = torch.stack(losses).mean()
        terms |= self.generator_terms
        self.fake, self.generator_terms = None, {}
        every = self.config.path_length_every
        due = random.step >= self.config.path_length_after
        if every and due and random.step % every == every // 2:
            terms["path_length"] = self._path_length(random)
        return terms

    def _path_length(self, random: StepRandom) -> Float[Tensor, ""]:
        """Squared distance of the path lengths to their running mean, on half the batch."""
        count = max(1, random.local_batch // 2)
        ws = self._ws(random, "path z", count)
        image = self.generator.synthesis(ws, noise="random", generator=random.stream("path noise"))
        probe = random.normal("path probe", *image.shape[1:])[:count]
        lengths = adversarial.path_lengths(image, ws, probe)
        mean = process_mean(lengths.detach().mean())
        self.path_mean = self.path_mean.lerp(mean, 0.01) if self.path_mean > 0 else mean
        return (lengths - self.path_mean).square().mean()

    @staticmethod
    def _apart(judge: nn.Module, both: Tensor) -> tuple[Tensor, Tensor]:
        fake, real = both.chunk(2)
        return judge(fake), judge(real)

    def state(self) -> dict[str, Any]:
        return {
            "augment_probability": self.probability.value,
            "signs": list(self.signs),
            "path_mean": self.path_mean,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.probability.value = float(state["augment_probability"])
        self.signs = list(state["signs"])
        self.path_mean = state["path_mean"].to(self.path_mean.device)

    def samples(self, averages: Mapping[str, nn.Module]) -> Tensor:
        return averages["generator"](self.sample_z, truncation_psi=0.9).clamp(-1, 1)

    def export(self, averages: Mapping[str, nn.Module], folder: Path, card: dict[str, Any]) -> None:
        """generator.safetensors (averaged, and the judges for fine-tuning); snapshots for curves."""
        generator = averages["generator"]
        tensors = {f"generator.{name}": value for name, value in generator.state_dict().items()}
        checkpoints.save(
            folder / "snapshots" / f"generator-{card['step']:08d}.safetensors",
            checkpoints.to_half(tensors),
            kind="stylegan2",
            config=self.config.model,
            card=card,
        )
        judges = {name: module for name, module in self.modules.items() if name != "generator"}
        judge = {
            f"{name}.{key}": value
            for name, module in judges.items()
            for key, value in module.state_dict().items()
        }
        checkpoints.save(
            folder / "generator.safetensors",
            tensors | judge,
            kind="stylegan2",
            config=self.config.model,
            card=card,
        )


def _with_widths(config: StyleGAN2Config, widths: tuple[int, ...]) -> StyleGAN2Config:
    return dataclasses.replace(config, widths=widths)


def _requires_grad(modules: Mapping[str, nn.Module], *names: str) -> None:
    """Gradients for these networks only; the fixed projections of the projected ones never have any."""
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(name in names and not key.startswith("across_"))


def run(config: GANConfig) -> Path:
    """Train (or go on training) the GAN of this run file; returns the run's folder."""
    if config.batch < 2 or not math.isfinite(config.learning_rate):
        raise ValueError(f"expected a batch of at least 2, got {config.batch}")
    if config.accumulate > 1:
        # The generator's turn goes on with the graph of the pictures that the discriminators' turn drew.
        raise ValueError("a GAN cannot accumulate gradients: leave accumulate at 1, and take a smaller batch")
    return train(config, lambda device: GANTask(config, device))
