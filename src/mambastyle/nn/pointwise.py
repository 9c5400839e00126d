"""A 1 x 1 convolution with a stride, as the shortcuts of residual networks have it."""

from jaxtyping import Float
from torch import Tensor, nn


class StridedPointwise(nn.Conv2d):
    """Conv2d(in_channels, out_channels, 1, stride, bias=False), the positions chosen before the convolution.

    oneDNN's own way to skip positions writes past its memory in the gradient of the weights, on processors
    with AVX2 for fewer than 8 channels-last input channels (oneDNN issue 6035, in PyTorch 2.13): the process
    dies, or gets wrong gradients.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)
        self.step = stride

    def forward(self, input: Float[Tensor, "b in_channels h w"]) -> Float[Tensor, "b out_channels _ _"]:
        return super().forward(input[:, :, :: self.step, :: self.step])
