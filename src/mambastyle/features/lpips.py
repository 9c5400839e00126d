"""LPIPS 0.1: a distance of pictures with learned weights per channel (Zhang et al. 2018, equation 1)."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.features.squeezenet import Fire

Backbone = Literal["alex", "vgg", "squeeze"]
CHANNELS: dict[Backbone, tuple[int, ...]] = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
"""Channels of the maps that each backbone compares."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _alex() -> list[list[nn.Module]]:
    return [
        [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()],
        [nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]


def _vgg() -> list[list[nn.Module]]:
    stages, channels = [], 3
    for width, convolutions in zip(CHANNELS["vgg"], (2, 2, 3, 3, 3), strict=True):
        stage: list[nn.Module] = [nn.MaxPool2d(2)] if stages else []
        for _ in range(convolutions):
            stage += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        stages.append(stage)
    return stages


def _squeeze() -> list[list[nn.Module]]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return [
        [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU()],
        [pool(), Fire(64, 16, 64), Fire(128, 16, 64)],
        [pool(), Fire(128, 32, 128), Fire(256, 32, 128)],
        [pool(), Fire(256, 48, 192)],
        [Fire(384, 48, 192)],
        [Fire(384, 64, 256)],
        [Fire(512, 64, 256)],
    ]


_STAGES = {"alex": _alex, "vgg": _vgg, "squeeze": _squeeze}
_MINIMUM = {"alex": 31, "vgg": 16, "squeeze": 15}


class LPIPS(nn.Module):
    """d(a, b) = sum over maps of mean over positions of w . (a_hat - b_hat)^2; a_hat has unit length.

    Frozen: gradients reach the pictures. The layers are numbered through all stages, as torchvision does.
    """

    def __init__(self, backbone: Backbone = "alex") -> None:
        super().__init__()
        if backbone not in get_args(Backbone):
            raise ValueError(f"expected a backbone among {', '.join(get_args(Backbone))}, got {backbone!r}")
        self.backbone: Backbone = backbone
        stages = _STAGES[backbone]()
        self.features = nn.Sequential(*(layer for stage in stages for layer in stage))
        self.ends = {sum(len(stage) for stage in stages[: i + 1]) - 1 for i in range(len(stages))}
        self.linear = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in CHANNELS[backbone])
        self.requires_grad_(False)
        self.eval()

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], other: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """One distance per pair of pictures in [-1, 1]; 0 for equal ones. Raises ValueError for tiny ones."""
        if image.shape != other.shape:
            raise ValueError(f"expected pairs of one size, got {tuple(image.shape)} and {tuple(other.shape)}")
        if min(image.shape[2:]) < _MINIMUM[self.backbone]:
            height, width = image.shape[2:]
            least = _MINIMUM[self.backbone]
            raise ValueError(
                f"LPIPS-{self.backbone} takes at least {least} px, got {height} x {width}: resize first"
            )
        distance = image.new_zeros(len(image), dtype=torch.float32)
        for linear, ours, theirs in zip(self.linear, self.maps(image), self.maps(other), strict=True):
            squared = (_unit_length(ours) - _unit_length(theirs)).square()
            distance = distance + linear(squared).float().mean((1, 2, 3))
        return distance

    def maps(self, image: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """What the backbone sees in a picture in [-1, 1], shallow to deep."""
        shift, scale = image.new_tensor(_SHIFT), image.new_tensor(_SCALE)
        x = (image - shift[:, None, None]) / scale[:, None, None]
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                maps.append(x)
        return maps


def _unit_length(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    # Inside the root as well: where all channels are 0 its gradient would be NaN.
    x = x.float()
    return x / ((x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)
