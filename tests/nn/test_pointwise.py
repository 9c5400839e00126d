"""The strided 1 x 1 convolution against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from mambastyle.compute import channels_last
from mambastyle.nn.pointwise import StridedPointwise


# Four channels are those at which oneDNN's kernel for AVX2 wrote past its memory.
@pytest.mark.parametrize(("channels", "stride", "size"), [(4, 2, (16, 12)), (3, 3, (7, 11)), (9, 1, (5, 4))])
def test_outputs_and_gradients_are_those_of_a_strided_convolution(channels, stride, size):
    torch.manual_seed(0)
    ours = channels_last(StridedPointwise(channels, 6, stride))
    x = torch.randn(2, channels, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    twin = x.detach().double().contiguous().requires_grad_()
    weight = ours.weight.detach().double().contiguous().requires_grad_()
    made, expected = ours(x), F.conv2d(twin, weight, stride=stride)
    probe = torch.randn_like(made)
    made.backward(probe)
    expected.backward(probe.double())
    for value, true in ((made, expected), (x.grad, twin.grad), (ours.weight.grad, weight.grad)):
        torch.testing.assert_close(value.double(), true, atol=1e-5, rtol=1e-5)
