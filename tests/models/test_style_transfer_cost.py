"""Mamba-ST and SaMam have the published numbers of parameters and of multiply-accumulates."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mambastyle.models import mamba_st, samam
from mambastyle.models.mamba_st import MAMBA_ST_SMALL, MambaST, MambaSTConfig
from mambastyle.models.samam import SAMAM_PATCH4, SAMAM_SMALL, SaMam, SaMamConfig
from mambastyle.nn import ss2d

MAMBA_ST_DEAD = 3_412_992
"""Parameters of the published network on which its output does not depend."""
MAMBA_ST_POSITION_CODE = 18 * 18 * 512 * 512
"""What it spends on a positional code that it then does not use."""


def meta(network: type, config) -> torch.nn.Module:
    with torch.device("meta"):
        return network(config)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: torch.nn.Module, monkeypatch, size: int) -> float:
    """Of one picture and one style; the projection of the steps counts, the recurrence does not."""

    def projected_only(u: Tensor, dt_low: Tensor, dt_weight: Tensor, *_: Tensor) -> Tensor:
        torch.matmul(dt_low.permute(0, 2, 1, 3), dt_weight.transpose(1, 2))
        return torch.empty_like(u)

    for module in (mamba_st, samam, ss2d):
        monkeypatch.setattr(module, "ss2d_scan", projected_only)
    picture = torch.empty(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(picture, picture)
    return counter.get_total_flops() / 2


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("size", "published"), [pytest.param(256, 35.95, id="256px"), pytest.param(512, 143.5, id="512px")]
)
def test_mamba_st(monkeypatch, size, published):
    model = meta(MambaST, MambaSTConfig())
    assert parameters(model) + MAMBA_ST_DEAD == 27_082_819
    spent = macs(model, monkeypatch, size) + MAMBA_ST_POSITION_CODE
    assert spent / 1e9 == pytest.approx(published, abs=0.05 if size == 512 else 0.005)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("config", "millions", "published"),
    [
        pytest.param(SaMamConfig(), 19.77, {256: 8.76, 512: 34.98}, id="patch8"),
        pytest.param(SAMAM_PATCH4, 20.14, {256: 30.32, 512: 121.2}, id="patch4"),
    ],
)
def test_samam(monkeypatch, config, millions, published):
    model = meta(SaMam, config)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.005)
    for size, expected in published.items():
        assert macs(model, monkeypatch, size) / 1e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("network", "config"), [(MambaST, MAMBA_ST_SMALL), (SaMam, SAMAM_SMALL)])
def test_the_small_models_fit_in_twenty_megabytes_of_half_precision(network, config):
    assert 0 < 2 * parameters(meta(network, config)) < 20e6
