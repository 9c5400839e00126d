"""The bottleneck of the IR-SE networks, with squeeze-and-excitation (ArcFace, Deng et al. 2019)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.nn.pointwise import StridedPointwise


class SqueezeExcitation(nn.Module):
    """`x * sigmoid(fc2(ReLU(fc1(mean(x)))))`, the mean over height and width (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(channels // reduction, 1), 1, bias=False)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(max(channels // reduction, 1), channels, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        # Convolutions of one position (by that name they are published): as products they need no set-up.
        squeezed = self.relu(F.linear(x.mean((2, 3)), self.fc1.weight.flatten(1)))
        return x * F.linear(squeezed, self.fc2.weight.flatten(1)).sigmoid()[:, :, None, None]


class Bottleneck(nn.Module):
    """BN, conv 3x3, PReLU, conv 3x3 with the stride, BN, SE; plus the shortcut; no activation after it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if in_channels == out_channels:
            self.shortcut = nn.Identity() if stride == 1 else nn.MaxPool2d(1, stride)
        else:
            self.shortcut = nn.Sequential(
                StridedPointwise(in_channels, out_channels, stride),
                nn.BatchNorm2d(out_channels),
            )
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            SqueezeExcitation(out_channels),
        )

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        return self.residual(x) + self.shortcut(x)
