"""The ways to invert a picture, by name: one interface over the encoder and over optimisation."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mambastyle import images
from mambastyle.checkpoints import nearest
from mambastyle.features import small
from mambastyle.features.squeezenet import PERCEPTUAL_LAYERS, SqueezeNetFeatures, is_known
from mambastyle.latents import optimise
from mambastyle.latents.optimise import Judge, PivotalTuning, Projection, Spread, Tuned
from mambastyle.models.mambastyle import Inversion, MambaStyle
from mambastyle.models.stylegan2 import Generator

MethodName = Literal["encoder", "optimise", "pti", "encoder+optimise", "mean-w"]
METHODS: Mapping[MethodName, str] = MappingProxyType(
    {
        "encoder": "one forward pass",
        "optimise": "latents in W+ by Adam from the average, without the encoder (StyleGAN2's projector)",
        "pti": "a pivot in W, then the generator tuned around it, one copy per picture (Roich et al. 2021)",
        "encoder+optimise": "what the encoder gave, improved by Adam",
        "mean-w": "the generator's average for every picture: the floor",
    }
)


def optimises(method: str) -> bool:
    """Whether a method takes steps and seconds a picture, and not one pass."""
    return method not in ("encoder", "mean-w")


def check_method(method: str, steps: int | None = None) -> None:
    """ValueError for a way to invert that is not there, or for steps that it does not take."""
    if method not in METHODS:
        near = nearest(method, METHODS)
        hint = f"did you mean {near!r}?" if near else f"choose among {', '.join(METHODS)}"
        raise ValueError(f"no method {method!r}: {hint}")
    if steps is not None and not optimises(method):
        raise ValueError(f"the method {method!r} takes no steps: leave them out")
    if steps is not None and steps < 1:
        raise ValueError(f"{steps} steps, expected 1 or more")


@dataclasses.dataclass
class Search:
    """One method with its settings, on the networks of one model; `invert` takes a batch.

    steps: of the optimisation, None for the method's own number; of "pti" in both of its stages.
    judge: the frozen network that compares pictures beside L2, or None for L2 alone.
    """

    model: MambaStyle
    generator: Generator
    method: MethodName = "encoder"
    steps: int | None = None
    seed: int = 0
    judge: Judge | None = None
    _spread: Spread | None = None

    def __post_init__(self) -> None:
        check_method(self.method, self.steps)

    @property
    def optimises(self) -> bool:
        """Whether it takes steps, and so a judge and the picture at the generator's resolution."""
        return optimises(self.method)

    @property
    def side(self) -> int:
        """Height and width of the pictures that `invert` takes."""
        encoder, generator = self.model.config.image_size, self.generator.config.resolution
        return max(encoder, generator) if self.optimises else encoder

    def invert(
        self,
        image: Float[Tensor, "batch 3 side side"],
        progress: Callable[[float], object] | None = None,
    ) -> tuple[Inversion, Tuned | None]:
        """The inversion of a batch, and what "pti" adds to the generator.

        progress: told after every step how many pictures, in parts, are further done.
        """
        encoder, generator = self.model.config.image_size, self.generator.config.resolution
        if self.method == "mean-w":
            config = self.generator.config
            found = Inversion(image.new_zeros(len(image), config.num_ws, config.w_dim), None)
        elif self.method == "encoder":
            found = self.model.encoder(images.resize(image, encoder, encoder))
        else:
            target = images.resize(image, generator, generator)
            if self.method == "optimise":
                return self._project(target, self._with_steps(Projection()), progress), None
            if self.method == "pti":
                return self._pivot_and_tune(target, progress)
            start = self.model.encoder(images.resize(image, encoder, encoder))
            return self._project(target, self._with_steps(optimise.REFINEMENT), progress, start), None
        if progress is not None:
            progress(len(image))
        return found, None

    def _project(
        self,
        target: Tensor,
        settings: Projection,
        progress: Callable[[float], object] | None,
        start: Inversion | None = None,
        share: float = 1.0,
    ) -> Inversion:
        """Optimised latents; `share` is the part of the whole work that this is."""
        config, part = self.generator.config, share * len(target) / settings.steps
        if start is None:
            start = Inversion(target.new_zeros(len(target), config.num_ws, config.w_dim), None)
        return optimise.optimise_latents(
            self.generator,
            target,
            start,
            settings,
            judge=self.judge,
            spread=self._spread_of_w() if settings.noise else None,
            fuse=self._fuse,
            seed=self.seed,
            on_step=_telling(progress, part),
        )

    def _pivot_and_tune(
        self, target: Tensor, progress: Callable[[float], object] | None
    ) -> tuple[Inversion, Tuned]:
        """The pivots of a batch together, then one generator after another."""
        settings = PivotalTuning()
        settings = dataclasses.replace(
            settings, steps=self.steps or settings.steps, pivot=self._with_steps(settings.pivot)
        )
        pivot = self._project(target, settings.pivot, progress, share=0.2)
        tuned = [
            optimise.tune_generator(
                self.generator,
                target[index : index + 1],
                pivot.ws[index : index + 1],
                settings,
                judge=self.judge,
                spread=self._spread_of_w(),
                seed=self.seed,
                on_step=_telling(progress, 0.8 / settings.steps),
            )
            for index in range(len(target))
        ]
        return pivot, {name: torch.cat([one[name] for one in tuned]) for name in tuned[0]}

    def _fuse(self, feature: Tensor) -> Tensor:
        """F for no edit, which is what an inversion shows."""
        zero = feature.new_zeros(len(feature), self.generator.config.num_ws, self.generator.config.w_dim)
        fused = self.model.edit(Inversion(zero, feature)).feature
        if fused is None:
            raise AssertionError("a feature was given")
        return fused

    def _with_steps(self, settings: Projection) -> Projection:
        return dataclasses.replace(settings, steps=self.steps or settings.steps)

    def _spread_of_w(self) -> Spread:
        if self._spread is None:
            self._spread = optimise.spread_of_w(self.generator, self.seed)
        return self._spread


def _telling(progress: Callable[[float], object] | None, part: float) -> Callable[[], object] | None:
    """What tells of one step, which is `part` of a picture."""
    return None if progress is None else lambda: progress(part)


def find_judge(features: Path | None, device: torch.device) -> tuple[str, Judge | None]:
    """What compares pictures during optimisation, and its name.

    SqueezeNet where MAMBASTYLE_SQUEEZENET names its file, else the model's own small network, else L2 alone.
    """
    if is_known():
        squeezenet = SqueezeNetFeatures().to(device)
        return "L2 and SqueezeNet", lambda image: squeezenet(image, PERCEPTUAL_LAYERS)
    if features is not None:
        return f"L2 and {features.name}", small.load(features).to(device)
    return "L2", None
