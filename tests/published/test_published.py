"""Files are recognised by what they hold, converted whole, and a tensor too many or too few is named."""

import argparse
import logging
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mambastyle import checkpoints, published
from mambastyle.cli import app
from mambastyle.features.face_parsing import FaceParsingUNet
from mambastyle.features.lpips import LPIPS
from mambastyle.features.vgg import NormalisedVGG19
from mambastyle.latents.directions import Directions
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.published import PublishedError, judges, stylegan2
from mambastyle.published.directions import StyleClipGlobal

CONFIG = StyleGAN2Config(
    resolution=16, z_dim=24, w_dim=24, mapping_layers=2, widths=(32, 16, 8), feature_layer=0
)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(1)
    return Generator(CONFIG).eval()


@pytest.fixture
def rosinality(generator) -> dict[str, torch.Tensor]:
    """The generator's tensors in the .pt layout."""
    state = {}
    for ours, tensor in generator.state_dict().items():
        name = stylegan2._rosinality_name(ours)
        # Weights and pictures have axes for the batch there.
        if ours.endswith("const"):
            tensor = tensor[None] if "blocks.0.const" in ours else tensor[None, None]
        elif name.endswith("conv.weight"):
            tensor = tensor[None]
        elif "to_rgb" in name and name.endswith(".bias") and "modulation" not in name:
            tensor = tensor.reshape(1, 3, 1, 1)
        elif ours.endswith("noise_strength"):
            tensor = tensor.reshape(1)
        state[name] = tensor.clone()
    return state | {"convs.0.conv.blur.kernel": torch.zeros(4, 4)}


@pytest.fixture
def unet() -> dict[str, torch.Tensor]:
    return FaceParsingUNet().state_dict()


def same(a: Generator, b: Generator) -> None:
    z = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(a(z), b(z))


@pytest.mark.parametrize("zipped", [True, False])
def test_generator_in_the_pt_layout_with_the_namespace_of_its_training(
    tmp_path, rosinality, generator, zipped
):
    average = rosinality.pop("latent_avg")
    whole = {"g_ema": rosinality, "latent_avg": average, "args": argparse.Namespace(size=16, note=[1, "a"])}
    path = tmp_path / "g.pt"
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    loaded = published.load(path)
    assert not loaded.training
    same(loaded, generator)


def test_a_missing_average_is_estimated_and_said(rosinality, caplog):
    del rosinality["latent_avg"]
    with caplog.at_level(logging.WARNING, "mambastyle.published"):
        loaded = published.build("stylegan2-rosinality", {"g_ema": rosinality})
    assert "estimated from 100,000 mapped samples" in caplog.text
    with torch.no_grad():
        w = loaded.mapping.w(torch.randn(50_000, 24))
    torch.testing.assert_close(loaded.mapping.w_avg, w.mean(0), atol=5 * w.std().item() / 50_000**0.5, rtol=0)


def test_convert_writes_a_generator_that_the_package_reads(tmp_path, rosinality, generator):
    torch.save({"g_ema": rosinality, "latent_avg": rosinality.pop("latent_avg")}, tmp_path / "g.pt")
    out = tmp_path / "g.safetensors"
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "g.pt"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "stylegan2-rosinality" in result.output
    assert "no commercial use" in result.output
    checkpoint = checkpoints.load(out, kind="stylegan2")
    loaded = Generator(checkpoints.config_from_dict(StyleGAN2Config, checkpoint.config))
    loaded.load_state_dict(checkpoint.part("generator."))
    same(loaded.eval(), generator)
    assert checkpoint.card["source"] == "g.pt"
    assert len(checkpoint.card["source_sha256"]) == 64


def test_convert_keeps_a_judge_readable(tmp_path, unet):
    torch.save({"state_dict": unet, "epoch": 3}, tmp_path / "unet.pth")
    out = tmp_path / "unet.safetensors"
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "unet.pth"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert checkpoints.load(out).kind == "face-parsing-unet"
    image = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(
        published.load(out).parse(image), published.build("face-parsing-unet", unet).parse(image)
    )


def test_every_kind_is_recognised_by_its_names(rosinality, unet):
    vgg = {
        judges._vgg_name("", judges._NORMALISED)(name): tensor
        for name, tensor in NormalisedVGG19().state_dict().items()
    }
    cases = {"stylegan2-rosinality": rosinality, "face-parsing-unet": unet, "vgg-normalised": vgg}
    for backbone in ("alex", "vgg", "squeeze"):
        names = LPIPS(backbone).state_dict()
        cases[f"lpips-{backbone}"] = {
            re.sub(r"^linear\.(\d)", r"lin\1.model.1", name): tensor for name, tensor in names.items()
        }
    for kind, tensors in cases.items():
        assert [name for name, known in published.KINDS.items() if known.matches(tensors)] == [kind]


