"""MambaStyle for callers: invert pictures, edit what comes of it, render it.

inverter = mambastyle.load("kaokore64")
inverted = inverter.invert("face.png")               # encode: Inverted, may be saved
edited = inverter.edit(inverted, {"gender": 1.5})    # move in W+, nothing computed yet
inverter.render(edited).save("edited.png")           # fuse and synthesise: a PIL picture
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mambastyle import checkpoints, hub, images
from mambastyle.api.inputs import Recent, as_list, as_picture, find_device, names_of
from mambastyle.api.methods import MethodName, Search, find_judge
from mambastyle.api.photos import crop, find_squares
from mambastyle.checkpoints import Checkpoint, CheckpointError
from mambastyle.compute import Precision, check_precision, computing_in, freeze
from mambastyle.data import faces
from mambastyle.files import write_whole
from mambastyle.latents.directions import Directions, Edits
from mambastyle.latents.optimise import Judge, Tuned, TunedSynthesis
from mambastyle.models.mambastyle import Inversion, MambaStyle, MambaStyleConfig
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.presets import ModelFiles, find_model

INVERSION_KIND = "inversion"
# Before the names of a tuned generator's tensors in the file of an inversion.
_TUNED = "tuned."
# How many directions keep their branch of the Fuser (256 KiB each at 64 px, 8 MiB each at 1024 px).
CACHED_DIRECTIONS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Inverted:
    """Pictures as a model's latents, edited or not: what `invert` and `edit` give and `render` takes.

    ws: (batch, num_ws, w_dim), what the encoder gave, before the generator's w_avg is added.
    feature: (batch, channels, height, width), the encoder's H, unfused; None for a model without it.
    offset: (batch, num_ws, w_dim), the sum of all edits; edits of edits add up, since H stays as it was.
    names: one per picture, for files and lists.
    model: hash of the encoder and generator that this belongs to.
    single: whether it stands for one picture that was given alone, not in a list.
    tuned: what the method "pti" adds to each tensor of the generator's synthesis, a row per picture; None
        where the generator is the model's own.
    """

    ws: Float[Tensor, "batch num_ws w_dim"]
    feature: Float[Tensor, "batch channels height width"] | None
    offset: Float[Tensor, "batch num_ws w_dim"]
    names: tuple[str, ...]
    model: str
    single: bool = False
    tuned: Tuned | None = None

    @property
    def inversion(self) -> Inversion:
        """The pair (ws, feature) as the encoder gave it."""
        return Inversion(self.ws, self.feature)

    def __len__(self) -> int:
        return len(self.ws)

    def __repr__(self) -> str:
        names = ", ".join(self.names[:4]) + (", ..." if len(self) > 4 else "")
        edited = ", edited" if bool(self.offset.any()) else ""
        return f"Inverted({len(self)} of model {self.model[:8]}: {names}{edited})"

    def __getitem__(self, index: int | slice) -> "Inverted":
        """One picture of the batch, or those of a slice."""
        if isinstance(index, slice):
            return self.select(torch.arange(len(self))[index])
        index = range(len(self))[index]
        return dataclasses.replace(self.select(torch.tensor([index])), single=True)

    def select(self, keep: Tensor) -> "Inverted":
        """Some pictures of the batch: indices, or a mask (batch,)."""
        indices = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        return dataclasses.replace(
            self,
            ws=self.ws[indices],
            feature=None if self.feature is None else self.feature[indices],
            offset=self.offset[indices],
            names=tuple(self.names[index] for index in indices.tolist()),
            single=False,
            tuned=None if self.tuned is None else {name: rows[indices] for name, rows in self.tuned.items()},
        )

    def __iter__(self) -> Iterator["Inverted"]:
        return (self[index] for index in range(len(self)))


def load_inverter(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
    batch_size: int = 16,
) -> "Inverter":
    """As `api.load`, for models that invert alone: CheckpointError for any other."""
    files = find_model(source)
    generator_file = checkpoints.load(files.generator, kind="stylegan2")
    inversion_file = checkpoints.load(files.inversion, kind="mambastyle")
    config = checkpoints.config_from_dict(MambaStyleConfig, inversion_file.config)
    generator_config = checkpoints.config_from_dict(StyleGAN2Config, generator_file.config)
    if config.feature and config.feature_layer < generator_config.num_ws:
        # Where the feature enters is MambaStyle's choice; the generator's tensors do not depend on it.
        generator_config = dataclasses.replace(generator_config, feature_layer=config.feature_layer)
    _check_match(config, generator_config, inversion_file, generator_file)
    # Building fills the weights at random before the file does: the caller's random numbers stay untouched.
    with torch.random.fork_rng():
        generator = checkpoints.fill(
            Generator(generator_config), generator_file.part("generator."), files.generator
        )
        model = checkpoints.fill(MambaStyle(config), inversion_file.tensors, files.inversion)
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
        precision=precision,
        batch_size=batch_size,
        features=files.features,
        files=files,
    )


class Inverter:
    """A frozen generator with its encoder, fuser and directions.

    Pictures come as paths, PIL pictures, arrays or tensors (see images.read), one or a list of them, or a
    batch tensor (batch 3 height width); each is cropped to its middle square and resized to what the encoder
    takes. A model with a frame (cars: 384 x 512) takes and gives pictures in its proportions instead.
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
        precision: Precision = "fp32",
        batch_size: int = 16,
        features: Path | None = None,
        files: ModelFiles | None = None,
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
        self.files = files
        self.batch_size = batch_size
        self.directions = directions
        self.model_hash = model_hash or checkpoints.tensors_hash(
            {f"model.{k}": t for k, t in model.state_dict().items()}
            | {f"generator.{k}": t for k, t in generator.state_dict().items()}
        )
        self.model, self.generator = model, generator
        self.features = features
        self.to(device, precision)
        self.generator.synthesis.keep_kernels()

    def to(self, device: str | torch.device | None = None, precision: Precision | None = None) -> "Inverter":
        """Move the networks to a device (default: an accelerator if there is one), and return the Inverter.

        precision: as for `load`; as before if it is left out. ValueError for what cannot be had, and nothing
        is moved then. Inversions live on the CPU and stay usable.
        """
        place = find_device(device)
        self.precision: Precision = check_precision(precision or self.precision, place)
        self.device = place
        self.model, self.generator = freeze(self.model, place), freeze(self.generator, place)
        self._judge: tuple[str, Judge | None] | None = None
        self._direction_features: Recent[Tensor] = Recent(CACHED_DIRECTIONS)
        return self

    def __repr__(self) -> str:
        return (
            f"Inverter({self.name}: {self.resolution} px, {len(self.directions)} directions, {self.device}, "
            f"{self.precision})"
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        download: bool = False,
        revision: str | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        batch_size: int = 16,
    ) -> "Inverter":
        """`api.load` for what `save_pretrained` wrote, or for a model of the Hugging Face hub (`owner/name`).

        A hub id is taken from huggingface_hub's cache; only `download=True` reaches the network.
        """
        found = hub.locate(source, download=download, revision=revision)
        return load_inverter(found, device=device, precision=precision, batch_size=batch_size)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model as a folder that `load` takes and the hub keeps, with config.json and a model card.

        Weights that are still those of the files it was loaded from are copied byte for byte, so that saved
        inversions stay usable. A README.md that is there already is left alone.
        """
        folder, files = Path(folder), self.files
        paths = [folder / "generator.safetensors", folder / "inversion.safetensors"]
        generator_hash = hub.store(
            paths[0],
            {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()},
            kind="stylegan2",
            config=self.generator.config,
            source=files and files.generator,
        )
        hub.store(
            paths[1],
            self.model.state_dict(),
            kind="mambastyle",
            config=self.model.config,
            source=files and files.inversion,
            card={"generator_sha256": generator_hash},
        )
        if len(self.directions):
            paths.append(folder / "directions.safetensors")
            card = checkpoints.read_header(files.directions).card if files and files.directions else {}
            Directions(self.directions.values(), generator=generator_hash).save(paths[-1], card=card)
        if files and files.features:
            paths.append(folder / "features.safetensors")
            write_whole(paths[-1], files.features.read_bytes())
        hub.describe(
            folder,
            paths,
            name=self.name,
            loads=("inverter", "ms.Inverter.from_pretrained"),
            tags=["mamba", "state-space-model", "stylegan2", "gan-inversion"],
            sources=files.paths if files else [],
        )
        return folder

    @property
    def resolution(self) -> int:
        """Side in pixels of what `render` gives."""
        return self.generator.config.resolution

    @property
    def judge(self) -> tuple[str, Judge | None]:
        """The network that optimisation compares pictures with, and its name; loaded when first asked for."""
        if self._judge is None:
            # Ordinary tensors, also when inference mode asks: gradients go through this network.
            with torch.inference_mode(False):
                self._judge = find_judge(self.features, self.device)
        return self._judge

    def prepare(self, image: Any, side: int | None = None) -> Float[Tensor, "3 side side"]:
        """One picture as the encoder takes it: read, cropped to its middle square, resized.

        side: another one than the encoder's, such as `resolution` for the methods that optimise.
        """
        side = side or self.model.config.image_size
        picture, frame = images.read(image, at_least=side), self.model.config.frame
        square = (
            images.center_crop_square(picture) if frame is None else images.to_framed_square(picture, *frame)
        )
        return images.resize(square, side, side)

    def preview(self, image: Any) -> Image.Image:
        """What the encoder sees of a picture, at the size of what `render` gives, to show beside it."""
        return images.to_pil(images.resize(self.prepare(image), self.resolution, self.resolution))

    @torch.inference_mode()
    def invert(
        self,
        pictures: Any,
        *,
        names: Sequence[str] | None = None,
        method: MethodName = "encoder",
        steps: int | None = None,
        seed: int = 0,
        progress: Callable[[float], object] | None = None,
    ) -> Inverted:
        """Find the latents of pictures, one or many: by the encoder, or as `method` says (api.METHODS).

        names: one per picture; by default the stems of paths, and numbers. steps: of a method that
        optimises, None for its own number. seed: of its noise; the same seed gives the same inversion.
        progress: told as the work goes on how many more pictures, in parts, are done. Raises
        images.ImageError when a picture cannot be read, ValueError for an unknown method.
        """
        search = Search(self.model, self.generator, method, steps, seed)
        if search.optimises:
            search.judge = self.judge[1]
        many, single = as_list(pictures)
        if not many:
            raise images.ImageError("no pictures to invert: give one or more")
        if names is not None and len(names) != len(many):
            raise ValueError(f"{len(names)} names for {len(many)} pictures: give one each")
        found: list[Inversion] = []
        tunings: list[Tuned] = []
        for start in range(0, len(many), self.batch_size):
            part = many[start : start + self.batch_size]
            batch = torch.stack([self.prepare(image, search.side) for image in part])
            # What optimises takes steps too small for bfloat16.
            precision: Precision = "fp32" if search.optimises else self.precision
            with computing_in(precision, self.device):
                inversion, tuned = search.invert(batch.to(self.device), progress)
            found.append(inversion)
            tunings += [] if tuned is None else [tuned]
        ws = torch.cat([inversion.ws for inversion in found]).float().cpu()
        features = [inversion.feature for inversion in found if inversion.feature is not None]
        return Inverted(
            ws=ws,
            feature=torch.cat(features).float().cpu() if features else None,
            offset=torch.zeros_like(ws),
            names=tuple(names) if names is not None else names_of(many),
            model=self.model_hash,
            single=single,
            tuned={name: torch.cat([one[name] for one in tunings]) for name in tunings[0]}
            if tunings
            else None,
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

    def edit_photo(
        self, photo: Any, edits: Edits, *, find_faces: bool = False, landmarks: Any = None
    ) -> Image.Image:
        """A whole photograph, edited where the model can: pasted back with a soft seam, at the photo's size.

        By default that is the middle square. With `find_faces`, every face, aligned as FFHQ does, for models
        that were trained on such faces (extra [faces]). `landmarks` name the faces instead: (points, 2) for
        one or (faces, points, 2), in pixels of the upright picture, x before y; 5 points (eyes, nose, corners
        of the mouth, each from left to right as seen) or the 68 of iBUG 300-W.
        Raises data.faces.FaceError when there is no face, or none that shows both eyes.
        """
        # Before the encoder runs: a mistyped name should not cost a minute.
        resolved = self.directions.resolve(edits)
        picture = as_picture(photo)
        squares = find_squares(picture, find_faces=find_faces, landmarks=landmarks)
        crops = [crop(picture, square, self.model.config.image_size) for square in squares]
        for face, square in zip(self.render(self.edit(crops, resolved)), squares, strict=True):
            picture = faces.paste_back(picture, face, square)
        return picture

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
            with computing_in(self.precision, self.device):
                edited = self.model.edit(encoded, offset, self._direction_feature(offset, feature))
                ws = edited.ws + self.generator.mapping.w_avg
                if inverted.tuned is None:
                    picture = self.generator.synthesis(ws, feature=edited.feature)
                else:
                    tuned = {name: rows[part].to(self.device) for name, rows in inverted.tuned.items()}
                    picture = TunedSynthesis(self.generator.synthesis)(ws, tuned)
            if not bool(torch.isfinite(picture).all()):
                raise images.ImageError(
                    f"the model gives NaN or infinity, {float(offset.abs().max()):.3g} from the inversion: "
                    "edit less strongly"
                )
            rendered.append(picture.float().clamp(-1, 1).cpu())
        batch, frame = torch.cat(rendered), self.model.config.frame
        if frame is not None:
            batch = images.crop_middle(batch, *frame)
        if output == "tensor":
            return batch
        pictures: list[Any] = [images.to_pil(image) for image in batch]
        if output == "numpy":
            pictures = [np.asarray(picture) for picture in pictures]
            return pictures[0] if inverted.single else np.stack(pictures)
        return pictures[0] if inverted.single else pictures

    def save_inversion(
        self, path: str | os.PathLike[str], inverted: Inverted, *, card: Mapping[str, Any] | None = None
    ) -> None:
        """Write what `invert` or `edit` gave as one safetensors file, to be edited again without encoding.

        card: what else to say of it, as JSON can; `checkpoints.read_header` gives it back.
        """
        self._check_model(inverted.model, "this inversion")
        tensors = {"ws": inverted.ws, "offset": inverted.offset}
        if inverted.feature is not None:
            tensors["feature"] = inverted.feature
        tensors |= {f"{_TUNED}{name}": rows for name, rows in (inverted.tuned or {}).items()}
        config: dict[str, Any] = {
            "model": self.model_hash,
            "model_name": self.name,
            "names": inverted.names,
            "single": inverted.single,
        }
        checkpoints.save(path, tensors, kind=INVERSION_KIND, config=config, card=card)

    def load_inversion(self, path: str | os.PathLike[str]) -> Inverted:
        """Read what `save_inversion` wrote; raises CheckpointError when another model made it."""
        saved = checkpoints.load(path, kind=INVERSION_KIND)
        try:
            self._check_model(saved.config["model"], str(path), saved.config["model_name"])
            ws, names = saved.tensors["ws"], tuple(map(str, saved.config["names"]))
            if len(names) != len(ws):
                raise CheckpointError(f"{path} has {len(names)} names for {len(ws)} pictures: invert again")
            return Inverted(
                ws=ws,
                feature=saved.tensors.get("feature"),
                offset=saved.tensors["offset"],
                names=names,
                model=saved.config["model"],
                single=bool(saved.config["single"]),
                tuned=saved.part(_TUNED) or None,
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
            names = names_of(list(value.ws))
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
            make = partial(self.model.fuser.direction_feature, row[None], (height, width))
            rows.append(self._direction_features.get(key, make))
        # One row for all where all agree: the Fuser expands it without copying.
        return rows[0] if all(row is rows[0] for row in rows) else torch.cat(rows)


def _check_match(
    config: MambaStyleConfig,
    generator: StyleGAN2Config,
    inversion_file: Checkpoint,
    generator_file: Checkpoint,
) -> None:
    pairs: list[tuple[str, Any, Any]] = [
        ("num_ws", config.num_ws, generator.num_ws),
        ("w_dim", config.w_dim, generator.w_dim),
    ]
    if config.feature:
        pairs.append(("feature_layer", config.feature_layer, generator.feature_layer))
    if config.feature and generator.feature_layer:
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
