"""2x resampling against the definition: zero-stuffing, padding and one filter."""

import torch
import torch.nn.functional as F

from mambastyle.ops.resample import blur, downsample2, upsample2

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8


def upfirdn(image: torch.Tensor, *, up: int, down: int, before: int, after: int, gain: float) -> torch.Tensor:
    """The definition, in float64 loops over nothing but channels."""
    batch, channels, height, width = image.shape
    stuffed = torch.zeros(batch, channels, height * up, width * up, dtype=image.dtype)
    stuffed[:, :, ::up, ::up] = image
    padded = F.pad(stuffed, (before, after, before, after)).flatten(0, 1)[:, None]
    out = F.conv2d(padded, (torch.outer(TAPS, TAPS) * gain)[None, None])
    return out.unflatten(0, (batch, channels))[:, :, 0, ::down, ::down]


def test_upsampling_is_zero_stuffing_and_the_filter():
    image = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(upsample2(image), upfirdn(image, up=2, down=1, before=2, after=1, gain=4.0))


def test_downsampling_is_the_filter_and_every_second_pixel():
    image = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    torch.testing.assert_close(downsample2(image), upfirdn(image, up=1, down=2, before=1, after=1, gain=1.0))


def test_blur_of_a_constant_keeps_it_inside():
    out = blur(torch.ones(1, 2, 8, 6), padding=2)
    assert out.shape == (1, 2, 9, 7)
    torch.testing.assert_close(out[:, :, 3:-3, 3:-3], torch.ones(1, 2, 3, 1))


def test_gradients():
    image = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(upsample2, image)
    assert torch.autograd.gradcheck(downsample2, image)
    assert torch.autograd.gradgradcheck(downsample2, image)
