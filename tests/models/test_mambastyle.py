"""Every variant of the ablation keeps shapes, keeps pictures apart and has no dead parameters."""

from dataclasses import replace

import pytest
import torch
from tests.published_files import MODEL

from mambastyle.models.mambastyle import (
    CONFIGS,
    KAOKORE64,
    VARIANTS,
    Inversion,
    MambaStyle,
    MambaStyleConfig,
    variant_of,
)
from mambastyle.models.stylegan2 import StyleGAN2Config

TINY = replace(MODEL, blocks=(1, 2, 2, 1), fpn_width=16)
GENERATOR_1024 = 30_370_060
"""Parameters of the published 1024 px generator."""


def tiny_model(**changes) -> MambaStyle:
    torch.manual_seed(0)
    return MambaStyle(replace(TINY, **changes))


def pictures(batch: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def directions(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 8, 24, generator=torch.Generator().manual_seed(2))


MIXERS_AND_FUSER = [
    pytest.param({"mixer": mixer, "fuser": fuser}, id=f"{mixer}-{'fuser' if fuser else 'no-fuser'}")
    for mixer in ("ss2d", "identity-scan", "vit", "none")
    for fuser in (True, False)
]


@pytest.mark.parametrize("changes", MIXERS_AND_FUSER)
def test_shapes_with_height_other_than_width(changes):
    ws, feature = tiny_model(**changes)(pictures(), directions())
    assert ws.shape == (2, 8, 24)
    assert feature is not None
    assert feature.shape == (2, 12, 16, 24)


@pytest.mark.parametrize("changes", MIXERS_AND_FUSER)
@torch.no_grad()
def test_a_batch_equals_its_pictures_one_by_one(changes):
    model = tiny_model(**changes).eval()
    together = model(pictures(), directions())
    apart = [model(pictures()[i : i + 1], directions()[i : i + 1]) for i in range(2)]
    for whole, parts in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pictures_edit_does_not_depend_on_the_other_directions_of_the_batch():
    model = tiny_model().eval()
    encoded = model.encoder(pictures())
    first = model.edit(encoded, directions()).feature
    second = model.edit(encoded, directions() * torch.tensor([1.0, -3.0])[:, None, None]).feature
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-2)


@pytest.mark.parametrize("changes", MIXERS_AND_FUSER)
def test_every_parameter_gets_a_gradient(changes):
    model = tiny_model(**changes)
    ws, feature = model(pictures(), directions())
    assert feature is not None
    weights = torch.randn(feature.shape, generator=torch.Generator().manual_seed(3))
    (ws.square().mean() + (feature * weights).mean()).backward()
    dead = [
        name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().any()
    ]
    assert dead == []


@torch.no_grad()
def test_inversion_is_the_edit_by_zero_and_adds_nothing_to_the_latents():
    model = tiny_model().eval()
    encoded = model.encoder(pictures())
    inverted = model.edit(encoded)
    zero = model.edit(encoded, torch.zeros(2, 8, 24))
    torch.testing.assert_close(inverted.ws, encoded.ws)
    torch.testing.assert_close(inverted.feature, zero.feature)


@torch.no_grad()
def test_a_cached_direction_feature_gives_the_same_edit():
    model = tiny_model().eval()
    assert model.fuser is not None
    encoded = model.encoder(pictures())
    direction = directions(1)
    cached = model.fuser.direction_feature(direction, (16, 24))
    edited = model.edit(encoded, direction.expand(2, -1, -1), cached)
    torch.testing.assert_close(edited.feature, model.edit(encoded, direction.expand(2, -1, -1)).feature)
    assert model.fuser.direction_feature(direction).shape == (1, 12, 16, 16)


def test_a_model_without_a_feature_encodes_into_w_plus_alone():
    model = tiny_model(feature=False, fuser=False)
    encoded = model.encoder(pictures())
    assert encoded.feature is None
    edited = model.edit(encoded, directions())
    assert edited.feature is None
    torch.testing.assert_close(edited.ws, encoded.ws + directions())
    edited.ws.square().mean().backward()
    dead = [
        name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().any()
    ]
    assert dead == []


@torch.no_grad()
def test_latents_alone_can_be_edited():
    edited = tiny_model().edit(Inversion(torch.zeros(2, 8, 24), None), directions())
    assert edited.feature is None
    torch.testing.assert_close(edited.ws, directions())


def test_the_papers_parameter_counts():
    def count(**changes) -> int:
        with torch.device("meta"):
            model = MambaStyle(MambaStyleConfig(**changes))
        return sum(parameter.numel() for parameter in model.parameters())

    assert count() + GENERATOR_1024 == 101_936_396
    # Measured on the published modules, in millions; "Final" less its dead tensors is above.
    assert (count(mixer="none") + GENERATOR_1024) / 1e6 == pytest.approx(89.95, abs=0.005)
    assert (count(mixer="vit") + GENERATOR_1024) / 1e6 == pytest.approx(108.87, abs=0.005)
    # The encoder's three published blocks hold 524,800 dead parameters each.
    assert (count(fuser=False) + 3 * 524_800 + GENERATOR_1024) / 1e6 == pytest.approx(87.12, abs=0.005)


@pytest.mark.parametrize(("name", "resolution"), [("faces1024", 1024), ("faces256", 256), ("cars512", 512)])
def test_the_named_sizes_fit_the_published_generators(name, resolution):
    config, generator = CONFIGS[name], StyleGAN2Config(resolution=resolution)
    assert (config.num_ws, config.w_dim) == (generator.num_ws, generator.w_dim)
    assert generator.layer_shape(config.feature_layer) == (config.feature_channels, config.feature_size)


@pytest.mark.parametrize("base", CONFIGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_size_has_every_row_of_the_ablation(base, variant):
    config = variant_of(CONFIGS[base], variant)
    same = variant in ("final", "no-le")
    assert (config == CONFIGS[base]) == same
    with torch.device("meta"):
        assert (MambaStyle(config).fuser is None) == (variant in ("no-fuser", "w-plus"))


def test_the_small_model_fits_its_generator():
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MambaStyle(KAOKORE64).parameters())
    assert 3e6 < parameters < 6e6
    assert KAOKORE64.feature_size == 32
    assert replace(KAOKORE64, strides=(2, 2, 1, 2), feature_layer=5, feature_channels=128).feature_size == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_split": (4, 4, 8)}, r"latent_split \(4, 4, 8\) must add up to num_ws 18"),
        ({"mixer": "mlp"}, "mixer must be one of"),
        ({"feature": False}, "without feature there is nothing to fuse: set fuser to false"),
        ({"fpn_width": 500}, "64 channels do not divide fpn_width 500"),
        ({"image_size": 250}, "image_size 250 must be a multiple of 16"),
        ({"direction_tokens": 16}, "direction_tokens 16 must equal direction_width 32"),
        ({"frame": (0, 512)}, r"frame must be a height and a width of 1 or more, got \(0, 512\)"),
        ({"head_pools": ((64, 9, 9),)}, "head_pools must name three scales, got 1"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        MambaStyleConfig(**changes)


def test_wrong_sizes_say_what_to_do():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"width 44 is not a multiple of 8: resize the image or pad it"):
        model(pictures(width=44))
    with pytest.raises(ValueError, match=r"expected a direction \(batch, 8, 24\), got \(2, 7, 24\)"):
        model(pictures(), torch.zeros(2, 7, 24))
    encoded = model.encoder(pictures())
    assert model.fuser is not None
    assert encoded.feature is not None
    with pytest.raises(ValueError, match="expected one direction for each of 2 pictures, got 1"):
        model.fuser(encoded.feature, directions(1))
