"""Our encoder and fuser give what the published ones give with the same weights."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mambastyle import published
from mambastyle.models.mambastyle import Encoder, Fuser, MambaStyleConfig

GOLDEN = Path(__file__).parent.parent / "golden"
# The published scan adds in another order than ours; both are float32.
TOLERANCE = 1e-3


def load_case(name: str):
    """The case's published state dict and its expected arrays, and the module that makes inputs."""
    spec = importlib.util.spec_from_file_location("golden", GOLDEN / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    weights = golden.weights({key: tuple(shape) for key, shape in case["state_dict"].items()}, case["seed"])
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        expected = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return golden, {key: torch.from_numpy(value) for key, value in weights.items()}, expected


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the expected output's standard deviation."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.std()).item()


@torch.no_grad()
def test_encoder_equals_the_published_one():
    golden, weights, expected = load_case("mambastyle_encoder")
    encoder = Encoder(MambaStyleConfig()).eval()
    encoder.load_state_dict(published.mambastyle_encoder(weights))
    ws, feature = encoder(torch.from_numpy(golden.image(300, 1, 256, 256, -1, 1)))
    assert feature is not None
    assert error(ws, expected["w"]) < TOLERANCE
    assert error(feature[:, ::16, ::4, ::4], expected["feature"]) < TOLERANCE


@torch.no_grad()
def test_fuser_equals_the_published_one():
    _, weights, expected = load_case("mambastyle_fuser")
    fuser = Fuser(MambaStyleConfig()).eval()
    fuser.load_state_dict(published.mambastyle_fuser(weights))
    rng = np.random.RandomState(305)
    feature = torch.from_numpy(rng.standard_normal((1, 512, 64, 64)).astype(np.float32))
    direction = torch.from_numpy((0.5 * rng.standard_normal((1, 18, 512))).astype(np.float32))
    outputs = {
        "direction_feature": fuser.direction_feature(direction),
        "fused": fuser(feature, direction),
        "identity": fuser(feature, torch.zeros_like(direction)),
    }
    for name, output in outputs.items():
        assert error(output[:, ::16, ::4, ::4], expected[name]) < TOLERANCE, name


def test_a_missing_tensor_is_an_error():
    _, weights, _ = load_case("mambastyle_fuser")
    del weights["approximator.conv2.bias"]
    with torch.device("meta"):
        fuser = Fuser(MambaStyleConfig())
    with pytest.raises(RuntimeError, match=r"conv\.bias"):
        fuser.load_state_dict(published.mambastyle_fuser(weights), assign=True)
