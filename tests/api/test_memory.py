"""What a stylization takes is known before it starts, and too much is refused with what would fit."""

import contextlib

import pytest
import torch
from torch import nn

import mambastyle as ms
from mambastyle.api import memory
from mambastyle.evaluation import cost
from mambastyle.models.mamba_st import MAMBA_ST_SMALL, MambaST, MambaSTConfig
from mambastyle.models.samam import SAMAM_PATCH4, SAMAM_SMALL, SaMam, SaMamConfig


class Stylization(nn.Module):
    def __init__(self, network, code):
        super().__init__()
        self.network, self.code = network, code

    def forward(self, content):
        return self.network.stylize(content, self.code)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    "config", [SaMamConfig(), SAMAM_PATCH4, SAMAM_SMALL, MambaSTConfig(), MAMBA_ST_SMALL]
)
def test_the_estimate_is_what_tensors_hold_and_a_little_more(config):
    with torch.device("meta"):
        network = (SaMam if isinstance(config, SaMamConfig) else MambaST)(config).eval().requires_grad_(False)
        code = network.encode_style(torch.empty(1, 3, 256, 256))
        # The process held 1.09 times what its tensors did at 2048 px; at 1024 px the working memory of the
        # decoder's convolutions, which is not counted, weighs more.
        for size, most in ((1024, 2.5), (4096, 1.4)):
            _, held = cost._count(Stylization(network, code), (torch.empty(1, 3, size, size),))
            assert 1.1 < memory.needed_bytes(network, size, size) / held < most
    assert memory.needed_bytes(SaMam(SAMAM_SMALL), 4096, 4096) < 12e9


@pytest.mark.parametrize("kept", [False, True])
def test_what_will_not_fit_is_refused_before_it_starts(tiny_stylizer_folder, monkeypatch, kept):
    stylizer = ms.load(tiny_stylizer_folder, device="cpu")
    photo = torch.zeros(3, 640, 320)
    needed = memory.needed_bytes(stylizer.network, 640, 320)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed // 4)
    # Of the whole process: tests before this one may have had memory kept.
    monkeypatch.setattr(memory, "keeps_freed_memory", lambda: kept)
    with pytest.raises(ValueError, match=r"a picture of 640 x 320 takes about .* \(--size 3[02]\d\)"):
        stylizer.stylize(photo, photo)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    monkeypatch.setattr(stylizer.network, "transfer", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stylizer.stylize(photo, photo)


@pytest.mark.parametrize(
    ("kept", "share", "expected"), [(False, 1.2, False), (True, 1.2, True), (True, 2.0, False)]
)
def test_what_fits_only_without_kept_memory_is_done_without(
    tiny_stylizer_folder, monkeypatch, kept, share, expected
):
    stylizer = ms.load(tiny_stylizer_folder, device="cpu")
    photo = torch.rand(3, 64, 96) * 2 - 1
    usual = stylizer.stylize(photo, photo, output="tensor")
    needed = memory.needed_bytes(stylizer.network, 64, 96)
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(needed * share))
    monkeypatch.setattr(memory, "keeps_freed_memory", lambda: kept)
    without = []

    @contextlib.contextmanager
    def giving_back():
        without.append("begun")
        yield
        without.append("ended")

    monkeypatch.setattr(memory, "giving_back", giving_back)
    assert torch.equal(stylizer.stylize(photo, photo, output="tensor"), usual)
    assert without == (["begun", "ended"] if expected else [])


def test_free_memory_is_read_where_the_system_says_it():
    free = memory.available_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert memory.available_bytes(torch.device("meta")) is None
