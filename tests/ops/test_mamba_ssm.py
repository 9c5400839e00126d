"""The drop-in for mamba-ssm's function: its arguments in its order, against the formula written out."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambastyle.ops import selective_scan_fn


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def written_out(u, delta, A, B, C, D, z, bias) -> tuple[Tensor, Tensor]:  # type: ignore
    """mamba-ssm's steps in float64; B and C are (batch, channels, state, length)."""
    u, delta, A, B, C, D, z, bias = (x.double() for x in (u, delta, A, B, C, D, z, bias))
    d = F.softplus(delta + bias[:, None])
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64)
    steps = []
    for t in range(u.shape[2]):
        h = torch.exp(d[..., t, None] * A) * h + (d * u)[..., t, None] * B[..., t]
        steps.append((h * C[..., t]).sum(-1))
    return (torch.stack(steps, -1) + D[:, None] * u) * F.silu(z), h


@pytest.mark.parametrize("kind", ["constant", "one group", "groups"])
def test_it_takes_every_kind_of_b_and_c(kind):
    shape = {"constant": (6, 3), "one group": (2, 3, 7), "groups": (2, 2, 3, 7)}[kind]
    B, C = normal(*shape), normal(*shape)
    u, delta, z = normal(3, 2, 6, 7)
    A, D, bias = -normal(6, 3).abs(), normal(6), normal(6)
    # By position, as people call it.
    y, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)

    def per_channel(x: Tensor) -> Tensor:
        if kind == "constant":
            return x[None, :, :, None].expand(2, -1, -1, 7)
        return x.repeat_interleave(3, 1) if kind == "groups" else x[:, None].expand(-1, 6, -1, -1)

    expected, h = written_out(u, delta, A, per_channel(B), per_channel(C), D, z, bias)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, h.float(), rtol=1e-5, atol=1e-5)


def test_the_arguments_are_named_and_ordered_as_upstream():
    names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"]
    parameters = inspect.signature(selective_scan_fn).parameters
    assert list(parameters) == names
    assert [parameters[name].default for name in names[5:]] == [None, None, None, False, False]


def test_complex_a_is_refused_with_the_remedy():
    u = normal(1, 2, 3)
    A = torch.zeros(2, 4, dtype=torch.complex64)
    with pytest.raises(
        TypeError, match=r"A must be real: got torch.complex64; .* need the mamba-ssm package"
    ):
        selective_scan_fn(u, u, A, normal(1, 4, 3), normal(1, 4, 3))
