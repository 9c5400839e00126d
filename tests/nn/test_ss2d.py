"""SS2D reads and restores the four paths, and equals a scan written position by position."""

import pytest
import torch
import torch.nn.functional as F

from mambastyle.nn.ss2d import SS2D, SS2DConfig
from mambastyle.nn.vss_block import ViTBlock, VSSBlock
from mambastyle.ops import cross_paths


def grid(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_ss2d_equals_the_recurrence_position_by_position():
    torch.manual_seed(0)
    module = SS2D(SS2DConfig(dim=6, state=3)).double()
    height, width, inner = 3, 4, 12
    x = grid(2, height, width, 6).double()

    gate_input, z = module.in_proj(x).chunk(2, -1)
    u = F.silu(module.conv2d(gate_input.permute(0, 3, 1, 2))).flatten(2)  # (batch, inner, length)
    y = torch.zeros(2, inner, height * width, dtype=torch.float64)
    A = -module.A_logs.exp().view(4, inner, 3)
    D = module.Ds.view(4, inner)
    for k, path in enumerate(cross_paths(height, width)):
        h = torch.zeros(2, inner, 3, dtype=torch.float64)
        for position in path:
            ut = u[:, :, position]
            delta, B, C = (ut @ module.x_proj_weight[k].T).split((1, 3, 3), -1)
            delta = F.softplus(delta @ module.dt_projs_weight[k].T + module.dt_projs_bias[k])
            h = torch.exp(delta[..., None] * A[k]) * h + (delta * ut)[..., None] * B[:, None]
            y[:, :, position] = y[:, :, position] + (h * C[:, None]).sum(-1) + D[k] * ut
    y = module.out_norm(y.transpose(1, 2)).unflatten(1, (height, width))
    # The scan keeps A and D in float32 at least, so the tolerance is float32's.
    torch.testing.assert_close(module(x), module.out_proj(y * F.silu(z)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", ["selective", "identity"])
def test_a_vss_block_treats_pictures_apart_on_a_grid_that_is_not_square(scan):
    torch.manual_seed(0)
    block = VSSBlock(SS2DConfig(dim=8, state=4, scan=scan))
    x = grid(2, 3, 5, 8)
    together = block(x)
    assert together.shape == x.shape
    torch.testing.assert_close(together, torch.cat([block(x[:1]), block(x[1:])]), rtol=1e-5, atol=1e-6)


def test_the_initial_state_matches_section_3_6_of_mamba():
    module = SS2D(SS2DConfig(dim=8, state=4))
    torch.testing.assert_close(module.A_logs.exp()[5], torch.arange(1.0, 5.0))
    assert (module.Ds == 1).all()
    delta = F.softplus(module.dt_projs_bias)
    assert (delta > 9e-4).all()
    assert (delta < 0.11).all()


def test_the_papers_block_has_the_papers_parameters():
    with torch.device("meta"):
        block = VSSBlock(SS2DConfig(dim=512))
    assert sum(parameter.numel() for parameter in block.parameters()) == 2_054_656


def test_the_identity_scan_keeps_no_dead_parameters():
    names = dict(SS2D(SS2DConfig(dim=8, scan="identity")).named_parameters())
    assert set(names) == {
        "in_proj.weight",
        "conv2d.weight",
        "conv2d.bias",
        "out_norm.weight",
        "out_norm.bias",
        "out_proj.weight",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 0}, "must be positive"),
        ({"dim": 8, "kernel_size": 4}, "kernel_size must be odd"),
        ({"dim": 8, "scan": "zigzag"}, "scan must be one of"),
    ],
)
def test_impossible_configs_say_why(values, message):
    with pytest.raises(ValueError, match=message):
        SS2DConfig(**values)


def test_a_vit_block_takes_grids_and_sequences_alike():
    torch.manual_seed(0)
    block = ViTBlock(16, head_dim=8)
    x = grid(2, 3, 5, 16)
    torch.testing.assert_close(block(x).flatten(1, 2), block(x.flatten(1, 2)))
    with pytest.raises(ValueError, match="dim 12 is not a multiple of head_dim 8"):
        ViTBlock(12, head_dim=8)
