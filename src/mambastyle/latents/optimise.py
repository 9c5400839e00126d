"""Inversion by optimisation: latents found by Adam, and a generator tuned around them (PTI).

The projector of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958, appendix D) in W or W+ (Abdal et al. 2019,
arXiv:1904.03189), or going on from what an encoder gave; and pivotal tuning (Roich et al. 2021,
arXiv:2106.05744). Nothing here knows a checkpoint or a file: networks come as arguments, the same seed gives
the same result, and a picture's result does not depend on the others of its batch.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mambastyle.losses import reconstruction
from mambastyle.losses.reconstruction import Maps
from mambastyle.models.mambastyle import Inversion
from mambastyle.models.stylegan2 import Generator, SynthesisNetwork

Judge = Callable[[Tensor], Maps]
"""A frozen network that compares pictures in [-1, 1] by its maps."""
W_SAMPLES = 10_000
# As LPIPS is quoted, and as the projector does: larger pictures are brought to this size for the judge.
_JUDGE_SIZE = 256


@dataclass(frozen=True)
class Projection:
    """How latents are searched; the defaults are the projector's but for the steps and the start's space.

    Its noise maps are not optimised here: the library renders with the generator's fixed noise, so that a
    picture's latents alone say what it is.
    """

    steps: int = 500
    space: Literal["w", "w+"] = "w+"
    learning_rate: float = 0.1
    rampup: float = 0.05
    """The share of the steps over which the learning rate rises, and the last over which it falls."""
    rampdown: float = 0.25
    noise: float = 0.05
    """Noise on w at the start, in units of the spread of W; it falls to zero over `noise_share`."""
    noise_share: float = 0.75
    perceptual_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"optimisation takes 1 step or more, got {self.steps}")

    def learning_rate_at(self, step: int) -> float:
        """A linear rise, a plateau and a cosine to zero."""
        done = step / self.steps
        fall = min(1.0, (1 - done) / self.rampdown) if self.rampdown else 1.0
        rise = min(1.0, done / self.rampup) if self.rampup else 1.0
        return self.learning_rate * (0.5 - 0.5 * math.cos(math.pi * fall)) * rise

    def noise_at(self, step: int) -> float:
        return self.noise * max(0.0, 1 - step / self.steps / self.noise_share) ** 2


REFINEMENT = Projection(steps=100, learning_rate=0.01, noise=0.0)
"""Going on from an encoder's latents: small steps, and no noise that would undo them."""


@dataclass(frozen=True)
class PivotalTuning:
    """How the generator is tuned around a pivot; defaults as the paper's and its code's.

    The paper's locality term looks at a distance of 30 from the pivot in the W of its generator; here the
    distance is the spread of the W at hand. Its threshold on LPIPS, which ends the tuning early, is left out:
    it would tie the result to one network.
    """

    steps: int = 350
    learning_rate: float = 3e-4
    perceptual_weight: float = 1.0
    locality_weight: float = 0.1
    pivot: Projection = Projection(steps=450, space="w")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"tuning takes 1 step or more, got {self.steps}")


Tuned = dict[str, Tensor]
"""What tuning adds to the tensors of `generator.synthesis`, by name: half precision, one row per picture."""


class Spread(NamedTuple):
    """The root mean square of |w - w_avg| over samples, and the samples less w_avg."""

    distance: float
    samples: Float[Tensor, "samples w_dim"]


@torch.no_grad()
def spread_of_w(generator: Generator, seed: int = 0) -> Spread:
    """From 10,000 mapped samples, as the projector has it."""
    stream = torch.Generator().manual_seed(seed)
    z = torch.randn(W_SAMPLES, generator.config.z_dim, generator=stream)
    mapping = generator.mapping
    samples = torch.cat([mapping(part.to(mapping.w_avg.device))[:, 0] for part in z.split(1000)])
    samples = samples - mapping.w_avg
    return Spread(float(samples.square().sum(1).mean().sqrt()), samples)