def test_lpips_needs_its_backbone(tmp_path):
    state = {
        re.sub(r"^linear\.(\d)", r"lin\1.model.1", name): tensor
        for name, tensor in LPIPS("squeeze").state_dict().items()
    }
    torch.save({name: t for name, t in state.items() if "lin" in name}, tmp_path / "squeeze.pth")
    rest = {name: t for name, t in state.items() if "lin" not in name} | {
        "classifier.1.weight": torch.zeros(3)
    }
    torch.save(rest, tmp_path / "squeezenet1_1.pth")
    with pytest.raises(PublishedError, match="backbone="):
        published.load(tmp_path / "squeeze.pth")
    network = published.load(tmp_path / "squeeze.pth", backbone=tmp_path / "squeezenet1_1.pth")
    assert network.backbone == "squeeze"


def test_tensors_too_few_too_many_and_of_another_shape_are_named(tmp_path, unet):
    save_file({k: v.clone() for k, v in unet.items() if k != "final.bias"}, tmp_path / "few.safetensors")
    with pytest.raises(PublishedError, match=r"few.safetensors: face-parsing-unet: lacks final\.bias$"):
        published.load(tmp_path / "few.safetensors")
    with pytest.raises(PublishedError, match=r"has besides more\.weight$"):
        published.build("face-parsing-unet", unet | {"more.weight": torch.zeros(1)})
    with pytest.raises(PublishedError, match=r"final\.bias is \(18,\), expected \(19,\)"):
        published.build("face-parsing-unet", unet | {"final.bias": torch.zeros(18)})
    with pytest.raises(PublishedError, match="did you mean 'vgg19'"):
        published.build("vgg_19", {})
    with pytest.raises(PublishedError, match="vgg19: lacks"):
        published.load(tmp_path / "few.safetensors", kind="vgg19")


def test_directions_of_interfacegan(tmp_path):
    normal = np.random.RandomState(0).standard_normal((1, 512))
    np.save(tmp_path / "age.npy", normal)
    torch.save(torch.from_numpy(normal), tmp_path / "smile.pt")
    for name in ("age.npy", "smile.pt"):
        (direction,) = published.load(tmp_path / name).values()
        assert (direction.name, direction.space) == (name[:-4].rstrip("."), "w") or direction.name == "smile"
        assert direction.vector.shape == (18, 512)
        torch.testing.assert_close(direction.vector[7], torch.from_numpy(normal[0]).float())
    np.save(tmp_path / "plus.npy", np.random.RandomState(0).standard_normal((18, 512)).astype(np.float32))
    (direction,) = published.load(tmp_path / "plus.npy").values()
    assert direction.space == "w+"
    with pytest.raises(PublishedError, match="num_ws="):
        published.load(tmp_path / "plus.npy", num_ws=14)


def test_directions_of_ganspace_and_their_conversion(tmp_path):
    comp, std = torch.eye(3, 512), torch.tensor([3.0, 2.0, 1.0])
    torch.save({"comp": comp, "std": std, "mean": torch.zeros(1, 512)}, tmp_path / "pca.pt")
    out = tmp_path / "pca.safetensors"
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "pca.pt"), "-o", str(out), "--num-ws", "14"])
    assert result.exit_code == 0, result.output
    directions = Directions.load(out)
    assert list(directions) == ["pc0", "pc1", "pc2"]
    torch.testing.assert_close(directions["pc1"].offset(0.5)[4], comp[1])


def test_styleclip_moves_the_styles_that_its_table_says(tmp_path, generator):
    channels = [layer.affine.weight.shape[0] for layer in layers(generator)]
    table = np.random.RandomState(0).standard_normal((sum(channels), 8)).astype(np.float32)
    np.save(tmp_path / "fs3.npy", table)
    loaded = published.load(tmp_path / "fs3.npy")
    assert isinstance(loaded, StyleClipGlobal)
    text = torch.randn(8, generator=torch.Generator().manual_seed(0))
    styles = loaded.styles(text, threshold=1.0)
    assert styles.abs().max() == 1
    assert 0 < (styles == 0).sum() < len(styles)
    direction = loaded.direction("smile", text, generator, threshold=1.0, samples=500)
    w = generator.mapping.w(torch.randn(500, 24, generator=torch.Generator().manual_seed(0)))
    # The last two layers have fewer channels than w has entries, so their styles are met exactly.
    for row, (layer, part) in enumerate(zip(layers(generator), styles.split(channels), strict=True)):
        if channels[row] <= 24:
            moved = direction.vector[row] @ (layer.affine.weight * layer.affine.weight_gain).T
            torch.testing.assert_close(moved, part * layer.affine(w).std(0), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="lower threshold"):
        loaded.styles(text, threshold=1000)


def layers(generator: Generator) -> list:
    return [layer for block in generator.synthesis.blocks for layer in (block.conv0, block.conv1) if layer]
