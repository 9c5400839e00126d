"""SqueezeNet from a torchvision-layout file: shapes, preprocessing, gradients and what a wrong file says."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mambastyle.features.squeezenet import CHANNELS, LAYERS, MINIMUM_SIZE, SqueezeNetFeatures


def torchvision_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, so that these tests need no download."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"features.0.weight": (96, 3, 7, 7), "features.0.bias": (96,)}
    in_channels = 96
    for name, (index, channels, _) in LAYERS.items():
        if name == "relu1":
            continue
        squeeze, expand = channels // 8, channels // 2
        shapes[f"features.{index}.squeeze.weight"] = (squeeze, in_channels, 1, 1)
        shapes[f"features.{index}.squeeze.bias"] = (squeeze,)
        for kernel in (1, 3):
            shapes[f"features.{index}.expand{kernel}x{kernel}.weight"] = (expand, squeeze, kernel, kernel)
            shapes[f"features.{index}.expand{kernel}x{kernel}.bias"] = (expand,)
        in_channels = channels
    return {
        name: torch.randn(shape, generator=generator) * (0.05 if name.endswith("bias") else 0.08)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("squeezenet") / "weights.safetensors"
    save_file(torchvision_tensors(), path)
    return path


@pytest.fixture(scope="module")
def network(file: Path) -> SqueezeNetFeatures:
    return SqueezeNetFeatures(file)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 40, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_maps_have_the_stated_names_channels_and_batch_equals_singles(network, images):
    maps = network(images)
    assert list(maps) == list(LAYERS)
    assert {name: m.shape[1] for name, m in maps.items()} == CHANNELS
    for i in range(2):
        alone = network(images[i : i + 1])
        for name in LAYERS:
            torch.testing.assert_close(alone[name][0], maps[name][i], rtol=1e-4, atol=1e-3)


def test_preprocessing_and_first_convolution_follow_the_release(network, file, images):
    weights = torchvision_tensors()
    raw = (images + 1) / 2 * 255 - torch.tensor([123.0, 117.0, 104.0]).view(1, 3, 1, 1)
    expected = torch.nn.functional.conv2d(
        raw, weights["features.0.weight"], weights["features.0.bias"], stride=2
    ).relu()
    torch.testing.assert_close(network(images, ["relu1"])["relu1"], expected, rtol=1e-4, atol=1e-3)


def test_chosen_layers_are_the_same_as_of_the_whole_pass(network, images):
    chosen = network(images, ("fire3", "fire5"))
    assert list(chosen) == ["fire3", "fire5"]
    torch.testing.assert_close(chosen["fire5"], network(images)["fire5"])


def test_gradients_reach_the_picture_and_no_weight(network, images):
    images.requires_grad_()
    network.pooled(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_pooled_features_are_float32_under_bfloat16_autocast(network, images):
    with torch.autocast("cpu", torch.bfloat16):
        half = network.pooled(images)
    full = network.pooled(images)
    assert half.shape == (2, 512)
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.05 * full.norm()


def test_smallest_picture_passes_and_a_smaller_one_is_an_error(network):
    network(torch.zeros(1, 3, MINIMUM_SIZE, MINIMUM_SIZE + 1))
    with pytest.raises(ValueError, match="at least 21 px, got 20 x 64"):
        network(torch.zeros(1, 3, 20, 64))


def test_unknown_layer_is_an_error_that_lists_the_known(network, images):
    with pytest.raises(ValueError, match="no map 'fire1': choose among relu1, fire2"):
        network(images, ["fire1"])


def test_wrong_files_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    with pytest.raises(ValueError, match="set MAMBASTYLE_SQUEEZENET"):
        SqueezeNetFeatures()
    with pytest.raises(ValueError, match="no SqueezeNet file at"):
        SqueezeNetFeatures(tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SqueezeNetFeatures(broken)
    other = tmp_path / "squeezenet1_1.safetensors"
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, other)
    with pytest.raises(ValueError, match=r"expected features\.0\.weight of shape \(96, 3, 7, 7\)"):
        SqueezeNetFeatures(other)


def test_environment_variable_names_the_file(file, monkeypatch):
    monkeypatch.setenv("MAMBASTYLE_SQUEEZENET", os.fspath(file))
    assert SqueezeNetFeatures().layers["fire9"] is not None
