"""The S6 block is causal, treats sequences apart and equals Mamba's recurrence."""

import pytest
import torch
import torch.nn.functional as F

from mambastyle.nn.s6 import S6, S6Config


def make(dim: int = 6) -> tuple[S6, torch.Tensor]:
    torch.manual_seed(0)
    return S6(S6Config(dim=dim, state=3)), torch.randn(2, 7, dim)


def test_a_later_token_does_not_change_an_earlier_output():
    block, tokens = make()
    changed = tokens.clone()
    changed[:, 4:] += 1
    first, second = block(tokens), block(changed)
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_a_batch_equals_its_sequences_one_by_one():
    block, tokens = make()
    together = block(tokens)
    torch.testing.assert_close(together, torch.cat([block(tokens[:1]), block(tokens[1:])]))


def test_it_equals_the_recurrence_step_by_step():
    block, tokens = make()
    x, z = block.in_proj(tokens).chunk(2, -1)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    h = torch.zeros(2, 12, 3)
    outputs = []
    for t in range(tokens.shape[1]):
        window = padded[..., t : t + 4]
        u = F.silu((window * block.conv1d.weight[:, 0]).sum(-1) + block.conv1d.bias)
        delta, B, C = (u @ block.x_proj.weight.T).split((1, 3, 3), -1)
        delta = F.softplus(block.dt_proj(delta))
        h = torch.exp(-delta[..., None] * block.A_log.exp()) * h + (delta * u)[..., None] * B[:, None]
        outputs.append((h * C[:, None]).sum(-1) + block.D * u)
    expected = block.out_proj(torch.stack(outputs, 1) * F.silu(z))
    torch.testing.assert_close(block(tokens), expected, rtol=1e-4, atol=1e-6)


def test_impossible_configs_say_why():
    with pytest.raises(ValueError, match="must be positive"):
        S6Config(dim=8, state=0)
