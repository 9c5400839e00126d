"""The modulated layer gives each picture its own weights, and a fixed output scale."""

import torch
import torch.nn.functional as F

from mambastyle.nn.modulated import ModulatedConv


def test_each_picture_is_convolved_with_its_own_demodulated_weights():
    torch.manual_seed(0)
    layer = ModulatedConv(5, 7, w_dim=4)
    x, w = torch.randn(2, 5, 6, 9), torch.randn(2, 4)
    style = w @ layer.modulation.weight.T / 2 + layer.modulation.bias
    expected = []
    for image, scale in zip(x, style, strict=True):
        weight = layer.weight * scale[:, None, None]
        weight = weight * weight.square().sum((1, 2, 3), keepdim=True).rsqrt()
        expected.append(F.conv2d(image[None], weight, padding=1))
    torch.testing.assert_close(layer(x, w), torch.cat(expected), rtol=1e-4, atol=1e-5)
