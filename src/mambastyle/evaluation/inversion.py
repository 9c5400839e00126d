"""How well pictures are inverted: the protocol of the paper's table 1, left half, for any set and method.

A method encodes pictures and renders what it encoded, moved by an offset or not; encoders, W+ latents alone
and optimisation of W+ are methods. Perceptual and Frechet distances carry the name of the network that they
were made with.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle import images
from mambastyle.api import Inverter, load
from mambastyle.data.packs import from_bytes, open_pack
from mambastyle.evaluation import metrics
from mambastyle.evaluation.table import Table
from mambastyle.features import small
from mambastyle.features.small import SmallFeatures
from mambastyle.features.squeezenet import SqueezeNetFeatures, find_file
from mambastyle.models.mambastyle import Inversion, MambaStyle
from mambastyle.models.stylegan2 import Generator
from mambastyle.presets import PRESETS

COLUMNS = {
    "method": "method",
    "l2": "L2",
    "ms_ssim": "MS-SSIM",
    "perceptual_squeeze": "perceptual (SqueezeNet)",
    "fd_squeeze": "fd_squeeze",
    "fd_small": "fd_small",
    "milliseconds": "ms per picture",
}


@runtime_checkable
class Method(Protocol):
    """Something that inverts pictures in [-1, 1] of the generator's size."""

    name: str

    def encode(self, image: Float[Tensor, "batch 3 height width"]) -> Inversion:
        """Latents before w_avg is added, and perhaps a feature."""
        ...

    def render(
        self, inversion: Inversion, offset: Float[Tensor, "num_ws w_dim"] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """The picture of an inversion, moved by `offset` in W+ for all pictures alike; clamped to [-1, 1]."""
        ...


@dataclasses.dataclass
class EncoderMethod:
    """A MambaStyle checkpoint; use_feature=False renders its latents alone (W+ only)."""

    name: str
    model: MambaStyle
    generator: Generator
    use_feature: bool = True

    @torch.inference_mode()
    def encode(self, image: Float[Tensor, "batch 3 height width"]) -> Inversion:
        side = self.model.config.image_size
        encoded = self.model.encoder(images.resize(image, side, side))
        return encoded if self.use_feature else Inversion(encoded.ws, None)

    @torch.inference_mode()
    def render(
        self, inversion: Inversion, offset: Float[Tensor, "num_ws w_dim"] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        direction = None if offset is None else offset.to(inversion.ws).expand_as(inversion.ws)
        branch = None
        if direction is not None and self.model.fuser is not None and inversion.feature is not None:
            height, width = inversion.feature.shape[-2:]
            # One direction for all pictures: its branch runs once.
            branch = self.model.fuser.direction_feature(direction[:1], (height, width))
        edited = self.model.edit(inversion, direction, branch)
        ws = edited.ws + self.generator.mapping.w_avg
        return self.generator.synthesis(ws, feature=edited.feature).clamp(-1, 1)


@dataclasses.dataclass
class OptimisationMethod:
    """W+ latents found for each picture by Adam, from w_avg (Abdal et al. 2019, arXiv:1904.03189, section 5).

    Loss: L2 + perceptual_weight * perceptual distance (metrics.perceptual). The losses of a batch are
    summed, and Adam works element by element, so a picture's latents do not depend on its neighbours. The
    learning rate falls to zero over the last quarter of the steps by a cosine.
    """

    name: str
    generator: Generator
    features: SqueezeNetFeatures | None
    steps: int = 500
    learning_rate: float = 0.05
    perceptual_weight: float = 1.0

    def encode(self, image: Float[Tensor, "batch 3 height width"]) -> Inversion:
        w_avg = self.generator.mapping.w_avg
        config = self.generator.config
        ws = torch.zeros(len(image), config.num_ws, config.w_dim, device=image.device, requires_grad=True)
        optimizer = torch.optim.Adam([ws], lr=self.learning_rate)
        quarter = max(1, self.steps // 4)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, quarter)
        with torch.enable_grad():
            for step in range(self.steps):
                optimizer.zero_grad()
                rendered = self.generator.synthesis(ws + w_avg)
                loss = metrics.l2(rendered, image)
                if self.features is not None:
                    distance = metrics.perceptual(self.features, rendered, image)
                    loss = loss + self.perceptual_weight * distance
                loss.sum().backward()
                optimizer.step()
                if step >= self.steps - quarter:
                    fall.step()
        return Inversion(ws.detach(), None)

    @torch.inference_mode()
    def render(
        self, inversion: Inversion, offset: Float[Tensor, "num_ws w_dim"] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        ws = inversion.ws + self.generator.mapping.w_avg
        ws = ws if offset is None else ws + offset.to(ws)
        return self.generator.synthesis(ws).clamp(-1, 1)


@dataclasses.dataclass
class Judges:
    """The networks that distances are made with; a metric whose network is absent is left out."""

    squeeze: SqueezeNetFeatures | None = None
    small: SmallFeatures | None = None

    @classmethod
    def found(cls, features: str | Path | None = None) -> "Judges":
        """SqueezeNet where MAMBASTYLE_SQUEEZENET names it, and the small network by path or of a preset."""
        try:
            squeeze = SqueezeNetFeatures(find_file())
        except ValueError:
            squeeze = None
        packaged = [preset.folder / "features.safetensors" for preset in PRESETS.values()]
        path = features or next((file for file in packaged if file.is_file()), None)
        return cls(squeeze, None if path is None else small.load(path))

    def to(self, device: torch.device) -> "Judges":
        """Both on one device."""
        for network in (self.squeeze, self.small):
            if network is not None:
                network.to(device)
        return self

    def pooled(self, pictures: Float[Tensor, "count 3 height width"]) -> dict[str, Tensor]:
        """Features of a set by the suffix of their metrics: {"squeeze": (count, 512), "small": ...}."""
        networks: dict[str, nn.Module | None] = {"squeeze": self.squeeze, "small": self.small}
        return {
            name: metrics.pooled_features(network, pictures)
            for name, network in networks.items()
            if network is not None
        }


def encode_all(
    method: Method, pictures: Float[Tensor, "count 3 height width"], batch: int = 32
) -> tuple[list[Inversion], float]:
    """Encode a set batch by batch; the inversions, and seconds for encoding and rendering after a warm-up.

    The warm-up (compiling, allocating) is one picture for an encoder; an optimiser runs long enough to need
    none.
    """
    if not isinstance(method, OptimisationMethod):
        method.render(method.encode(pictures[:1]))
    encoded = []
    _synchronise(pictures)
    started = time.perf_counter()
    for part in pictures.split(batch):
        inversion = method.encode(part)
        method.render(inversion)
        encoded.append(inversion)
    _synchronise(pictures)
    return encoded, time.perf_counter() - started


def render_all(
    method: Method, encoded: Iterable[Inversion], offset: Float[Tensor, "num_ws w_dim"] | None = None
) -> Float[Tensor, "count 3 height width"]:
    """The pictures of `encode_all`, moved by an offset or not."""
    return torch.cat([method.render(inversion, offset) for inversion in encoded])


@torch.no_grad()
def distances(
    originals: Float[Tensor, "count 3 height width"],
    rendered: Float[Tensor, "count 3 height width"],
    judges: Judges,
    batch: int = 64,
) -> dict[str, Any]:
    """L2, MS-SSIM and perceptual means with their 95 % bootstrap intervals, Frechet and kernel distances."""
    squeeze = judges.squeeze
    pairs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": metrics.l2, "psnr": metrics.psnr}
    if min(originals.shape[-2:]) >= 11:
        pairs["ms_ssim"] = metrics.ms_ssim
    if squeeze is not None:
        pairs["perceptual_squeeze"] = lambda a, b: metrics.perceptual(squeeze, a, b)
    result: dict[str, Any] = {}
    for name, measure in pairs.items():
        parts = zip(originals.split(batch), rendered.split(batch), strict=True)
        interval = metrics.bootstrap(torch.cat([measure(a, b) for a, b in parts]))
        result[name] = interval.mean
        result[f"{name}_interval"] = [interval.low, interval.high]
    if len(originals) > 1:
        theirs = judges.pooled(rendered)
        for name, ours in judges.pooled(originals).items():
            result[f"fd_{name}"] = metrics.frechet_distance(ours, theirs[name])
            result[f"kd_{name}"] = metrics.kernel_distance(ours, theirs[name])[0]
    return result


def compare(
    originals: Float[Tensor, "count 3 height width"],
    methods: Sequence[Method],
    judges: Judges,
    *,
    data: str = "held-out pictures",
    batch: int = 32,
) -> Table:
    """The inversion table: one row per method, all on the same pictures in [-1, 1]."""
    count, _, height, width = originals.shape
    table = Table(
        f"Inversion of {count} {data}, {height} x {width} px",
        {key: heading for key, heading in COLUMNS.items() if _measurable(key, judges)},
        notes=_notes(height, width),
    )
    for method in methods:
        encoded, seconds = encode_all(method, originals, batch)
        row = {"method": method.name, **distances(originals, render_all(method, encoded), judges)}
        table.rows.append(row | {"milliseconds": 1000 * seconds / count})
    return table


def evaluate(inverter: Inverter, pictures: Sequence[Any], judges: Judges | None = None) -> dict[str, float]:
    """Numbers of one model on any pictures: what `mambastyle evaluate inversion` prints.

    pictures: anything `Inverter.invert` takes, in a list; they are compared at the size that is rendered
    (cropped to their middle square, resized). Keys: those of `distances` without the intervals,
    `milliseconds`, `count`. Metrics whose network is absent are left out: without MAMBASTYLE_SQUEEZENET
    those named squeeze.
    """
    judges = Judges.found() if judges is None else judges
    side = inverter.resolution
    squares = [images.center_crop_square(images.read(picture, at_least=side)) for picture in pictures]
    originals = torch.stack([images.resize(square, side, side) for square in squares])
    inverter.render(inverter.invert(squares[:1]), output="tensor")
    started = time.perf_counter()
    rendered = inverter.render(inverter.invert(squares), output="tensor")
    seconds = time.perf_counter() - started
    values = distances(originals, rendered, judges)
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    return numbers | {"milliseconds": 1000 * seconds / len(originals), "count": float(len(originals))}


def load_method(
    name: str, model: str | Path, *, use_feature: bool = True, device: Any = None
) -> EncoderMethod:
    """A method from a preset or a folder with generator.safetensors and inversion.safetensors."""
    inverter = load(model, device=device)
    return EncoderMethod(name, inverter.model, inverter.generator, use_feature)


def load_faces(
    pack: str | Path, resolution: int, select: Mapping[str, str] | None = None
) -> tuple[Float[Tensor, "count 3 resolution resolution"], list[dict[str, str]]]:
    """The pictures of a pack in [-1, 1] with their rows; by default its test split."""
    chosen = open_pack(pack).select(**({"split": "test"} if select is None else select))
    return from_bytes(chosen.load(resolution, progress=False)), list(chosen.rows)


def run(
    models: Mapping[str, str | Path],
    pack: str | Path,
    *,
    w_plus_only: Iterable[str] = (),
    optimisation_steps: Sequence[int] = (500,),
    count: int | None = None,
    batch: int = 32,
    judges: Judges | None = None,
    device: Any = None,
) -> Table:
    """The inversion table for models on disk on the test split of a pack, beside optimisation of W+.

    models: name -> preset or folder; the first one's generator is optimised in. w_plus_only: names whose
    feature is not rendered. count: the first so many pictures, all by default.
    """
    methods: list[Method] = [
        load_method(name, model, use_feature=name not in set(w_plus_only), device=device)
        for name, model in models.items()
    ]
    first = methods[0]
    if not isinstance(first, EncoderMethod):
        raise AssertionError("load_method gives encoders")
    generator = first.generator
    device = generator.mapping.w_avg.device
    judges = (Judges.found() if judges is None else judges).to(device)
    for steps in optimisation_steps:
        name = f"W+ optimisation, {steps} steps"
        methods.append(OptimisationMethod(name, generator, judges.squeeze, steps=steps))
    faces, _ = load_faces(pack, generator.config.resolution)
    faces = faces[:count].to(device)
    return compare(faces, methods, judges, data=f"test pictures of {Path(pack).stem}", batch=batch)


def _measurable(column: str, judges: Judges) -> bool:
    if column.endswith("_squeeze"):
        return judges.squeeze is not None
    return judges.small is not None if column.endswith("_small") else True


def _notes(height: int, width: int) -> list[str]:
    notes = ["L2: mean squared difference on [-1, 1] (on [0, 1] it is a quarter)."]
    if min(height, width) >= 11:
        scales = metrics.ms_ssim_scales(height, width)
        notes.append(f"MS-SSIM: RGB, Gaussian window 11, {scales} scales (more do not fit), at this size.")
    return [
        *notes,
        "perceptual, fd_squeeze: SqueezeNet 1.0 (ImageNet), neither LPIPS nor FID; fd_small: our own"
        " network.",
        "ms per picture: encoding and rendering, after a warm-up, on the machine of the run.",
    ]


def _synchronise(pictures: Tensor) -> None:
    if pictures.device.type != "cpu":
        torch.accelerator.synchronize(pictures.device)
