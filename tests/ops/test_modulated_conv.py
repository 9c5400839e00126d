"""Modulated convolution against the equation with one kernel per picture."""

import pytest
import torch
import torch.nn.functional as F

from mambastyle.ops.modulated_conv import modulated_conv2d
from mambastyle.ops.resample import blur


def by_equation(image, weight, style, demodulate, up):
    """Equations 1 to 3 of StyleGAN2: scale the weights, normalise them, convolve picture by picture."""
    outs = []
    for picture, factors in zip(image, style, strict=True):
        kernel = weight * factors[None, :, None, None]
        if demodulate:
            kernel = kernel * torch.rsqrt(kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8)
        if up == 2:
            out = blur(F.conv_transpose2d(picture[None], kernel.transpose(0, 1), stride=2), 1, gain=4.0)
        else:
            out = F.conv2d(picture[None], kernel, padding=kernel.shape[-1] // 2)
        outs.append(out)
    return torch.cat(outs)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("kernel", "up"), [(1, 1), (3, 1), (3, 2)])
def test_equals_one_kernel_per_picture(kernel, up, demodulate):
    image = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    weight = torch.randn(6, 3, kernel, kernel, dtype=torch.float64)
    style = torch.randn(2, 3, dtype=torch.float64)
    out = modulated_conv2d(image, weight, style, demodulate=demodulate, up=up)
    expected = by_equation(image, weight, style, demodulate, up)
    assert out.shape == (2, 6, 5 * up, 4 * up)
    # The demodulation factor is computed in float32, whatever the input.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_other_factors_of_up_are_refused():
    with pytest.raises(ValueError, match="expected up of 1 or 2, got 3"):
        modulated_conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), torch.ones(1, 1), up=3)
