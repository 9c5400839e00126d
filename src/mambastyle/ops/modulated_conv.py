"""Modulated convolution (Karras et al. 2020, section 2.2): one ordinary convolution for the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mambastyle.ops.resample import blur


def modulated_conv2d(
    image: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o i k k"],
    style: Float[Tensor, "b i"],
    *,
    demodulate: bool = True,
    up: int = 1,
    gain: float = 1.0,
) -> Float[Tensor, "b o h2 w2"]:
    """Convolve each picture with `weight` scaled per input channel by its own `style`.

    y_o = gain * d_o * sum_i weight_oi * (style_i x_i), with d_o = rsqrt(sum_ik (style_i weight_oik)^2 + 1e-8)
    when demodulated (equations 1 to 3). Scaling the input and then the output equals scaling the weights, so
    one convolution with shared weights serves the batch: a grouped convolution with a kernel per picture is
    several times slower on a CPU.

    up=2 doubles the size: a stride-2 transposed convolution, then the [1, 3, 3, 1] filter. The kernel is laid
    out as torch's transposed convolution applies it, and as stylegan2-ada-pytorch stores it.
    """
    if up not in (1, 2):
        raise ValueError(f"expected up of 1 or 2, got {up}")
    kernel_size = weight.shape[-1]
    style = style.to(weight.dtype)
    modulated = image * style.to(image.dtype)[:, :, None, None]
    if up == 2:
        out = F.conv_transpose2d(modulated, weight.to(image.dtype).transpose(0, 1), stride=2)
        out = blur(out, padding=3 - kernel_size // 2 - 1, gain=4.0)
    else:
        out = F.conv2d(modulated, weight.to(image.dtype), padding=kernel_size // 2)
    if demodulate:
        scale = gain * demodulation(kernel_energy(weight), style)
        return out * scale.to(out.dtype)[:, :, None, None]
    return out * gain if gain != 1.0 else out


def kernel_energy(weight: Float[Tensor, "o i k k"]) -> Float[Tensor, "o i"]:
    """Sum of squares over the kernel's positions, in float32: all of the weight that demodulation needs."""
    return weight.float().square().sum((2, 3))


def demodulation(energy: Float[Tensor, "o i"], style: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
    """The factor that gives every output channel unit variance for unit-variance input (equation 3)."""
    return torch.rsqrt(style.float().square() @ energy.t() + 1e-8)
