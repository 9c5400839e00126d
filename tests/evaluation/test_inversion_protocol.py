"""The inversion protocol on tiny random networks: rows, units, and methods that do what they say."""

import json

import pytest
import torch

from mambastyle import checkpoints
from mambastyle.api import Inverter
from mambastyle.evaluation import inversion
from mambastyle.evaluation.inversion import Method
from mambastyle.evaluation.judges import Judges
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
def inverter(model, generator) -> Inverter:
    return Inverter(model, generator, Directions(), device="cpu")


@pytest.fixture(autouse=True)
def _no_squeezenet(monkeypatch) -> None:
    """Its smallest picture is 21 px, and these are of 16."""
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)


@pytest.fixture
def judges() -> Judges:
    config = SmallFeaturesConfig(
        resolution=16, widths=(4, 6), blocks=(1, 1), heads=(Head("gender", ("male", "female")),)
    )
    return Judges(small=SmallFeatures(config).eval().requires_grad_(False))


@pytest.fixture
def pictures(generator) -> torch.Tensor:
    return generator(torch.randn(3, 12)).clamp(-1, 1)


def test_a_method_renders_every_picture_moved_by_an_offset(inverter, pictures):
    method = Method("ours", inverter)
    offset = torch.randn(6, 12)
    inverted = method.invert(pictures)
    expected = inverter.render(inverter.invert(pictures), output="tensor")
    torch.testing.assert_close(method.render(inverted), expected, rtol=1e-4, atol=1e-5)
    moved = method.render(inverted, offset)
    alone = method.render(method.invert(pictures[1:2]), offset)
    torch.testing.assert_close(moved[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved, expected)


def test_latents_alone_ignore_the_feature(inverter, generator, pictures):
    method = Method("latents alone", inverter, use_feature=False)
    inverted = method.invert(pictures)
    assert inverted.feature is None
    expected = generator.synthesis(inverted.ws + generator.mapping.w_avg).clamp(-1, 1)
    torch.testing.assert_close(method.render(inverted), expected, rtol=1e-4, atol=1e-5)


def test_table_has_a_row_per_method_and_leaves_out_what_it_cannot_measure(
    inverter, judges, pictures, tmp_path
):
    methods = [
        Method("ours", inverter),
        Method("mean w", inverter, "mean-w"),
        Method("W+", inverter, "optimise", steps=2, count=2),
    ]
    table = inversion.compare(
        pictures, methods, judges, data="random pictures", batch=2, names=["a", "b", "c"]
    )
    assert "3 random pictures, 16 x 16 px" in table.title
    assert [(row["method"], row["count"]) for row in table.rows] == [("ours", 3), ("mean w", 3), ("W+", 2)]
    assert "fd_squeeze" not in table.columns
    assert "lpips" not in table.columns
    order = ["method", "count", "l2", "fd_small", "ms_ssim", "parameters", "gmacs", "milliseconds"]
    assert list(table.columns) == order
    row, average, _ = table.rows
    assert row["l2_interval"][0] <= row["l2"] <= row["l2_interval"][1]
    assert row["fd_small"] > 0
    assert row["milliseconds"] > 0
    assert average["parameters"] < row["parameters"]
    assert average["gmacs"] < row["gmacs"]
    # Three cases and the original beside the two methods that saw every picture.
    assert table.figures["cases"].shape[0] == 3
    markdown, file = table.write(tmp_path / "inversion")
    assert "| ours |" in markdown.read_text()
    assert "![cases](inversion-cases.png)" in markdown.read_text()
    assert (tmp_path / "inversion-cases.png").is_file()
    assert json.loads(file.read_text())["rows"][1]["method"] == "mean w"


def test_bfloat16_is_measured_and_said_where_nothing_optimises(tiny_model_folder, judges, pictures):
    rows, notes = [], []
    for precision in ("fp32", "bf16"):
        methods = inversion.load_methods(
            {"ours": tiny_model_folder}, others=[("optimise", 2)], device="cpu", precision=precision
        )
        table = inversion.compare(pictures, methods, judges)
        rows.append(table.rows)
        notes.append([note for note in table.notes if "bfloat16" in note])
    assert [len(found) for found in notes] == [0, 1]
    (ours, ours_bf16), (searched, searched_bf16) = zip(*rows, strict=True)
    assert ours["l2"] != ours_bf16["l2"]
    assert ours["l2"] == pytest.approx(ours_bf16["l2"], rel=0.05)
    assert searched["l2"] == pytest.approx(searched_bf16["l2"], rel=0.05)


def test_cases_are_chosen_by_the_distance_alone():
    originals = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 64, 64) / 4
    ranking = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4])
    sheet = inversion.cases(originals, {"same": originals}, ranking, each=1)
    found = []
    for index in (1, 0, 2):  # least, median, most
        value = float(originals[index, 0, 0, 0])
        found.append(bool(((sheet - value).abs().amax(0) < 0.02).sum() >= 2 * 64 * 64))
    assert found == [True, True, True]
    assert not bool(((sheet - 0.75).abs().amax(0) < 0.02).sum() >= 64 * 64)