def optimise_latents(
    generator: Generator,
    image: Float[Tensor, "batch 3 height width"],
    start: Inversion,
    settings: Projection,
    *,
    judge: Judge | None,
    spread: Spread | None = None,
    fuse: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    on_step: Callable[[], object] | None = None,
) -> Inversion:
    """Latents (and the feature, where `start` has one) whose picture is `image`: least L2 + perceptual.

    image: in [-1, 1] at the generator's resolution. start: latents less w_avg. spread: of W, where there is
    noise on w. fuse: what the generator is given for a feature H, such as a fuser at d = 0. In the space "w"
    all layers of a picture share one row. A feature takes steps in proportion to its own root mean square.
    """
    if settings.space == "w" and start.feature is not None:
        raise ValueError("a feature goes with latents in w+: set the space to w+, or leave the feature out")
    if settings.noise and spread is None:
        spread = spread_of_w(generator, seed)
    w_avg = generator.mapping.w_avg
    distance = 0.0 if spread is None else spread.distance
    stream = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        target = _Target.of(image, judge, settings.perceptual_weight)
        rows = start.ws.mean(1, keepdim=True) if settings.space == "w" else start.ws
        rows = rows.detach().clone().requires_grad_()
        searched, feature, unit = [rows], None, torch.ones((), device=rows.device)
        if start.feature is not None:
            # In units of its own size, which Adam's steps are then a part of, picture by picture.
            unit = start.feature.detach().square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-8)
            feature = (start.feature.detach() / unit).requires_grad_()
            searched.append(feature)
        optimizer = torch.optim.Adam(searched, lr=settings.learning_rate)
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            noisy = rows
            if scale := settings.noise_at(step) * distance:
                # The same for every picture, so that its neighbours do not matter.
                noise = torch.randn(rows.shape[1:], generator=stream).to(rows)
                noisy = rows + scale * noise
            ws = w_avg + noisy.expand_as(start.ws)
            added = None if feature is None else feature * unit
            if added is not None and fuse is not None:
                added = fuse(added)
            loss = target.distance(generator.synthesis(ws, added))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if on_step is not None:
                on_step()
    found = rows.detach().expand_as(start.ws).contiguous()
    return Inversion(found, None if feature is None else (feature * unit).detach())


def tune_generator(
    generator: Generator,
    image: Float[Tensor, "1 3 height width"],
    pivot: Float[Tensor, "1 num_ws w_dim"],
    settings: PivotalTuning,
    *,
    judge: Judge | None,
    spread: Spread | None = None,
    seed: int = 0,
    on_step: Callable[[], object] | None = None,
) -> Tuned:
    """What to add to the generator's tensors so that the pivot (less w_avg) gives the picture (section 3.2).

    L2 + perceptual distance of the picture, and the same distance between the tuned and the given generator
    at a random w near the pivot, so that the neighbourhood stays what it was (section 3.3).
    """
    w_avg = generator.mapping.w_avg
    distance, samples = spread or spread_of_w(generator, seed)
    stream = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        tuned = copy.deepcopy(generator.synthesis).requires_grad_(True)
        target = _Target.of(image, judge, settings.perceptual_weight)
        pivot = pivot.detach().clone()
        optimizer = torch.optim.Adam(tuned.parameters(), lr=settings.learning_rate)
        for _ in range(settings.steps):
            chosen = int(torch.randint(len(samples), (1,), generator=stream))
            step = samples[chosen] - pivot
            near = pivot + distance * step / step.norm(dim=-1, keepdim=True).clamp(min=1e-8)
            rendered = tuned(w_avg + torch.cat([pivot, near]))
            with torch.no_grad():
                kept = generator.synthesis(w_avg + near)
            loss = target.distance(rendered[:1])
            if settings.locality_weight:
                neighbour = _Target.of(kept, judge, settings.perceptual_weight)
                loss = loss + settings.locality_weight * neighbour.distance(rendered[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if on_step is not None:
                on_step()
    before = dict(generator.synthesis.named_parameters())
    return {
        name: (value.detach() - before[name]).half()[None].cpu() for name, value in tuned.named_parameters()
    }


class TunedSynthesis:
    """Renders each picture with its own tuned generator, through one copy of the network."""

    def __init__(self, synthesis: SynthesisNetwork) -> None:
        self.given = synthesis
        # Trainable, so that no layer keeps what it computed for another picture's weights.
        with torch.inference_mode(False):
            self.copy = copy.deepcopy(synthesis).requires_grad_(True)

    @torch.no_grad()
    def __call__(
        self, ws: Float[Tensor, "batch num_ws w_dim"], tuned: Tuned
    ) -> Float[Tensor, "batch 3 height width"]:
        given, rendered = dict(self.given.named_parameters()), []
        for index in range(len(ws)):
            for name, parameter in self.copy.named_parameters():
                parameter.copy_(given[name] + tuned[name][index].to(given[name]))
            rendered.append(self.copy(ws[index : index + 1]))
        return torch.cat(rendered)


class _Target(NamedTuple):
    """A picture to reach, with what the judge sees in it, computed once."""

    image: Tensor
    judge: Judge | None
    maps: Maps
    weight: float

    @classmethod
    def of(cls, image: Tensor, judge: Judge | None, weight: float) -> "_Target":
        # A clone: a tensor made in inference mode cannot take part in a graph.
        image = image.detach().clone()
        if judge is None or not weight:
            return cls(image, None, {}, 0.0)
        with torch.no_grad():
            maps = judge(reconstruction.at_size(image, _JUDGE_SIZE))
        return cls(image, judge, maps, weight)

    def distance(self, rendered: Tensor) -> Tensor:
        """L2 + weight * the mean of the perceptual distances of all maps, summed over the pictures."""
        loss = reconstruction.l2(rendered, self.image)
        if self.judge is not None:
            maps = self.judge(reconstruction.at_size(rendered, _JUDGE_SIZE))
            loss = loss + self.weight * reconstruction.perceptual(maps, self.maps) / len(maps)
        return loss * len(rendered)
