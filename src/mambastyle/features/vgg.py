"""VGG-19 as a frozen judge (Simonyan & Zisserman 2015), and the normalised one of style transfer."""

from collections.abc import Iterable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 4, 4, 4)
"""Convolutions of each of VGG-19's five stages; a 2 x 2 max pooling stands between stages."""
LAYERS = tuple(f"relu{s + 1}_{c + 1}" for s, count in enumerate(CONVOLUTIONS) for c in range(count))
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Maps = dict[str, Float[Tensor, "batch _ _ _"]]


def _convolutions(padding: int, last: str) -> nn.ModuleDict:
    """The convolutions by the name of the rectifier behind them, up to `last`."""
    layers, channels = nn.ModuleDict(), 3
    for name in LAYERS[: LAYERS.index(last) + 1]:
        width = WIDTHS[int(name[4]) - 1]
        layers[name] = nn.Conv2d(channels, width, 3, padding=padding)
        channels = width
    return layers


class VGG19(nn.Module):
    """VGG-19 with torchvision's weights; frozen: gradients reach the picture, never the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = _convolutions(padding=1, last="relu5_4")
        self.requires_grad_(False)
        self.eval()

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], layers: Iterable[str] = STYLE_LAYERS
    ) -> Maps:
        """Maps of a picture in [-1, 1] by name, shallow to deep, behind the rectifiers.

        layers: among relu1_1 ... relu5_4; nothing deeper than the last of them is computed.
        Raises ValueError for an unknown name and for a picture under 16 px.
        """
        mean, std = image.new_tensor(_MEAN), image.new_tensor(_STD)
        x = ((image + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        return _run(self.convs, x, layers, reflect=False)


class NormalisedVGG19(nn.Module):
    """VGG-19 rescaled so that each channel's mean activation is 1, with reflection padding; up to relu5_1.

    It is the encoder of AdaIN and of most style transfer since. Its first layer, a 1 x 1 convolution, takes
    pictures in [0, 1] to what VGG was trained with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1)
        self.convs = _convolutions(padding=0, last="relu5_1")
        self.requires_grad_(False)
        self.eval()

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], layers: Iterable[str] = STYLE_LAYERS
    ) -> Maps:
        """Maps of a picture in [-1, 1] by name, as of `VGG19.forward`."""
        return _run(self.convs, self.colours((image + 1) / 2), layers, reflect=True)


def _run(convs: nn.ModuleDict, x: Tensor, layers: Iterable[str], *, reflect: bool) -> Maps:
    wanted = set(layers)
    if unknown := sorted(wanted - set(convs)):
        raise ValueError(f"this VGG-19 has no map {unknown[0]!r}: choose among {', '.join(convs)}")
    if min(x.shape[2:]) < 16:
        raise ValueError(
            f"VGG-19 takes pictures of at least 16 px, got {x.shape[2]} x {x.shape[3]}: resize first"
        )
    maps: Maps = {}
    for name, conv in convs.items():
        if len(maps) == len(wanted):
            break
        if name.endswith("_1") and name != "relu1_1":
            # The normalised network's published layers round an odd side up, torchvision's down.
            x = F.max_pool2d(x, 2, ceil_mode=reflect)
        if reflect:
            x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = F.relu(conv(x))
        if name in wanted:
            maps[name] = x
    return maps
