"""The facade: load a model, invert pictures, edit what comes of it, render it.

inverter = mambastyle.load("kaokore64")
inverted = inverter.invert("face.png")               # encode: Inverted, may be saved
edited = inverter.edit(inverted, {"gender": 1.5})    # move in W+, nothing computed yet
inverter.render(edited).save("edited.png")           # fuse and synthesise: a PIL picture
"""

import dataclasses
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mambastyle import checkpoints, images
from mambastyle.checkpoints import Checkpoint, CheckpointError
from mambastyle.latents.directions import Directions, Edits
from mambastyle.models.mambastyle import Inversion, MambaStyle, MambaStyleConfig
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.presets import find_model

INVERSION_KIND = "inversion"
# How many directions keep their branch of the Fuser (256 KiB each at 64 px, 8 MiB each at 1024 px).
CACHED_DIRECTIONS = 32
Module = TypeVar("Module", bound=nn.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class Inverted:
    """Pictures as a model's latents, edited or not: what `invert` and `edit` give and `render` takes.

    ws: (batch, num_ws, w_dim), what the encoder gave, before the generator's w_avg is added.
    feature: (batch, channels, height, width), the encoder's H, unfused; None for a model without it.
    offset: (batch, num_ws, w_dim), the sum of all edits; edits of edits add up, since H stays as it was.
    names: one per picture, for files and lists.
    model: hash of the encoder and generator that this belongs to.
    single: whether it stands for one picture that was given alone, not in a list.
    """

    ws: Float[Tensor, "batch num_ws w_dim"]
    feature: Float[Tensor, "batch channels height width"] | None
    offset: Float[Tensor, "batch num_ws w_dim"]
    names: tuple[str, ...]
    model: str
    single: bool = False

    @property
    def inversion(self) -> Inversion:
        """The pair (ws, feature) as the encoder gave it."""
        return Inversion(self.ws, self.feature)

    def __len__(self) -> int:
        return len(self.ws)

    def __getitem__(self, index: int) -> "Inverted":
        """One picture of the batch."""
        index = range(len(self))[index]
        part = slice(index, index + 1)
        feature = None if self.feature is None else self.feature[part]
        return dataclasses.replace(
            self,
            ws=self.ws[part],
            feature=feature,
            offset=self.offset[part],
            names=self.names[part],
            single=True,
        )

    def __iter__(self) -> Iterator["Inverted"]:
        return (self[index] for index in range(len(self)))


def load(
    source: str | os.PathLike[str], *, device: str | torch.device | None = None, batch_size: int = 16
) -> "Inverter":
    """Load a preset by name, or a model from a folder with generator.safetensors and inversion.safetensors.

    `device` is by default the accelerator where there is one, else the CPU; `batch_size` pictures run at
    once. Raises checkpoints.CheckpointError when something is missing, damaged, or does not belong together.
    """
    files = find_model(source)
    generator_file = checkpoints.load(files.generator, kind="stylegan2")
    inversion_file = checkpoints.load(files.inversion, kind="mambastyle")
    config = checkpoints.config_from_dict(MambaStyleConfig, inversion_file.config)
    generator_config = checkpoints.config_from_dict(StyleGAN2Config, generator_file.config)
    if config.feature_layer < generator_config.num_ws:
        # Where the feature enters is MambaStyle's choice; the generator's tensors do not depend on it.
        generator_config = dataclasses.replace(generator_config, feature_layer=config.feature_layer)
    _check_match(config, generator_config, inversion_file, generator_file)
    # Building fills the weights at random before the file does: the caller's random numbers stay untouched.
    with torch.random.fork_rng():
        generator = _fill(Generator(generator_config), generator_file.part("generator."), files.generator)
        model = _fill(MambaStyle(config), inversion_file.tensors, files.inversion)
    directions = Directions() if files.directions is None else Directions.load(files.directions)
    if directions.generator not in (None, generator_file.sha256):
        raise CheckpointError(
            f"{files.directions} was discovered in another generator than {files.generator}: discover the "
            "directions again with `mambastyle directions discover`"
        )
    return Inverter(
        model,
        generator,
        directions,
        name=files.name,
        model_hash=hashlib.sha256((generator_file.sha256 + inversion_file.sha256).encode()).hexdigest(),
        device=device,
        batch_size=batch_size,
    )


class Inverter:
    """A frozen generator with its encoder, fuser and directions.

    Pictures come as paths, PIL pictures, arrays or tensors (see images.read), one or a list of them, or a
    batch tensor (batch 3 height width); each is cropped to its middle square and resized
    to what the encoder takes.
    """

    def __init__(
        self,
        model: MambaStyle,
        generator: Generator,
        directions: Directions,
        *,
        name: str = "model",
        model_hash: str | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
        shape = (generator.config.num_ws, generator.config.w_dim)
        for direction in directions.values():
            if direction.vector.shape != shape:
                raise CheckpointError(
                    f"the direction {direction.name!r} is {tuple(direction.vector.shape)}, the generator has "
                    f"latents of {shape}: discover the directions in this generator"
                )
        self.name = name
        self.batch_size = batch_size
        self.directions = directions
        self.model_hash = model_hash or checkpoints.tensors_hash(
            {f"model.{k}": t for k, t in model.state_dict().items()}
            | {f"generator.{k}": t for k, t in generator.state_dict().items()}
        )
        self.device = _device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.generator = generator.to(self.device).eval().requires_grad_(False)
        self._direction_features: OrderedDict[tuple[bytes, tuple[int, int]], Tensor] = OrderedDict()

    @property
    def resolution(self) -> int:
        """Side in pixels of what `render` gives."""
        return self.generator.config.resolution

    def prepare(self, image: Any) -> Float[Tensor, "3 side side"]:
        """One picture as the encoder takes it: read, cropped to its middle square, resized."""
        side = self.model.config.image_size
        square = images.center_crop_square(images.read(image, at_least=side))
        return images.resize(square, side, side)

    @torch.inference_mode()
    def invert(self, pictures: Any, *, names: Sequence[str] | None = None) -> Inverted:
        """Encode pictures, one or many.

        `names` (one per picture) default to the stems of paths and to numbers. Raises images.ImageError when
        a picture cannot be read.
        """
        many, single = _as_list(pictures)
        if not many:
            raise images.ImageError("no pictures to invert: give one or more")
        if names is not None and len(names) != len(many):
            raise ValueError(f"{len(names)} names for {len(many)} pictures: give one each")
        encoded = []
        for start in range(0, len(many), self.batch_size):
            batch = torch.stack([self.prepare(image) for image in many[start : start + self.batch_size]])
            encoded.append(self.model.encoder(batch.to(self.device)))
        ws = torch.cat([inversion.ws for inversion in encoded]).cpu()
        features = [inversion.feature for inversion in encoded if inversion.feature is not None]
        return Inverted(
            ws=ws,
            feature=torch.cat(features).cpu() if features else None,
            offset=torch.zeros_like(ws),
            names=tuple(names) if names is not None else _names(many),
            model=self.model_hash,
            single=single,
        )

    def edit(self, pictures: Any, edits: Edits) -> Inverted:
        """Move pictures, or what `invert` or `edit` gave, along directions.

        `edits` is {"gender": 1.5}, or pairs [("gender", 1.5), (direction, -1)] of names or Direction objects.
        Raises latents.directions.DirectionError for an unknown name (naming the nearest) or a bad strength.
        """
        # Before the encoder runs: a mistyped name should not cost a minute.
        resolved = self.directions.resolve(edits)
        inverted = self._as_inverted(pictures)
        offset = inverted.offset
        for direction, strength in resolved:
            offset = direction.apply(offset, strength)
        return dataclasses.replace(inverted, offset=offset)

    @overload
    def render(self, inverted: Any, *, output: Literal["pil"] = "pil") -> Any: ...

    @overload
    def render(self, inverted: Any, *, output: Literal["tensor"]) -> Tensor: ...

    @torch.inference_mode()
    def render(self, inverted: Any, *, output: Literal["pil", "numpy", "tensor"] = "pil") -> Any:
        """The pictures of what `invert` or `edit` gave: fuse H with the offset, then synthesise.

        "pil": a PIL picture, or a list of them when a list was inverted; "numpy": (height width 3) uint8 or a
        batch of them; "tensor": always (batch 3 height width), on the CPU, clamped to [-1, 1].
        """
        if output not in ("pil", "numpy", "tensor"):
            raise ValueError(f"output is {output!r}, expected 'pil', 'numpy' or 'tensor'")
        inverted = self._as_inverted(inverted)
        rendered = []
        for start in range(0, len(inverted), self.batch_size):
            part = slice(start, start + self.batch_size)
            feature = None if inverted.feature is None else inverted.feature[part].to(self.device)
            encoded = Inversion(inverted.ws[part].to(self.device), feature)
            offset = inverted.offset[part].to(self.device)
            edited = self.model.edit(encoded, offset, self._direction_feature(offset, feature))
            ws = edited.ws + self.generator.mapping.w_avg
            rendered.append(self.generator.synthesis(ws, feature=edited.feature).clamp(-1, 1).cpu())
        batch = torch.cat(rendered)
        if output == "tensor":
            return batch
        pictures: list[Any] = [images.to_pil(image) for image in batch]
        if output == "numpy":
            pictures = [np.asarray(picture) for picture in pictures]
            return pictures[0] if inverted.single else np.stack(pictures)
        return pictures[0] if inverted.single else pictures

    def save_inversion(self, path: str | os.PathLike[str], inverted: Inverted) -> None:
        """Write what `invert` or `edit` gave as one safetensors file, to be edited again without encoding."""
        self._check_model(inverted.model, "this inversion")
        tensors = {"ws": inverted.ws, "offset": inverted.offset}
        if inverted.feature is not None:
            tensors["feature"] = inverted.feature
        config = {"model": self.model_hash, "model_name": self.name, "names": inverted.names}
        checkpoints.save(path, tensors, kind=INVERSION_KIND, config=config | {"single": inverted.single})

    def load_inversion(self, path: str | os.PathLike[str]) -> Inverted:
        """Read what `save_inversion` wrote; raises CheckpointError when another model made it."""
        saved = checkpoints.load(path, kind=INVERSION_KIND)
        try:
            self._check_model(saved.config["model"], str(path), saved.config["model_name"])
            return Inverted(
                ws=saved.tensors["ws"],
                feature=saved.tensors.get("feature"),
                offset=saved.tensors["offset"],
                names=tuple(saved.config["names"]),
                model=saved.config["model"],
                single=bool(saved.config["single"]),
            )
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error}: invert the picture again") from error

    def _check_model(self, found: str, what: str, name: str = "another one") -> None:
        if found != self.model_hash:
            raise CheckpointError(
                f"{what} was made by another model ({name}, {found[:8]}; this is {self.name}, "
                f"{self.model_hash[:8]}): load that model, or invert the picture again"
            )

    def _as_inverted(self, value: Any) -> Inverted:
        if isinstance(value, Inverted):
            self._check_model(value.model, "this inversion")
            return value
        if isinstance(value, Inversion):
            names = _names(list(value.ws))
            return Inverted(value.ws, value.feature, torch.zeros_like(value.ws), names, self.model_hash)
        return self.invert(value)

    def _direction_feature(self, offset: Tensor, feature: Tensor | None) -> Tensor | None:
        """The Fuser's direction branch for each row of `offset`, each different one computed once."""
        if self.model.fuser is None or feature is None:
            return None
        height, width = feature.shape[-2:]
        rows = []
        for row in offset:
            key = (row.cpu().numpy().tobytes(), (height, width))
            if key not in self._direction_features:
                self._direction_features[key] = self.model.fuser.direction_feature(row[None], (height, width))
                if len(self._direction_features) > CACHED_DIRECTIONS:
                    self._direction_features.popitem(last=False)
            self._direction_features.move_to_end(key)
            rows.append(self._direction_features[key])
        # One row for all where all agree: the Fuser expands it without copying.
        return rows[0] if all(row is rows[0] for row in rows) else torch.cat(rows)


def _as_list(pictures: Any) -> tuple[list[Any], bool]:
    """Pictures as a list, and whether it was one alone."""
    if isinstance(pictures, Tensor | np.ndarray) and pictures.ndim == 4:
        return list(pictures), False
    if isinstance(pictures, Tensor | np.ndarray | Image.Image | str | os.PathLike | bytes):
        return [pictures], True
    if isinstance(pictures, Iterable):
        return list(pictures), False
    return [pictures], True


def _names(pictures: Iterable[Any]) -> tuple[str, ...]:
    return tuple(
        Path(picture).stem if isinstance(picture, str | os.PathLike) else f"{index:04d}"
        for index, picture in enumerate(pictures)
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.empty(0).device
    try:
        # Allocating is the only sure test: a device may be known by name and absent.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {str(device)!r} cannot be used ({reason}): leave it out") from error


def _check_match(
    config: MambaStyleConfig,
    generator: StyleGAN2Config,
    inversion_file: Checkpoint,
    generator_file: Checkpoint,
) -> None:
    pairs: list[tuple[str, Any, Any]] = [
        ("num_ws", config.num_ws, generator.num_ws),
        ("w_dim", config.w_dim, generator.w_dim),
        ("feature_layer", config.feature_layer, generator.feature_layer),
    ]
    if generator.feature_layer:
        channels, size = generator.layer_shape(generator.feature_layer)
        pairs += [
            ("feature_channels", config.feature_channels, channels),
            ("feature size", config.feature_size, size),
        ]
    trained_with = inversion_file.card.get("generator_sha256")
    if trained_with is not None:
        pairs.append(("generator_sha256", trained_with[:8], generator_file.sha256[:8]))
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise CheckpointError(
                f"{inversion_file.path} was trained for another generator than {generator_file.path} "
                f"({name} {ours} against {theirs}): put the two that belong together in one folder"
            )


def _fill(module: Module, tensors: dict[str, Tensor], path: Path) -> Module:
    """Copy tensors (of any float type) into a module; CheckpointError unless names and shapes agree."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if wrong:
        first = min(wrong)
        raise CheckpointError(
            f"{path} does not fit its own config in {len(wrong)} of {len(wanted)} tensors ({first}: expected "
            f"{wanted.get(first, 'none')}, got {found.get(first, 'none')}): make it again"
        )
    module.load_state_dict(tensors)
    return module
