"""The inversion protocol on tiny random networks: rows, units, and methods that do what they say."""

import json

import pytest
import torch

from mambastyle.api import Inverter
from mambastyle.evaluation import inversion
from mambastyle.evaluation.inversion import EncoderMethod, Judges, OptimisationMethod
from mambastyle.evaluation.table import Table
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig
from mambastyle.latents.directions import Directions
from mambastyle.models.mambastyle import MambaStyle
from mambastyle.models.stylegan2 import Generator


@pytest.fixture
def generator(tiny_generator_config) -> Generator:
    return Generator(tiny_generator_config).eval().requires_grad_(False)


@pytest.fixture
def model(tiny_mambastyle_config) -> MambaStyle:
    return MambaStyle(tiny_mambastyle_config).eval().requires_grad_(False)


@pytest.fixture
def judges() -> Judges:
    config = SmallFeaturesConfig(
        resolution=16, widths=(4, 6), blocks=(1, 1), heads=(Head("gender", ("male", "female")),)
    )
    return Judges(small=SmallFeatures(config).eval().requires_grad_(False))


@pytest.fixture
def pictures(generator) -> torch.Tensor:
    return generator(torch.randn(3, 12)).clamp(-1, 1)


def test_encoder_method_renders_what_the_facade_renders(model, generator, pictures):
    method = EncoderMethod("ours", model, generator)
    inverter = Inverter(model, generator, Directions())
    offset = torch.randn(6, 12)
    encoded = method.encode(pictures)
    expected = inverter.render(inverter.invert(pictures), output="tensor")
    torch.testing.assert_close(method.render(encoded), expected, rtol=1e-4, atol=1e-5)
    moved = method.render(encoded, offset)
    alone = method.render(method.encode(pictures[1:2]), offset)
    torch.testing.assert_close(moved[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved, expected)


def test_w_plus_only_ignores_the_feature(model, generator, pictures):
    method = EncoderMethod("W+ only", model, generator, use_feature=False)
    encoded = method.encode(pictures)
    assert encoded.feature is None
    expected = generator.synthesis(encoded.ws + generator.mapping.w_avg).clamp(-1, 1)
    torch.testing.assert_close(method.render(encoded), expected)


def test_optimisation_approaches_the_picture_and_keeps_pictures_apart(generator, pictures):
    method = OptimisationMethod("W+", generator, None, steps=60)
    both = method.encode(pictures[:2])
    before = inversion.metrics.l2(method.render(both._replace(ws=torch.zeros_like(both.ws))), pictures[:2])
    assert (inversion.metrics.l2(method.render(both), pictures[:2]) < 0.3 * before).all()
    alone = OptimisationMethod("W+", generator, None, steps=3).encode(pictures[1:2])
    together = OptimisationMethod("W+", generator, None, steps=3).encode(pictures[:2])
    # Adam divides by the gradient's size: a last-digit difference between batch sizes grows with every step.
    torch.testing.assert_close(alone.ws[0], together.ws[1], rtol=1e-2, atol=1e-3)


def test_table_has_a_row_per_method_and_leaves_out_what_it_cannot_measure(
    model, generator, judges, pictures, tmp_path
):
    methods = [EncoderMethod("ours", model, generator), OptimisationMethod("W+", generator, None, steps=2)]
    table = inversion.compare(pictures, methods, judges, data="random pictures", batch=2)
    assert "3 random pictures, 16 x 16 px" in table.title
    assert [row["method"] for row in table.rows] == ["ours", "W+"]
    assert "fd_squeeze" not in table.columns
    row = table.rows[0]
    assert row["l2_interval"][0] <= row["l2"] <= row["l2_interval"][1]
    assert row["fd_small"] > 0
    assert row["milliseconds"] > 0
    markdown, file = table.write(tmp_path / "inversion")
    assert "| ours |" in markdown.read_text()
    assert json.loads(file.read_text())["rows"][1]["method"] == "W+"


def test_perfect_inversion_has_no_distance(judges, pictures):
    numbers = inversion.distances(pictures, pictures, judges)
    assert numbers["l2"] == 0
    assert numbers["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert numbers["fd_small"] == pytest.approx(0, abs=1e-5)


def test_facade_is_measured_on_anything_it_reads(model, generator, judges, pictures):
    inverter = Inverter(model, generator, Directions())
    large = torch.nn.functional.interpolate(pictures, (40, 50))
    numbers = inversion.evaluate(inverter, [*large], judges)
    assert numbers["count"] == 3
    assert {"l2", "psnr", "ms_ssim", "fd_small", "kd_small", "milliseconds"} <= set(numbers)
    assert not any(name.endswith("_interval") for name in numbers)


def test_table_writes_missing_numbers_as_dashes_and_null():
    table = Table("t", {"a": "A", "b": "B"}, [{"a": 0.123456, "b": float("nan"), "c": 1}], ["note."])
    assert "| 0.1235 | – |" in table.markdown()
    assert "- note." in table.markdown()
    assert table.to_dict()["rows"] == [{"a": 0.123456, "b": None, "c": 1}]
