"""SqueezeNet 1.0 as a frozen judge (Iandola et al. 2016, arXiv:1602.07360, figure 2, left), read from a file.

The project ships no weights of it: `SqueezeNetFeatures(path)` reads any safetensors file with torchvision's
names (`squeezenet1_0`). Its maps serve perceptual losses, the discriminators of Projected GAN and
`fd_squeeze`; a number made with them is neither LPIPS nor FID.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Name of the map -> (index in torchvision's `features`, channels, stride to the picture).
LAYERS: dict[str, tuple[int, int, int]] = {
    "relu1": (0, 96, 2),
    "fire2": (3, 128, 4),
    "fire3": (4, 128, 4),
    "fire4": (5, 256, 4),
    "fire5": (7, 256, 8),
    "fire6": (8, 384, 8),
    "fire7": (9, 384, 8),
    "fire8": (10, 512, 8),
    "fire9": (12, 512, 16),
}
CHANNELS = {name: channels for name, (_, channels, _) in LAYERS.items()}
STRIDES = {name: stride for name, (_, _, stride) in LAYERS.items()}
_POOL_BEFORE = {"fire2", "fire5", "fire9"}
# Of the released network: RGB, 0..255, no division by a deviation.
_MEAN = (123.0, 117.0, 104.0)
MINIMUM_SIZE = 21
ENVIRONMENT_VARIABLE = "MAMBASTYLE_SQUEEZENET"
PERCEPTUAL_LAYERS = ("relu1", "fire2", "fire3", "fire5", "fire7", "fire9")
"""The maps that a perceptual distance compares: the end of each size, as LPIPS has it."""


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3 convolutions side by side (section 3.1)."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out height width"]:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNetFeatures(nn.Module):
    """The maps of SqueezeNet 1.0 up to `fire9`, frozen: gradients reach the picture, never the weights.

    path: safetensors file with the names of torchvision's `squeezenet1_0` (a classifier in it is ignored).
        None reads the path from the environment variable MAMBASTYLE_SQUEEZENET.
    Raises ValueError if no path is known, if the file cannot be read, or if a name or shape differs.
    """

    num_features = 512

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {"relu1": nn.Conv2d(3, 96, 7, stride=2)}
        in_channels = 96
        for name, (_, channels, _) in list(LAYERS.items())[1:]:
            layers[name] = Fire(in_channels, channels // 8, channels // 2)
            in_channels = channels
        self.layers = nn.ModuleDict(layers)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self._load(find_file(path))
        self.requires_grad_(False)
        self.eval()

    mean: Tensor

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], layers: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "batch _ _ _"]]:
        """Maps of a picture in [-1, 1], shallow to deep; after the rectifier, so none is negative.

        layers: the names wanted (see LAYERS; default all); nothing deeper than the last of them is computed.
        Raises ValueError for an unknown name and for a picture under 21 pixels.
        """
        wanted = set(LAYERS) if layers is None else set(layers)
        if unknown := sorted(wanted - set(LAYERS)):
            raise ValueError(f"SqueezeNet has no map {unknown[0]!r}: choose among {', '.join(LAYERS)}")
        height, width = image.shape[-2:]
        if min(height, width) < MINIMUM_SIZE:
            raise ValueError(
                f"SqueezeNet takes pictures of at least {MINIMUM_SIZE} px, got {height} x {width}:"
                " resize first"
            )
        x = (image + 1) * 127.5 - self.mean
        maps: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if len(maps) == len(wanted):
                break
            if name in _POOL_BEFORE:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
            x = F.relu(layer(x)) if name == "relu1" else layer(x)
            if name in wanted:
                maps[name] = x
        return maps

    def pooled(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 512"]:
        """Global average of the last map, in float32: the features of `fd_squeeze` and `kd_squeeze`."""
        features = self(image, layers=("fire9",))["fire9"]
        return features.float().mean((2, 3))

    def _load(self, path: Path) -> None:
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
        tensors = {}
        for name, expected in self.state_dict().items():
            _, layer, rest = name.split(".", 2)
            theirs = f"features.{LAYERS[layer][0]}.{rest}"
            got = tuple(found[theirs].shape) if theirs in found else None
            if got != tuple(expected.shape):
                raise ValueError(
                    f"{path}: expected {theirs} of shape {tuple(expected.shape)},"
                    f" got {got or 'no such tensor'}:"
                    " give a file with the names of torchvision's squeezenet1_0 (not 1_1)"
                )
            tensors[name] = found[theirs].to(expected.dtype)
        self.load_state_dict(tensors)


def is_known() -> bool:
    """Whether the environment names a SqueezeNet file; one that is named and missing is still an error."""
    return bool(os.environ.get(ENVIRONMENT_VARIABLE))


def find_file(path: str | Path | None = None) -> Path:
    """The SqueezeNet file: `path`, or what MAMBASTYLE_SQUEEZENET names; ValueError if there is none."""
    chosen = path or os.environ.get(ENVIRONMENT_VARIABLE)
    if not chosen:
        raise ValueError(
            f"no SqueezeNet file: give its path, or set {ENVIRONMENT_VARIABLE} to a safetensors file"
            " with the names of torchvision's squeezenet1_0"
        )
    if not Path(chosen).is_file():
        raise ValueError(f"no SqueezeNet file at {chosen}: check the path or {ENVIRONMENT_VARIABLE}")
    return Path(chosen)
