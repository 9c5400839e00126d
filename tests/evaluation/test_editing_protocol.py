"""The editing protocol: regions, the judge's share, and a table over methods, edits and strengths."""

import pytest
import torch

from mambastyle.api import Inverter
from mambastyle.evaluation import editing
from mambastyle.evaluation.editing import Edit, changed_region, l2_outside, share_judged
from mambastyle.evaluation.inversion import Method
from mambastyle.evaluation.judges import Judges
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig
from mambastyle.latents.directions import Direction, Directions
from mambastyle.models.mambastyle import MambaStyle
from mambastyle.models.stylegan2 import Generator


@pytest.fixture
def judge() -> SmallFeatures:
    heads = (Head("gender", ("male", "female")), Head("status", ("noble", "warrior")))
    config = SmallFeaturesConfig(resolution=16, widths=(4, 6), blocks=(1, 1), heads=heads)
    return SmallFeatures(config).eval().requires_grad_(False)


@pytest.fixture
def method(tiny_generator_config, tiny_mambastyle_config) -> Method:
    generator = Generator(tiny_generator_config).eval().requires_grad_(False)
    model = MambaStyle(tiny_mambastyle_config).eval().requires_grad_(False)
    return Method("ours", Inverter(model, generator, Directions(), device="cpu"))


def direction(name: str) -> Direction:
    return Direction.from_w(name, torch.randn(12), 6)


def test_region_is_where_most_changed_and_covers_its_part():
    before = torch.zeros(2, 3, 32, 40)
    after = before.clone()
    after[0, :, 4:20, 4:20] = 1.0
    region = changed_region(before, after, 0.1)
    assert region.shape == (2, 1, 32, 40)
    assert region[0, 0, 12, 12]
    assert not region[0, 0, 28, 30]
    assert float(region[0].float().mean()) == pytest.approx(0.1, abs=0.05)
    assert not region[1].any()


def test_difference_inside_the_region_does_not_count():
    image, other = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    region[..., :2] = True
    other[..., :2] = 1.0
    assert l2_outside(image, other, region).item() == 0
    other[..., 2:] = 0.5
    assert l2_outside(image, other, region).item() == pytest.approx(0.25)


def test_share_counts_the_likeliest_label(judge):
    judge.heads["gender"].weight.data.zero_()
    judge.heads["gender"].bias.data = torch.tensor([0.0, 1.0])
    images = torch.zeros(3, 3, 16, 16)
    assert share_judged(judge, images, "gender", "female") == 1
    assert share_judged(judge, images, "gender", "male") == 0
    with pytest.raises(ValueError, match="no label 'woman'"):
        share_judged(judge, images, "gender", "woman")


def test_standard_edits_go_both_ways_for_gender():
    edits = editing.standard_edits([direction("gender"), direction("noble")], ["noble"])
    assert [(edit.label, edit.sign) for edit in edits] == [("female", 1), ("male", -1), ("noble", 1)]
    with pytest.raises(ValueError, match="no direction named 'warrior'"):
        editing.standard_edits([direction("gender")], ["warrior"])


def test_table_holds_every_method_edit_and_strength(method, judge):
    originals = torch.rand(6, 3, 16, 16) * 2 - 1
    labels = {"gender": torch.tensor([0, 0, 0, 1, 1, 0]), "status": torch.tensor([0, 1, 0, 1, 0, 1])}
    edits = editing.standard_edits([direction("gender"), direction("noble")], ["noble"])
    w_only = Method("W+ only", method.inverter, use_feature=False)
    table = editing.compare(
        originals, labels, [method, w_only], edits, judge, Judges(small=judge), strengths=(0.0, 1.0), batch=2
    )
    assert len(table.rows) == 2 * 3 * 2
    first, second = table.rows[0], table.rows[1]
    assert (first["edit"], first["count"], first["strength"]) == ("to female", 4, 0.0)
    assert second["strength"] == 1.0
    assert 0 <= second["changed"] <= 1
    assert first["fd_small_originals"] == second["fd_small_originals"]
    assert first["fd_small"] != second["fd_small"]
    assert "fd_squeeze" not in table.columns
    assert {"fd_small", "fd_small_kept", "fd_small_originals", "similarity_small"} <= set(table.columns)
    # B against B' is what the edit adds to the inversion's own distance.
    assert first["fd_small_kept"] != first["fd_small"]
    assert first["similarity_small_interval"][0] <= first["similarity_small"] <= 1
    assert set(table.figures) == {"to-female", "to-male", "to-noble"}
    assert table.rows[2]["count"] == 2  # to male: the two women


def test_edit_that_nobody_or_everybody_has_is_an_error(method, judge):
    originals = torch.rand(2, 3, 16, 16) * 2 - 1
    edit = Edit("to female", direction("gender"), "gender", "female")
    labels = {"gender": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match="with and without female"):
        editing.compare(originals, labels, [method], [edit], judge, Judges())
