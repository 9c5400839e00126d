"""Built from the published names, each network gives what the published one gave with the same weights."""

import sys

import pytest
import torch
from tests.golden import cases
from tests.golden.cases import TOLERANCE, error, image, normal

from mambastyle import published


def check(outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, output in outputs.items():
        assert error(output, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("source", ["state dict", "pickle"])
@torch.no_grad()
def test_stylegan2_of_nvidia_with_classes(source):
    state, expected = cases.load("stylegan2_nvidia32_cond")
    if source == "pickle":
        generator = published.load(cases.FOLDER / "stylegan2_nvidia32_cond.pkl")
    else:
        generator = published.build("stylegan2-nvidia", state)
    assert not generator.training
    ws = generator.mapping(normal(410, 2, 128), expected["c"], truncation_psi=0.7)
    check({"ws": ws, "image": generator.synthesis(ws)}, expected)


@torch.no_grad()
def test_stylegan2_of_nvidia():
    state, expected = cases.load("stylegan2_nvidia64")
    generator = published.build("stylegan2-nvidia", state)
    ws = generator.mapping(normal(400, 2, 128), truncation_psi=0.7)
    check({"ws": ws, "image": generator.synthesis(ws)}, expected)


@torch.no_grad()
def test_stylegan2_in_the_pt_layout_with_a_feature():
    state, expected = cases.load("stylegan2_rosinality256")
    average = torch.linspace(-1, 1, 512)
    generator = published.build("stylegan2-rosinality", {"g_ema": state, "latent_avg": average})
    torch.testing.assert_close(generator.mapping.w_avg, average)
    ws, feature = 0.7 * normal(308, 1, 14, 512), 0.5 * normal(309, 1, 512, 64, 64)
    outputs = {
        "w": generator.mapping.w(normal(307, 2, 512)),
        "image": generator.synthesis(ws)[:, :, ::4, ::4],
        "image_feature": generator.synthesis(ws, feature)[:, :, ::4, ::4],
    }
    check(outputs, expected)


@pytest.mark.parametrize("name", ["alex", "vgg", "squeeze"])
@torch.no_grad()
def test_lpips(name):
    state, expected = cases.load(f"lpips_{name}")
    state |= {key: expected.pop(key) for key in list(expected) if key.startswith("lin")}
    lpips = published.build(f"lpips-{name}", state)
    a, b = image(500, 2, 64, 80), image(501, 2, 64, 80)
    far, near = lpips(a, b), lpips(a, 0.9 * a + 0.1 * b)
    assert far.shape == (2,)
    # Of two distances the deviation says little, so each is compared by itself as well.
    check({"far": far[:, None, None, None], "near": near[:, None, None, None]}, expected)
    torch.testing.assert_close(far, expected["far"].flatten(), rtol=1e-5, atol=0)
    torch.testing.assert_close(near, expected["near"].flatten(), rtol=1e-5, atol=0)
    assert lpips(a, a).abs().max() == 0


@pytest.mark.parametrize(("name", "seed", "height"), [("vgg19", 502, 64), ("vgg_normalised", 700, 72)])
@torch.no_grad()
def test_vgg(name, seed, height):
    state, expected = cases.load(name)
    maps = published.build(name.replace("_", "-"), state)(image(seed, 2, height, 96))
    assert list(maps) == ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
    check({key: torch.stack([x.mean((2, 3)), x.std((2, 3))], -1) for key, x in maps.items()}, expected)


@torch.no_grad()
def test_arcface():
    state, expected = cases.load("arcface_irse50")
    network = published.build("arcface-irse50", state)
    check({"embedding": network(image(600, 2, 112, 112))}, expected)


@torch.no_grad()
def test_face_parsing():
    state, expected = cases.load("face_parsing_unet")
    levels = published.build("face-parsing-unet", state)(image(601, 1, 512, 512))
    check({key: level[:, ::1024] for key, level in levels.items()}, expected)


@torch.no_grad()
def test_inception_of_the_fid():
    state, expected = cases.load("fid_inception")
    network = published.build("fid-inception", state)
    check({"features": network(image(503, 2, 128, 160))}, expected)


def test_no_judge_needs_torchvision():
    assert "torchvision" not in sys.modules
