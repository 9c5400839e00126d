"""A modulated convolution as a layer (StyleGAN2, Karras et al. 2020, section 2.2), without noise."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.ops.modulated_conv import modulated_conv2d


class EqualLinear(nn.Module):
    """`x @ (weight / sqrt(in_features))^T + bias`, weights drawn from N(0, 1) (equalised learning rate)."""

    def __init__(self, in_features: int, out_features: int, bias_init: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class ModulatedConv(nn.Module):
    """Convolve with weights which a latent scales per input channel and which are then normalised."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.modulation = EqualLinear(w_dim, in_channels, bias_init=1.0)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"], w: Float[Tensor, "batch w_dim"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        scale = self.weight[0].numel() ** -0.5
        return modulated_conv2d(x, self.weight * scale, self.modulation(w))
