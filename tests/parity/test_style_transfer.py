"""Our Mamba-ST and SaMam give what the published ones give with the same weights."""

import pytest
import torch
from tests.golden import cases
from tests.golden.cases import TOLERANCE, error, image

import mambastyle
from mambastyle import published
from mambastyle.models.mamba_st import MambaST
from mambastyle.models.samam import SaMam
from mambastyle.published.convert import convert


@torch.no_grad()
def test_mamba_st_equals_the_published_one():
    weights, expected = cases.load("mamba_st")
    model = published.build("mamba-st", weights, shuffle=False)
    assert isinstance(model, MambaST)
    content, style = image(100, 2, 64, 64), image(101, 2, 64, 64)
    tokens = model.encode_style(style).flatten(1, 2).transpose(0, 1)
    assert error(tokens[..., ::8], expected["style_tokens"]) < TOLERANCE
    assert error((model(content, style) + 1) / 2, expected["stylized"]) < TOLERANCE


@pytest.mark.parametrize(("case", "size"), [("samam_p8", (64, 96)), ("samam_p4", (32, 48))])
@torch.no_grad()
def test_samam_equals_the_published_one(case, size):
    weights, expected = cases.load(case)
    model = published.build("samam", weights)
    assert isinstance(model, SaMam)
    content, style = image(200, 1, *size), image(201, 1, 64, 128)
    code = model.encode_style(style)
    assert error(model.content_encoder(content)[:, ::4], expected["content_features"]) < TOLERANCE
    assert error(code, expected["style_embedding"]) < TOLERANCE
    assert error((model.stylize(content, code) + 1) / 2, expected["stylized"]) < TOLERANCE


def test_a_converted_file_stylizes(tmp_path):
    weights, expected = cases.load("samam_p8")
    torch.save(weights, tmp_path / "samam.pth")
    converted = convert(tmp_path / "samam.pth", tmp_path / "samam.safetensors")
    assert converted.kind == converted.published_kind == "samam"
    stylizer = mambastyle.load(tmp_path / "samam.safetensors", device="cpu")
    content, style = image(200, 1, 64, 96), image(201, 1, 64, 128)
    stylized = stylizer.stylize(content[0], style[0], output="tensor")
    # Pictures are clamped.
    assert error((stylized[None] + 1) / 2, expected["stylized"].clip(0, 1)) < TOLERANCE


def test_a_file_with_other_patches_is_refused():
    with pytest.raises(published.PublishedError, match=r"samam: lacks content_encoder\.0\.proj\.weight"):
        published.build("samam", {"content_encoder.0.proj.weight": torch.zeros(256, 3, 16, 16)})
