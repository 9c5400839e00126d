"""The blocks load what the published code saves, and compute what it computes."""

import pytest
import torch
from mambapy.mamba import MambaBlock, MambaConfig

from mambastyle.nn import SS2D, Mamba, SS2DConfig


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "dt_rank": 2}])
def test_mamba_is_mambapys_block_with_the_same_state_dict(options):
    torch.manual_seed(0)
    # mambapy's block has the names and the initial values of mamba-ssm's, and its own scan.
    peer = MambaBlock(MambaConfig(d_model=10, n_layers=1, d_state=3, expand_factor=3, d_conv=2, **options))
    block = Mamba(10, d_state=3, d_conv=2, expand=3, **options)
    block.load_state_dict(peer.state_dict())
    tokens = torch.randn(2, 9, 10)
    y, expected = block(tokens), peer(tokens)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), (_, truth) in zip(
        sorted(block.named_parameters()), sorted(peer.named_parameters()), strict=True
    ):
        torch.testing.assert_close(parameter.grad, truth.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_mamba_has_the_tensors_of_mamba_ssms_mamba_simple():
    shapes = {name: tuple(tensor.shape) for name, tensor in Mamba(64).state_dict().items()}
    assert shapes == {
        "A_log": (128, 16),
        "D": (128,),
        "in_proj.weight": (256, 64),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "x_proj.weight": (36, 128),
        "dt_proj.weight": (128, 4),
        "dt_proj.bias": (128,),
        "out_proj.weight": (64, 128),
    }


def test_ss2d_has_the_tensors_of_vmambas_first_release():
    shapes = {name: tuple(tensor.shape) for name, tensor in SS2D(SS2DConfig(dim=96)).state_dict().items()}
    assert shapes == {
        "x_proj_weight": (4, 38, 192),
        "dt_projs_weight": (4, 192, 6),
        "dt_projs_bias": (4, 192),
        "A_logs": (768, 16),
        "Ds": (768,),
        "in_proj.weight": (384, 96),
        "conv2d.weight": (192, 1, 3, 3),
        "conv2d.bias": (192,),
        "out_norm.weight": (192,),
        "out_norm.bias": (192,),
        "out_proj.weight": (96, 192),
    }
