"""The small network: any size of picture, heads by name, and files that say what they are."""

import pytest
import torch

from mambastyle import checkpoints
from mambastyle.features import small
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig

CONFIG = SmallFeaturesConfig(
    resolution=16,
    widths=(4, 8),
    blocks=(1, 2),
    heads=(Head("gender", ("male", "female")), Head("status", ("noble", "warrior", "commoner"))),
)


@pytest.fixture
def network() -> SmallFeatures:
    torch.manual_seed(0)
    network = SmallFeatures(CONFIG)
    network(torch.randn(8, 3, 20, 16))  # running statistics other than the initial ones
    return network.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_batch_of_two_is_twice_a_batch_of_one_at_any_aspect(network, images):
    both = network.pooled(images)
    assert both.shape == (2, network.num_features)
    for i in range(2):
        torch.testing.assert_close(network.pooled(images[i : i + 1])[0], both[i], rtol=1e-4, atol=1e-6)


def test_short_side_decides_the_size_of_the_maps(network, images):
    maps = network(images)
    assert {name: tuple(m.shape[1:]) for name, m in maps.items()} == {
        "stage1": (4, 8, 12),
        "stage2": (8, 4, 6),
    }


def test_heads_answer_by_name_in_the_order_of_their_labels(network, images):
    logits = network.classify(images)
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        "gender": (2, 2),
        "status": (2, 3),
    }
    assert network.labels("status")[1] == "warrior"
    assert torch.equal(network.predict(images, "status"), logits["status"].argmax(1))
    with pytest.raises(ValueError, match="no head 'age'"):
        network.classify(images, ["age"])


def test_saved_and_loaded_network_is_frozen_and_gives_the_same(network, images, tmp_path):
    path = tmp_path / "features.safetensors"
    small.save(path, network, {"note": "random"})
    loaded = small.load(path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    # Half precision on disk: 11 bits per weight.
    torch.testing.assert_close(loaded.pooled(images), network.pooled(images), rtol=5e-3, atol=5e-3)


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    checkpoints.save(path, {"a": torch.zeros(1)}, kind="directions", config={})
    with pytest.raises(checkpoints.CheckpointError, match="small-features"):
        small.load(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (4,), "blocks": (1, 1)}, "one count of blocks"),
        ({"resolution": 18, "widths": (4, 8), "blocks": (1, 1)}, "not a multiple of 4"),
        ({"heads": (Head("a", ("x", "y")), Head("a", ("x", "y")))}, "names of heads must differ"),
    ],
)
def test_impossible_configurations_fail_when_made(values, message):
    with pytest.raises(ValueError, match=message):
        SmallFeaturesConfig(**values)


def test_head_needs_two_different_labels():
    with pytest.raises(ValueError, match="two or more different labels"):
        Head("gender", ("male", "male"))
