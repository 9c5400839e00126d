"""Inception v3 as the FID reads it: 2048 pooled features (Szegedy et al. 2016; Heusel et al. 2017).

The network is the PyTorch port of the TensorFlow weights of 2015, which differs from the common Inception v3:
average pooling leaves the border out, and the last block pools by the maximum.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIZE = 299


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU; padded to keep the size at stride 1 unless `valid`."""

    def __init__(
        self, i: int, o: int, size: int | tuple[int, int], stride: int = 1, *, valid: bool = False
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        padding = 0 if valid or stride > 1 else (height // 2, width // 2)
        self.conv = nn.Conv2d(i, o, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    """Figure 5 of the paper: 1 x 1, 5 x 5, twice 3 x 3, pooling."""

    def __init__(self, i: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(i, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(i, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(i, pool, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class Mixed6a(nn.Module):
    """Figure 10: half the size at 35 x 35."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(i, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Mixed6(nn.Module):
    """Figure 6: 7 x 7 as 1 x 7 and 7 x 1, of `width` channels inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width, 1), Conv(width, width, (1, 7))
        self.branch7x7_3 = Conv(width, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width, 1), Conv(width, width, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, (1, 7)), Conv(width, width, (7, 1))
        self.branch7x7dbl_5 = Conv(width, 192, (1, 7))
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Float[Tensor, "b 768 h w"]) -> Float[Tensor, "b 768 h w"]:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class Mixed7a(nn.Module):
    """Half the size at 17 x 17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, 2)

    def forward(self, x: Float[Tensor, "b 768 h w"]) -> Float[Tensor, "b 1280 h2 w2"]:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)


class Mixed7(nn.Module):
    """Figure 7: the filter banks spread out; `maximum` for the last block of the TensorFlow graph."""

    def __init__(self, i: int, *, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = Conv(i, 320, 1)
        self.branch3x3_1 = Conv(i, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch_pool = Conv(i, 192, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b 2048 h w"]:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        branches = [
            self.branch1x1(x),
            *(self.branch3x3_2a(three), self.branch3x3_2b(three)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


class FIDInception(nn.Module):
    """Pictures to the features of the FID; frozen. The logits of its last layer are left out."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(192, 32), Mixed5(256, 64), Mixed5(288, 64)
        self.Mixed_6a = Mixed6a(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = Mixed6(128), Mixed6(160), Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b, self.Mixed_7c = Mixed7(1280, maximum=False), Mixed7(2048, maximum=True)
        self.requires_grad_(False)
        self.eval()

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], *, resize: bool = True
    ) -> Float[Tensor, "batch 2048"]:
        """The global average of the last block for pictures in [-1, 1] of any size.

        They are resized to 299 px, bilinear and without antialiasing, as the FID's reference code does; that
        of ArtFID leaves them as they are (`resize=False`, from 75 px).
        """
        x = F.interpolate(image, (SIZE, SIZE), mode="bilinear", align_corners=False) if resize else image
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.float().mean((2, 3))

    def pooled(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 2048"]:
        """The same, by the name that the other feature networks have."""
        return self(image)
