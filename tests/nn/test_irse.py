"""The bottleneck has the published layers and strides."""

import pytest
import torch

from mambastyle.nn.irse import Bottleneck


@pytest.mark.parametrize("out_channels", [16, 24])
@pytest.mark.parametrize(("stride", "size"), [(1, (6, 10)), (2, (3, 5))])
@torch.no_grad()
def test_a_stride_shrinks_both_branches_alike(out_channels, stride, size):
    torch.manual_seed(0)
    block = Bottleneck(16, out_channels, stride).eval()
    x = torch.randn(2, 16, 6, 10)
    y = block(x)
    assert y.shape == (2, out_channels, *size)
    torch.testing.assert_close(y, torch.cat([block(x[:1]), block(x[1:])]), rtol=1e-4, atol=1e-5)
