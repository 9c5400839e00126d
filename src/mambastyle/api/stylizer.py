"""Style transfer for callers: any photograph in the manner of any painting, of any and different sizes.

stylizer = mambastyle.load("samam-small")
stylizer.stylize("photo.jpg", "painting.jpg").save("stylized.png")
"""

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mambastyle import checkpoints, hub, images
from mambastyle.api.inputs import Recent, as_list, find_device
from mambastyle.api.memory import room_for
from mambastyle.compute import Precision, check_precision, computing_in, freeze
from mambastyle.models.mamba_st import MambaST, MambaSTConfig
from mambastyle.models.samam import SaMam, SaMamConfig
from mambastyle.presets import StylizerFile, find_stylizer

# Up to 2 MiB each in mamba-st-small and 8 MiB in the published Mamba-ST; SaMam's are a few KiB.
CACHED_STYLES = 64
STYLE_SIDE = 512
"""Larger styles are reduced to the area of a square of this side: more pixels add nothing but time."""
STRONGEST = 1.5
_FEATHER = 1 / 128  # deviation of a mask's soft edge over the picture's short side


class StylizeWarning(UserWarning):
    """Something that was done otherwise than asked: weights that were normalised, a mask that is empty."""


class Draws(NamedTuple):
    """From which seed grain and Mamba-ST's shuffles are drawn, and how many of the latter are averaged."""

    seed: int
    average: int


def load_stylizer(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
) -> "Stylizer":
    """As `api.load`, for models that stylize alone: CheckpointError for any other."""
    file = find_stylizer(source)
    checkpoint = checkpoints.load(file.path)
    # Building fills the weights at random before the file does: the caller's random numbers stay untouched.
    with torch.random.fork_rng():
        network: SaMam | MambaST
        if checkpoint.kind == "samam":
            network = SaMam(checkpoints.config_from_dict(SaMamConfig, checkpoint.config))
        else:
            network = MambaST(checkpoints.config_from_dict(MambaSTConfig, checkpoint.config))
    checkpoints.fill(network, checkpoint.tensors, file.path)
    return Stylizer(network, name=file.name, device=device, precision=precision, file=file)


