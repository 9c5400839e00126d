"""Our encoder and fuser give what the published ones give with the same weights."""

import numpy as np
import pytest
import torch
from tests.golden import cases

from mambastyle import published


@torch.no_grad()
def test_encoder_equals_the_published_one():
    weights, expected = cases.load("mambastyle_encoder")
    encoder = published.build("mambastyle-encoder", weights)
    ws, feature = encoder(cases.image(300, 1, 256, 256))
    assert feature is not None
    assert cases.error(ws, expected["w"]) < cases.TOLERANCE
    assert cases.error(feature[:, ::16, ::4, ::4], expected["feature"]) < cases.TOLERANCE


@torch.no_grad()
def test_fuser_equals_the_published_one():
    weights, expected = cases.load("mambastyle_fuser")
    fuser = published.build("mambastyle-fuser", weights)
    rng = np.random.RandomState(305)
    feature = torch.from_numpy(rng.standard_normal((1, 512, 64, 64)).astype(np.float32))
    direction = torch.from_numpy((0.5 * rng.standard_normal((1, 18, 512))).astype(np.float32))
    outputs = {
        "direction_feature": fuser.direction_feature(direction),
        "fused": fuser(feature, direction),
        "identity": fuser(feature, torch.zeros_like(direction)),
    }
    for name, output in outputs.items():
        assert cases.error(output[:, ::16, ::4, ::4], expected[name]) < cases.TOLERANCE, name


def test_a_missing_tensor_is_an_error():
    weights, _ = cases.load("mambastyle_fuser")
    del weights["approximator.conv2.bias"]
    with pytest.raises(published.PublishedError, match=r"lacks conv\.bias"):
        published.build("mambastyle-fuser", weights)
