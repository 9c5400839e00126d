"""Which networks judge: published weights by path, the name of each with its numbers."""

import pytest
import torch
from safetensors.torch import save_file
from tests.golden import cases

from mambastyle.evaluation.judges import Judges
from mambastyle.features.small import SmallFeatures, SmallFeaturesConfig


def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_published_weights_are_found_by_path_and_fill_their_columns(tmp_path, monkeypatch):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    state, expected = cases.load("lpips_squeeze")
    state |= {key: value for key, value in expected.items() if key.startswith("lin")}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "lpips.safetensors")
    judges = Judges.found(judge_files=(tmp_path / "lpips.safetensors",))
    assert judges.measures("lpips")
    assert judges.measures("l2_outside")
    assert not judges.measures("fd_inception_originals")
    assert not judges.measures("perceptual_squeeze")
    distances = judges.pair_distances(pictures(), pictures().flip(0))
    assert list(distances) == ["lpips"]
    assert (distances["lpips"][[0, 2]] > 0.01).all()
    assert distances["lpips"][1] == 0


def test_a_file_of_another_network_is_no_judge(tmp_path):
    state, _ = cases.load("vgg19")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "vgg.safetensors")
    with pytest.raises(ValueError, match=r"vgg\.safetensors is no judge: give weights of LPIPS"):
        Judges.found(judge_files=(tmp_path / "vgg.safetensors",))


def test_set_distances_of_equal_sets_are_none():
    torch.manual_seed(0)
    judges = Judges(small=SmallFeatures(SmallFeaturesConfig(32, (4, 6), (1, 1))).eval())
    pooled = judges.pooled(pictures())
    found = judges.set_distances(pooled, pooled, "_kept")
    assert set(found) == {"fd_small_kept", "kd_small_kept", "kd_small_kept_deviation"}
    assert found["fd_small_kept"] == pytest.approx(0, abs=1e-6)
    assert found["kd_small_kept"] <= 0