class Stylizer:
    """A frozen SaMam or Mamba-ST, and the styles it has seen.

    Pictures come as paths, PIL pictures, arrays or tensors (see images.read), one or a list of them, and come
    back in exactly their size. What depends on a style alone is computed once for each style.
    """

    def __init__(
        self,
        network: SaMam | MambaST,
        *,
        name: str = "model",
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        file: StylizerFile | None = None,
    ) -> None:
        self.name = name
        self.file = file
        self.network = network
        self.to(device, precision)

    def to(self, device: str | torch.device | None = None, precision: Precision | None = None) -> "Stylizer":
        """Move the network to a device (default: an accelerator if there is one), and return the Stylizer.

        precision: as for `load`; as before if it is left out. ValueError for what cannot be had, and nothing
        is moved then.
        """
        place = find_device(device)
        self.precision: Precision = check_precision(precision or self.precision, place)
        self.device = place
        self.network = freeze(self.network, place)
        self._codes: Recent[Tensor] = Recent(CACHED_STYLES)
        return self

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        download: bool = False,
        revision: str | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
    ) -> "Stylizer":
        """`api.load` for what `save_pretrained` wrote, or for a model of the Hugging Face hub (`owner/name`).

        A hub id is taken from huggingface_hub's cache; only `download=True` reaches the network.
        """
        found = hub.locate(source, download=download, revision=revision)
        return load_stylizer(found, device=device, precision=precision)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model as a folder that `load` takes and the hub keeps, with config.json and a model card.

        Weights that are still those of the file it was loaded from are copied byte for byte. A README.md that
        is there already is left alone.
        """
        folder = Path(folder)
        kind = "samam" if isinstance(self.network, SaMam) else "mamba-st"
        path = folder / f"{kind}.safetensors"
        hub.store(
            path,
            self.network.state_dict(),
            kind=kind,
            config=self.network.config,
            source=self.file and self.file.path,
        )
        hub.describe(
            folder,
            [path],
            name=self.name,
            loads=("stylizer", "ms.Stylizer.from_pretrained"),
            tags=["mamba", "state-space-model", "style-transfer"],
            sources=[self.file.path] if self.file else [],
        )
        return folder

    @torch.inference_mode()
    def stylize(
        self,
        content: Any,
        style: Any = None,
        *,
        strength: float = 1.0,
        keep_color: bool = False,
        styles: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        mask: Any = None,
        seed: int = 0,
        average: int = 1,
        output: Literal["pil", "numpy", "tensor"] = "pil",
    ) -> Any:
        """Photographs in the manner of a style, or of several mixed.

        content, style: one picture or a list; one style serves all contents, a list is one for each (and one
        content with a list of styles comes back once for each).
        strength: 0 is the photo itself, 1 what the network gives, up to 1.5 more than that. In between, the
        network's map is moved from that of the photo in its own style to that of the photo in this style, so
        that strokes and colours grow together, and what the network cannot redraw of the photo fades out.
        keep_color: the lightness of the stylized picture with the colours of the photo.
        styles, weights: several styles instead of one, mixed by weights (default: equal ones; normalised to
        a sum of 1 with a StylizeWarning). SaMam mixes the codes of the styles, Mamba-ST the maps that its
        decoder draws, at the cost of a pass for each style.
        mask: where to stylize: a picture that is white there, and black or transparent elsewhere (or an array
        or tensor (height width), 0 to 1 or bool); resized to the photo, with a soft edge. With `styles`, a
        list of masks, one for each, gives each its own region; where several overlap they share, and where
        none is, the photo stays.
        seed: of Mamba-ST's shuffles, and of the fine noise that a network with `grain` in its config gets
        with the photo; the same for all pictures of a call.
        average: of so many of Mamba-ST's shuffles the mean is painted: smoother, less of it chance, and the
        ST decoder (a third of the time in mamba-st-small) runs so many times.
        output: "pil", "numpy" (height width 3) uint8, or "tensor" (3 height width) in [-1, 1] on the CPU; one
        for one content and style, otherwise a list.

        The whole picture is scanned at once, so there are no tiles and no seams. Raises ValueError for
        options that make no sense and for a picture that memory will not hold, images.ImageError for one that
        cannot be read.
        """
        if output not in ("pil", "numpy", "tensor"):
            raise ValueError(f"output is {output!r}, expected 'pil', 'numpy' or 'tensor'")
        check_strength(strength)
        if average < 1:
            raise ValueError(f"average is {average!r}, expected 1 or more shuffles")
        draws = Draws(seed, average)
        contents, single = as_list(content)
        if not contents:
            raise images.ImageError("no pictures to stylize: give one or more")
        shares = check_weights(styles, weights)
        masks = _check_masks(mask, styles)
        if (style is None) == (styles is None):
            raise ValueError("give either style (one picture, or one for each content) or styles (to mix)")
        if styles is not None:
            codes = [self.style_code(picture) for picture in styles]
            jobs = [(picture, codes) for picture in contents]
        else:
            given, single_style = as_list(style)
            if 1 not in (len(contents), len(given)) and len(given) != len(contents):
                raise ValueError(
                    f"{len(given)} styles for {len(contents)} contents: give one, or one for each"
                )
            singles = [[self.style_code(picture)] for picture in given]
            count = max(len(contents), len(singles))
            jobs = list(zip(_repeat(contents, count), _repeat(singles, count), strict=True))
            single = single and single_style
        made = [
            _as_output(self._one(picture, codes, shares, strength, keep_color, masks, draws), output)
            for picture, codes in jobs
        ]
        return made[0] if single else made

    @torch.inference_mode()
    def style_code(self, style: Any) -> Tensor:
        """What the network needs to know of a style, from the picture or from an earlier call."""
        image = prepare_style(style)
        key = hashlib.sha256(repr(image.shape).encode() + image.cpu().numpy().tobytes()).digest()

        def encode() -> Tensor:
            with computing_in(self.precision, self.device):
                return self.network.encode_style(image[None].to(self.device))

        return self._codes.get(key, encode)

    def _one(
        self,
        content: Any,
        codes: list[Tensor],
        shares: list[float],
        strength: float,
        keep_color: bool,
        masks: list[Any],
        draws: Draws,
    ) -> Float[Tensor, "3 height width"]:
        """One content: the styles mixed, or where there is a mask for each, each in its region."""
        photo = images.read(content).to(self.device)
        height, width = photo.shape[1:]
        if strength == 0:
            return photo

        def stylized(codes: list[Tensor], shares: list[float]) -> Tensor:
            room = room_for(self.network, height, width, self.device)
            with room, computing_in(self.precision, self.device):
                picture = self._stylized(photo, codes, shares, strength, draws)
            return keep_colours(picture, photo) if keep_color else picture

        if not masks:
            return stylized(codes, shares)
        regions = torch.stack([read_mask(mask, height, width) for mask in masks]).to(self.device)
        if not regions.any():
            warnings.warn("the mask is empty: nothing is stylized", StylizeWarning, stacklevel=4)
            return photo
        regions = regions / regions.sum(0).clamp(min=1)
        each = [(codes, shares)] if len(masks) == 1 else [([code], [1.0]) for code in codes]
        picture = photo.clone()
        for region, (some, their_shares) in zip(regions, each, strict=True):
            if region.any():
                picture += region * (stylized(some, their_shares) - photo)
        return picture

    def _stylized(
        self, photo: Float[Tensor, "3 height width"], codes: list[Tensor], shares: list[float],
        strength: float, draws: Draws,
    ) -> Float[Tensor, "3 height width"]:  # fmt: skip
        """The network's picture, weaker or stronger than it comes; clamped."""
        network = self.network
        height, width = photo.shape[1:]
        random = torch.Generator().manual_seed(draws.seed)
        content = images.add_grain(photo, network.config.grain, random)[None]
        mapped = self._transfer(content, codes, shares, draws)
        if strength == 1:
            return network.paint(mapped, height, width)[0].float().clamp_(-1, 1)
        own = network.encode_style(prepare_style(photo)[None].to(self.device))
        reference = self._transfer(content, [own], [1.0], draws)
        picture = network.paint(torch.lerp(reference, mapped, strength), height, width)[0].float()
        if strength < 1:
            picture += (1 - strength) * (photo - network.paint(reference, height, width)[0])
        return picture.clamp_(-1, 1)

    def _transfer(
        self, content: Tensor, codes: list[Tensor], shares: list[float], draws: Draws
    ) -> Float[Tensor, "1 dim rows columns"]:
        """The content's map in one style, or between several."""
        if isinstance(self.network, SaMam):
            return self.network.transfer(content, self.network.mix_styles(codes, shares))
        # Mamba-ST has no code to mix. With each style's share of the tokens in one shuffle, pictures were
        # spotted with both; the mean of the maps is clean.
        mixed: Tensor | None = None
        for code, share in zip(codes, shares, strict=True):
            if share:
                random = torch.Generator().manual_seed(draws.seed)
                mapped = self.network.transfer(content, code, generator=random, average=draws.average)
                mapped = mapped.mul_(share)
                mixed = mapped if mixed is None else mixed.add_(mapped)
        assert mixed is not None  # shares sum to 1
        return mixed


