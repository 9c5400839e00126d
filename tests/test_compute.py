"""Layout and precision: what convolutions give, what products run in, and what is refused."""

import pytest
import torch
from torch import nn

from mambastyle.compute import channels_last, check_precision, computing_in, freeze, has_bfloat16

CPU = torch.device("cpu")


def test_a_convolution_of_a_frozen_network_gives_channels_last_maps():
    conv = nn.Conv2d(3, 8, 3)
    expected = conv(torch.ones(1, 3, 5, 6))
    frozen = freeze(conv, CPU)
    made = frozen(torch.ones(1, 3, 5, 6))
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert not made.requires_grad
    assert not frozen.training
    torch.testing.assert_close(made, expected)


def test_the_layout_survives_what_a_checkpoint_brings():
    conv = channels_last(nn.Conv2d(3, 8, 3))
    conv.load_state_dict(nn.Conv2d(3, 8, 3).state_dict())
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_products_run_in_the_precision_asked_for():
    matrix = torch.ones(4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with computing_in(precision, CPU):
            assert (matrix @ matrix).dtype == dtype


def test_a_precision_that_cannot_be_had_is_named():
    with pytest.raises(ValueError, match="precision is 'fp8', expected one of fp32, bf16, auto"):
        check_precision("fp8", CPU)
    with pytest.raises(ValueError, match="meta has no mixed precision"):
        check_precision("bf16", torch.device("meta"))


@pytest.mark.parametrize(
    ("capabilities", "there"),
    [({"avx2": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"bf16": True}, True)],
)
def test_auto_takes_bfloat16_where_the_processor_has_it(monkeypatch, caplog, capabilities, there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(CPU) == there
    assert check_precision("auto", CPU) == ("bf16" if there else "fp32")
    assert not caplog.text
    assert check_precision("bf16", CPU) == "bf16"
    assert ("can be many times slower" in caplog.text) != there
