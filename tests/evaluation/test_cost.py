"""The counters give the numbers of the papers, and what the networks' operations say by hand."""

import functools

import pytest
import torch
from torch import nn

from mambastyle.evaluation import cost as costs
from mambastyle.evaluation.cost import TABLE, Cost
from mambastyle.nn.vss_block import SS2DConfig, VSSBlock

pytestmark = pytest.mark.no_shape_checks
# Each full size takes seconds to count.
cost = functools.cache(costs.cost)


@pytest.mark.parametrize(
    ("variant", "millions", "live", "gmacs"),
    [
        ("final", 104.56, 101.94, 157.82),
        ("no-fuser", 87.12, 85.55, 110.17),
        ("base", 89.95, 89.95, 136.33),
        ("vit", 108.87, 108.87, 179.12),
    ],
)
def test_mambastyle_costs_what_the_authors_modules_cost(variant, millions, live, gmacs):
    total = cost("faces1024", variant).total
    assert (total.parameters + total.dead) / 1e6 == pytest.approx(millions, abs=0.005)
    assert total.parameters / 1e6 == pytest.approx(live, abs=0.005)
    assert total.paper_macs / 1e9 == pytest.approx(gmacs, abs=0.005)
    # Its own numbers, or the line beside them says why not.
    assert gmacs == pytest.approx(TABLE[variant].paper_gmacs, rel=2e-3)


def test_the_honest_count_of_the_final_model():
    report = cost("faces1024", "final")
    total = report.total
    # 163.2 and the generator's filters, which are 1.07.
    assert total.macs / 1e9 == pytest.approx(163.2 + 1.07, abs=0.05)
    assert total.state_updates / 1e9 == pytest.approx(0.893, abs=0.001)
    assert sum(row.parameters for name, row in report.modules.items() if name.startswith("generator")) == (
        30_370_060
    )
    assert report.weight_bytes > 4 * total.parameters
    # One map of 32 channels at 1024 px has 128 MiB, and a convolution needs two.
    assert 256 * 2**20 < report.activation_bytes < 2**30


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [("mamba-st", 27.08, 35.95), ("samam", 19.77, 8.76)],
)
def test_style_transfer_costs_what_its_papers_say(name, millions, gmacs):
    total = cost(name).total
    assert (total.parameters + total.dead) / 1e6 == pytest.approx(millions, abs=0.005)
    assert total.paper_macs / 1e9 == pytest.approx(gmacs, abs=0.005)


class Pair(nn.Module):
    """A convolution and a VSSM block on a small grid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block = VSSBlock(SS2DConfig(8, state=4))

    def forward(self, x):
        return self.block(self.conv(x).permute(0, 2, 3, 1))


def test_a_small_module_counted_by_hand():
    with torch.device("meta"):
        network, image = Pair().requires_grad_(False), torch.empty(1, 3, 4, 6)
    modules, peak = costs._count(network, (image,))
    total = sum(modules.values(), Cost())
    positions, dim, inner, rank, state = 24, 8, 16, 1, 4
    conv = positions * 3 * 9 * 8
    layers = positions * (2 * dim * inner + inner * dim + 9 * inner)
    einsums = positions * 4 * (inner * (rank + 2 * state) + rank * inner)
    assert modules["conv"] == Cost(8 * 27 + 8, 0, conv, conv, 0)
    assert total.paper_macs == conv + layers
    assert total.macs == conv + layers + einsums
    assert total.state_updates == positions * 4 * inner * state
    assert total.dead == 2 * dim * dim + dim
    assert peak >= positions * 4 * (rank + 2 * state) * 4


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="no config 'faces102': did you mean 'faces1024'"):
        cost("faces102")
    with pytest.raises(ValueError, match="no variant 'vitt': did you mean 'vit'"):
        cost("faces1024", "vitt")
    with pytest.raises(ValueError, match="samam has no variant 'vit'"):
        cost("samam", "vit")