def prepare_style(style: Any) -> Float[Tensor, "3 height width"]:
    """A style as it is encoded: read, and when it is larger than STYLE_SIDE², reduced to this area."""
    image = images.read(style, at_least=STYLE_SIDE)
    height, width = image.shape[1:]
    scale = STYLE_SIDE / math.sqrt(height * width)
    if scale >= 1:
        return image
    return images.resize(image, max(1, round(height * scale)), max(1, round(width * scale)))


def keep_colours(
    stylized: Float[Tensor, "3 height width"], photo: Float[Tensor, "3 height width"]
) -> Float[Tensor, "3 height width"]:
    """The luma of one picture with the chroma of another (ITU-R BT.601), in [-1, 1].

    Where both together are no colour that can be shown, the chroma is reduced and the hue kept.
    """
    luma = _luma(stylized)
    chroma = photo - _luma(photo)
    room = torch.where(chroma > 0, 1 - luma, 1 + luma)
    # How far each channel may go, over how far it would.
    factor = (room / chroma.abs().clamp(min=1e-6)).amin(0, keepdim=True).clamp(0, 1)
    return (luma + factor * chroma).clamp(-1, 1)


def read_mask(mask: Any, height: int, width: int) -> Float[Tensor, "1 {height} {width}"]:
    """A mask as 0 (outside) to 1 at a picture's size, with an edge about as soft as a 30th of the picture.

    What is transparent lies outside.
    """
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().numpy().squeeze()
    grey = images.resize(images.read(mask, background="black"), height, width).mean(0, keepdim=True)
    grey = (grey + 1) * 127.5
    # In 8 bits: what is outside stays exactly the photo, whatever the resizing's rounding.
    return images.blur(grey.round() / 255, min(height, width) * _FEATHER)


