"""Stylizing: any pictures, exact sizes, strength from the photo upwards, mixtures, regions, seeds."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import mambastyle as ms
from mambastyle import images
from mambastyle.api.stylizer import STYLE_SIDE, keep_colours, prepare_style, read_mask
from mambastyle.checkpoints import CheckpointError
from mambastyle.models.mamba_st import MambaST


@pytest.fixture(scope="module")
def stylizer(tiny_stylizer_folder):
    return ms.load(tiny_stylizer_folder, device="cpu")


def picture(height: int = 22, width: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


PHOTO, STYLE, OTHER = picture(), picture(18, 26, seed=1), picture(40, 12, seed=2) * 0.4 + 0.5


def run(stylizer, *arguments, **options) -> torch.Tensor:
    return stylizer.stylize(*arguments, **options, output="tensor")


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_it_is_the_networks_picture_in_exactly_the_size_of_the_photo(stylizer):
    stylized = run(stylizer, PHOTO, STYLE)
    with torch.inference_mode():
        expected = stylizer.network(PHOTO[None], STYLE[None])[0].clamp(-1, 1)
    torch.testing.assert_close(stylized, expected, rtol=1e-5, atol=1e-6)
    assert stylized.shape == PHOTO.shape
    assert differ(stylized, run(stylizer, PHOTO, OTHER)) > 0.01


def test_every_kind_of_picture_gives_the_same(stylizer, faces, tmp_path):
    style = tmp_path / "style.png"
    images.write(style, STYLE)
    expected = stylizer.stylize(faces[0], style)
    assert expected.size == (40, 48)
    with Image.open(faces[0]) as opened:
        photo = opened.convert("RGB")
    for content in (str(faces[0]), photo, np.array(photo), images.read(photo), faces[0].read_bytes()):
        assert np.array_equal(stylizer.stylize(content, images.read(style), output="numpy"), expected)


def test_lists_pair_up_or_share_what_is_alone(stylizer):
    photos, styles = [PHOTO, picture(9, 5, seed=3)], [STYLE, OTHER]
    paired = run(stylizer, photos, styles)
    assert [tuple(p.shape) for p in paired] == [(3, 22, 30), (3, 9, 5)]
    assert torch.equal(paired[1], run(stylizer, photos[1], OTHER))
    assert torch.equal(run(stylizer, photos, STYLE)[1], run(stylizer, photos[1], STYLE))
    assert torch.equal(run(stylizer, PHOTO, styles)[1], run(stylizer, PHOTO, OTHER))
    assert len(run(stylizer, [PHOTO], STYLE)) == 1
    with pytest.raises(ValueError, match="3 styles for 2 contents: give one, or one for each"):
        stylizer.stylize(photos, [STYLE] * 3)


def test_strength_begins_at_exactly_the_photo_and_goes_beyond_the_network(stylizer):
    whole = run(stylizer, PHOTO, STYLE)
    assert torch.equal(run(stylizer, PHOTO, STYLE, strength=0), PHOTO)
    assert torch.equal(run(stylizer, PHOTO, STYLE, strength=1.0), whole)
    # Continuous at both ends.
    assert differ(run(stylizer, PHOTO, STYLE, strength=1e-3), PHOTO) < 0.02
    assert differ(run(stylizer, PHOTO, STYLE, strength=1 - 1e-4), whole) < 0.01
    assert differ(run(stylizer, PHOTO, STYLE, strength=1.0001), whole) < 0.01
    steps = [run(stylizer, PHOTO, STYLE, strength=s) for s in (0.25, 0.5, 0.75)]
    away = [float((step - PHOTO).square().mean()) for step in (*steps, whole)]
    assert away == sorted(away)
    assert differ(run(stylizer, PHOTO, STYLE, strength=1.5), whole) > 1e-3


def test_keep_color_keeps_the_chroma_and_takes_the_luma(stylizer):
    photo, stylized = PHOTO * 0.3, run(stylizer, PHOTO * 0.3, STYLE) * 0.3
    kept = keep_colours(stylized, photo)
    luma = torch.tensor((0.299, 0.587, 0.114))
    torch.testing.assert_close(torch.einsum("c,chw", luma, kept), torch.einsum("c,chw", luma, stylized))
    torch.testing.assert_close(kept[0] - kept[1], photo[0] - photo[1])
    torch.testing.assert_close(kept[2] - kept[1], photo[2] - photo[1])
    assert run(stylizer, PHOTO, STYLE, keep_color=True).shape == PHOTO.shape
    # At full contrast the hue stays: differences of channels keep their ratio.
    bright = keep_colours(
        torch.full((3, 4, 5), 0.9), torch.tensor([1.0, 0.0, -0.5])[:, None, None].expand(3, 4, 5)
    )
    assert bright.max() <= 1
    ratio = (bright[0] - bright[1]) / (bright[1] - bright[2])
    torch.testing.assert_close(ratio, torch.full((4, 5), 2.0))


def test_styles_mix_by_weight(stylizer):
    alone = run(stylizer, PHOTO, STYLE)
    assert torch.equal(run(stylizer, PHOTO, styles=[STYLE]), alone)
    # A style of weight 0 counts for nothing.
    first = run(stylizer, PHOTO, styles=[STYLE, OTHER], weights=[1, 0])
    second = run(stylizer, PHOTO, styles=[STYLE, OTHER], weights=[0, 1])
    half = run(stylizer, PHOTO, styles=[STYLE, OTHER])
    assert torch.equal(half, run(stylizer, PHOTO, styles=[STYLE, OTHER], weights=[0.5, 0.5]))
    assert torch.equal(first, alone)
    middle, ends = half.mean((1, 2)), torch.stack([first.mean((1, 2)), second.mean((1, 2))])
    assert (middle >= ends.amin(0) - 0.01).all()
    assert (middle <= ends.amax(0) + 0.01).all()
    assert differ(half, first) > 1e-3
    assert differ(half, second) > 1e-3


def test_weights_that_do_not_sum_to_one_are_normalised_and_said(stylizer):
    expected = run(stylizer, PHOTO, styles=[STYLE, OTHER], weights=[0.25, 0.75])
    with pytest.warns(ms.StylizeWarning, match=r"the weights sum to 4: normalised to 0.25, 0.75"):
        stylized = run(stylizer, PHOTO, styles=[STYLE, OTHER], weights=[1, 3])
    assert torch.equal(stylized, expected)


def test_a_mask_keeps_the_photo_outside_with_a_soft_edge(stylizer):
    photo = picture(64, 96)
    whole = run(stylizer, photo, STYLE)
    mask = np.zeros((32, 48), bool)
    mask[:, :24] = True
    stylized = run(stylizer, photo, STYLE, mask=mask)
    assert torch.equal(stylized[:, :, 56:], photo[:, :, 56:])
    torch.testing.assert_close(stylized[:, :, :40], whole[:, :, :40])
    soft = read_mask(mask, 64, 96)[0, 0]
    assert ((soft > 0.02) & (soft < 0.98)).sum() >= 2
    for same in (Image.fromarray(mask), torch.from_numpy(mask), mask.astype(np.float32)):
        assert torch.equal(run(stylizer, photo, STYLE, mask=same), stylized)


def test_what_is_transparent_in_a_mask_lies_outside(stylizer):
    white = Image.new("RGBA", (48, 32), (255, 255, 255, 0))
    white.paste((255, 255, 255, 255), (0, 0, 24, 32))
    photo, mask = picture(64, 96), np.zeros((32, 48), bool)
    mask[:, :24] = True
    expected = run(stylizer, photo, STYLE, mask=mask)
    for cut_out in (white, np.asarray(white)):
        with pytest.warns(ms.ImageWarning, match="composited on black"):
            assert torch.equal(run(stylizer, photo, STYLE, mask=cut_out), expected)


def test_an_empty_mask_gives_the_photo_back_and_says_so(stylizer):
    with pytest.warns(ms.StylizeWarning, match="the mask is empty"):
        assert torch.equal(run(stylizer, PHOTO, STYLE, mask=np.zeros((5, 5), np.uint8)), PHOTO)


def test_every_style_may_have_its_region(stylizer):
    left, right = np.zeros((64, 96)), np.zeros((64, 96))
    left[:, :32], right[:, 64:] = 1, 1
    photo = picture(64, 96)
    stylized = run(stylizer, photo, styles=[STYLE, OTHER], mask=[left, right])
    torch.testing.assert_close(stylized[:, :, :24], run(stylizer, photo, STYLE)[:, :, :24])
    torch.testing.assert_close(stylized[:, :, 72:], run(stylizer, photo, OTHER)[:, :, 72:])
    assert torch.equal(stylized[:, :, 40:56], photo[:, :, 40:56])
    # Regions that overlap share.
    everywhere = np.ones((4, 4))
    both = run(stylizer, photo, styles=[STYLE, OTHER], mask=[everywhere, everywhere])
    mean = (run(stylizer, photo, STYLE) + run(stylizer, photo, OTHER)) / 2
    torch.testing.assert_close(both, mean, rtol=1e-4, atol=1e-4)


def test_the_seed_decides_the_shuffles_and_nothing_else_does(stylizer):
    first = run(stylizer, PHOTO, STYLE)
    torch.manual_seed(99)
    assert torch.equal(run(stylizer, PHOTO, STYLE), first)
    shuffled = isinstance(stylizer.network, MambaST)
    assert torch.equal(run(stylizer, PHOTO, STYLE, seed=1), first) != shuffled
    mixed = [run(stylizer, PHOTO, styles=[STYLE, OTHER], seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(mixed[0], mixed[1])
    assert torch.equal(mixed[0], mixed[2]) != shuffled


def test_the_average_of_many_shuffles_depends_less_on_the_seed(stylizer):
    def spread(average: int) -> float:
        drawn = [run(stylizer, PHOTO, STYLE, seed=seed, average=average) for seed in range(4)]
        return float(torch.stack(drawn).var(0).mean())

    if isinstance(stylizer.network, MambaST):
        assert spread(8) < 0.5 * spread(1)
    else:
        assert spread(8) == spread(1) == 0
    with pytest.raises(ValueError, match="average is 0, expected 1 or more"):
        run(stylizer, PHOTO, STYLE, average=0)


def test_a_network_trained_on_grain_gets_it_from_the_seed(stylizer):
    network = copy.deepcopy(stylizer.network)
    network.config = dataclasses.replace(network.config, grain=0.2)
    grainy = ms.Stylizer(network, device="cpu")
    flat = torch.zeros(3, 20, 24)
    first = run(grainy, flat, STYLE)
    assert torch.equal(run(grainy, flat, STYLE), first)
    assert differ(run(grainy, flat, STYLE, seed=1), first) > 1e-3
    noise = images.add_grain(flat, 0.2, torch.Generator().manual_seed(0))
    assert differ(run(stylizer, noise, STYLE), first) < 1e-6
    # The photo itself comes back without.
    assert torch.equal(run(grainy, flat, STYLE, strength=0), flat)


def test_a_style_is_encoded_once(stylizer, monkeypatch):
    calls = []
    original = stylizer.network.encode_style

    def counted(style):
        calls.append(style.shape)
        return original(style)

    monkeypatch.setattr(stylizer.network, "encode_style", counted)
    style = picture(13, 17, seed=8)
    run(stylizer, [PHOTO, OTHER], style)
    run(stylizer, PHOTO, style.clone(), seed=3)
    assert calls == [(1, 3, 13, 17)]


def test_a_large_style_is_reduced_to_the_area_of_a_square():
    assert prepare_style(picture(1200, 300)).shape == (3, 1024, 256)
    assert prepare_style(picture(STYLE_SIDE, STYLE_SIDE)).shape == (3, STYLE_SIDE, STYLE_SIDE)


@pytest.mark.parametrize(
    "style",
    [
        pytest.param(picture(1, 1), id="one-pixel"),
        pytest.param(torch.full((3, 30, 30), -1.0), id="black"),
        pytest.param(np.full((40, 8, 3), 255, np.uint8), id="white"),
        pytest.param(Image.new("RGBA", (24, 24)), id="transparent"),
    ],
)
def test_odd_styles_and_contents_give_finite_pictures(stylizer, style):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ms.ImageWarning)
        for photo in (PHOTO, picture(1, 1), torch.ones(3, 5, 40)):
            for options in ({}, {"strength": 1.5}, {"strength": 0.5, "keep_color": True}):
                stylized = run(stylizer, photo, style, **options)
                assert stylized.shape == photo.shape
                assert stylized.isfinite().all()


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either style"),
        ({"style": STYLE, "styles": [STYLE]}, "give either style"),
        ({"style": STYLE, "strength": 1.6}, r"strength is 1.6, expected 0 \(the photo\) through 1"),
        ({"style": STYLE, "strength": float("nan")}, "strength is nan"),
        ({"style": STYLE, "weights": [1]}, "weights mix several styles"),
        ({"styles": []}, "styles is a list of one or more"),
        ({"styles": "painting.jpg"}, "styles is a list of one or more"),
        ({"styles": [STYLE, OTHER], "weights": [1]}, "1 weights for 2 styles"),
        ({"styles": [STYLE, OTHER], "weights": [-1, 2]}, "must not be negative"),
        ({"styles": [STYLE, OTHER], "weights": [0, 0]}, "are all 0"),
        ({"style": STYLE, "mask": [np.ones((2, 2))]}, "1 masks for 0 styles"),
        ({"styles": [STYLE, OTHER], "mask": [np.ones((2, 2))]}, "1 masks for 2 styles"),
        ({"style": STYLE, "output": "jpeg"}, "output is 'jpeg'"),
        ({"style": "nowhere.png"}, "no such file"),
    ],
)
def test_mistakes_are_named(stylizer, options, message):
    with pytest.raises(ValueError, match=message):
        stylizer.stylize(PHOTO, **options)


def test_models_are_loaded_by_their_kind(tiny_stylizer_folder, tiny_model_folder, tmp_path):
    assert isinstance(ms.load(next(tiny_stylizer_folder.iterdir()), device="cpu"), ms.Stylizer)
    assert isinstance(ms.load(tiny_model_folder, device="cpu"), ms.Inverter)
    from mambastyle.api import load_inverter, load_stylizer

    with pytest.raises(CheckpointError, match=r"stylizes pictures, .* here kaokore64"):
        load_inverter(tiny_stylizer_folder)
    with pytest.raises(CheckpointError, match=r"inverts pictures, .* here samam-small or mamba-st-small"):
        load_stylizer(tiny_model_folder)
    with pytest.raises(CheckpointError, match=r"or with one of samam\.safetensors, mamba-st"):
        ms.load(tmp_path)
    with pytest.raises(CheckpointError, match="did you mean 'samam-small'"):
        ms.load("samam-smal")


def test_bfloat16_comes_near_and_gives_float32(stylizer, tiny_stylizer_folder):
    fast = ms.load(tiny_stylizer_folder, device="cpu", precision="bf16")
    for strength in (0.5, 1.0):
        near = run(fast, PHOTO, STYLE, strength=strength)
        assert near.dtype == torch.float32
        assert 0 < (near - run(stylizer, PHOTO, STYLE, strength=strength)).abs().mean() < 0.02


def test_it_moves_to_another_precision_and_back(tiny_stylizer_folder):
    moved = ms.load(tiny_stylizer_folder, device="cpu")
    exact = run(moved, PHOTO, STYLE)
    assert not torch.equal(run(moved.to("cpu", "bf16"), PHOTO, STYLE), exact)
    torch.testing.assert_close(run(moved.to("cpu", "fp32"), PHOTO, STYLE), exact, rtol=0, atol=0)