def test_other_ways_use_the_first_models_generator(tiny_model_folder):
    methods = inversion.load_methods(
        {"ours": tiny_model_folder, "alone": tiny_model_folder},
        w_plus_only=["alone"],
        others=[("optimise", 5), ("pti", None), ("mean-w", None)],
        others_count=2,
        seed=3,
    )
    names = [method.name for method in methods]
    assert names == ["ours", "alone", "W+ optimisation, 5 steps", "PTI", "mean w"]
    assert [method.use_feature for method in methods[:2]] == [True, False]
    assert methods[2].inverter is methods[0].inverter
    assert [(method.steps, method.seed, method.count) for method in methods[2:]] == [
        (5, 3, 2),
        (None, 3, 2),
        (None, 3, None),
    ]


def test_interrupted_evaluation_goes_on_with_what_was_found(
    tiny_model_folder, pictures, tmp_path, monkeypatch
):
    folder = tmp_path / "found"

    def load(steps=3, keep_in=folder):
        kind = {"others": [("optimise", steps)], "keep_in": keep_in, "device": "cpu"}
        return inversion.load_methods({"ours": tiny_model_folder}, **kind)[1]

    whole = inversion.invert_all(load(keep_in=None), pictures)
    method = load()
    inversion.invert_all(method, pictures[:2], batch=1)
    assert len(list(folder.iterdir())) == 2
    searched = []
    invert = method.inverter.invert
    monkeypatch.setattr(
        method.inverter, "invert", lambda image, **kind: searched.append(len(image)) or invert(image, **kind)
    )
    rest = inversion.invert_all(method, pictures)
    assert searched == [1]
    kept = [checkpoints.read_header(path).card["seconds"] for path in folder.iterdir()]
    assert len(kept) == 3
    assert rest.seconds > sum(kept) > 0
    torch.testing.assert_close(rest.rendered, whole.rendered, rtol=0, atol=1e-5)
    assert sum(map(len, rest.inverted)) == len(pictures)
    assert inversion.invert_all(method, pictures).rendered.equal(rest.rendered)
    assert searched == [1]
    # Another number of steps is another method.
    inversion.invert_all(load(steps=4), pictures[:1])
    assert len(list(folder.iterdir())) == 4


def test_perfect_inversion_has_no_distance(judges, pictures):
    numbers = inversion.distances(pictures, pictures, judges)
    assert numbers["l2"] == 0
    assert numbers["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert numbers["fd_small"] == pytest.approx(0, abs=1e-5)


def test_facade_is_measured_on_anything_it_reads(inverter, judges, pictures):
    large = torch.nn.functional.interpolate(pictures, (40, 50))
    numbers = inversion.evaluate(inverter, [*large], judges)
    assert numbers["count"] == 3
    assert {"l2", "psnr", "ms_ssim", "fd_small", "kd_small", "milliseconds"} <= set(numbers)
    assert not any(name.endswith("_interval") for name in numbers)


def test_table_writes_missing_numbers_as_dashes_and_null():
    table = Table("t", {"a": "A", "b": "B"}, [{"a": 0.123456, "b": float("nan"), "c": 1}], ["note."])
    assert "| 0.1235 | – |" in table.markdown()
    table.rows[0]["a_interval"] = [0.1, 0.2]
    assert "| 0.1235 (0.1 to 0.2) | – |" in table.markdown()
    del table.rows[0]["a_interval"]
    assert "- note." in table.markdown()
    assert table.to_dict()["rows"] == [{"a": 0.123456, "b": None, "c": 1}]