def check_strength(strength: float) -> float:
    """ValueError unless it is from 0 to STRONGEST."""
    if not (isinstance(strength, int | float) and 0 <= strength <= STRONGEST):
        raise ValueError(
            f"strength is {strength!r}, expected 0 (the photo) through 1 (the network) to {STRONGEST}"
        )
    return float(strength)


def check_weights(styles: Sequence[Any] | None, weights: Sequence[float] | None) -> list[float]:
    """The share of each style, which sum to 1: equal ones without weights. ValueError for impossible ones."""
    if styles is None:
        if weights is not None:
            raise ValueError("weights mix several styles: give them with styles=[...]")
        return [1.0]
    if isinstance(styles, str | os.PathLike | bytes) or not len(styles):
        raise ValueError("styles is a list of one or more pictures: for one picture use style")
    if weights is None:
        return [1 / len(styles)] * len(styles)
    values = [float(weight) for weight in weights]
    if len(values) != len(styles):
        raise ValueError(f"{len(values)} weights for {len(styles)} styles: give one each")
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"the weights {values} must not be negative: leave a style out by weight 0")
    total = sum(values)
    if total == 0:
        raise ValueError("the weights are all 0: give at least one style a weight")
    if abs(total - 1) > 1e-3:
        shown = ", ".join(f"{value / total:.3g}" for value in values)
        warnings.warn(f"the weights sum to {total:g}: normalised to {shown}", StylizeWarning, stacklevel=3)
    return [value / total for value in values]


def _check_masks(mask: Any, styles: Sequence[Any] | None) -> list[Any]:
    if mask is None:
        return []
    if not isinstance(mask, list | tuple):
        return [mask]
    if styles is None or len(mask) != len(styles):
        raise ValueError(
            f"{len(mask)} masks for {0 if styles is None else len(styles)} styles: a list of masks gives "
            "each of styles its region; for one style give one mask"
        )
    return list(mask)


def _repeat(items: list[Any], count: int) -> list[Any]:
    return items * count if len(items) == 1 else items


def _luma(image: Tensor) -> Tensor:
    weights = image.new_tensor((0.299, 0.587, 0.114))
    return (image * weights[:, None, None]).sum(0, keepdim=True)


def _as_output(image: Tensor, output: str) -> Any:
    if output == "tensor":
        return image.cpu()
    picture = images.to_pil(image)
    return picture if output == "pil" else np.asarray(picture)
