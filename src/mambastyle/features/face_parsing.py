"""The U-Net that parses faces into 19 classes (CelebAMask-HQ, Lee et al. 2020; the judge of L_struct)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CLASSES = 19
WIDTHS = (16, 32, 64, 128, 256)


class DoubleConv(nn.Module):
    """Twice a 3 x 3 convolution, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(in_channels, out_channels)
        self.conv2 = _conv_norm_relu(out_channels, out_channels)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return self.conv2(self.conv1(x))


class UpConcat(nn.Module):
    """Twice the size, beside the map of the contracting path, and a double convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels)
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)

    def forward(
        self, skip: Float[Tensor, "b o h w"], x: Float[Tensor, "b i h2 w2"]
    ) -> Float[Tensor, "b o h w"]:
        return self.conv(torch.cat([skip, self.up(x)], 1))


class FaceParsingUNet(nn.Module):
    """The U-Net; frozen: gradients reach the picture, never the weights. Sides are multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third, fourth, fifth = WIDTHS
        self.conv1 = DoubleConv(3, first)
        self.conv2 = DoubleConv(first, second)
        self.conv3 = DoubleConv(second, third)
        self.conv4 = DoubleConv(third, fourth)
        self.center = DoubleConv(fourth, fifth)
        self.up_concat4 = UpConcat(fifth, fourth)
        self.up_concat3 = UpConcat(fourth, third)
        self.up_concat2 = UpConcat(third, second)
        self.up_concat1 = UpConcat(second, first)
        self.final = nn.Conv2d(first, CLASSES, 1)
        self.requires_grad_(False)
        self.eval()

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, "batch _"]]:
        """level0 ... level4 of a picture in [-1, 1], each flattened; L_struct is the sum of their 1 - cos.

        The network was trained with 512 px, and the published loss pools pictures to that size. Levels are as
        the network gives them; the cosine of the loss brings them to unit length.
        """
        return {name: x.flatten(1) for name, x in self.maps(image).items()}

    def maps(self, image: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, "batch _ _ _"]]:
        """The contracting levels: four maps behind their pooling, and the center."""
        return self._contract(image)[1]

    def parse(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Logits of the 19 classes at every pixel of a picture in [-1, 1]."""
        skips, levels = self._contract(image)
        x = levels["level4"]
        ups = (self.up_concat4, self.up_concat3, self.up_concat2, self.up_concat1)
        for up, skip in zip(ups, reversed(skips), strict=True):
            x = up(skip, x)
        return self.final(x)

    def _contract(self, image: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        height, width = image.shape[2:]
        if height % 16 or width % 16:
            raise ValueError(
                f"expected multiples of 16 px, got {height} x {width}: resize or pad the picture"
            )
        x, skips, levels = image, [], {}
        for level, conv in enumerate((self.conv1, self.conv2, self.conv3, self.conv4)):
            skips.append(conv(x))
            x = levels[f"level{level}"] = F.max_pool2d(skips[-1], 2)
        levels["level4"] = self.center(x)
        return skips, levels


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
