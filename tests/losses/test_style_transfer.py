"""The terms are zero where they should be, see what they are for, and follow the published definitions."""

import pytest
import torch

from mambastyle.losses import style_transfer as losses


def maps(seed: int, height: int = 6, width: int = 5) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(2, 4, height, width, generator=random) + 1,
        "b": 3 * torch.randn(2, 6, 3, 2, generator=random),
    }


def test_content_is_the_squared_difference_of_normalised_maps():
    first, second = maps(0), maps(1)
    expected = 0.0
    for name in first:
        normal = [
            (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
            for x in (first[name], second[name])
        ]
        expected += (normal[0] - normal[1]).square().mean()
    torch.testing.assert_close(losses.content(first, second), torch.as_tensor(expected))
    brighter = {name: 2 * value + 3 for name, value in first.items()}
    assert losses.content(first, brighter) < 1e-4


def test_style_compares_means_and_deviations_at_any_size():
    first = {"a": maps(0)["a"]}
    moved = {"a": first["a"] + 2}
    torch.testing.assert_close(losses.style(first, moved), torch.tensor(4.0), rtol=1e-4, atol=0)
    assert losses.style(first, {"a": first["a"].flip(2, 3)}) < 1e-8
    assert losses.style(first, {"a": first["a"].repeat(1, 1, 2, 3)}) < 1e-3
    scaled = losses.style(first, moved, {"a": 2.0})
    torch.testing.assert_close(scaled, torch.tensor(1.0), rtol=1e-3, atol=0)


def test_identity_counts_pixels_from_zero_to_one():
    picture = torch.zeros(2, 3, 4, 5)
    assert losses.identity_pixels(picture + 1, picture).item() == pytest.approx(0.25)
    first = maps(0)
    more = {name: value + 3 for name, value in first.items()}
    assert losses.identity_features(first, more).item() == pytest.approx(18, rel=1e-5)
    assert losses.identity_features(first, more, {"a": 3.0, "b": 1.0}).item() == pytest.approx(10, rel=1e-5)


def test_the_haar_bands_keep_the_energy_of_a_wrapped_picture():
    image = torch.rand(2, 3, 6, 8) * 2 - 1
    wrapped = torch.nn.functional.pad(image, (0, 1, 0, 1), mode="circular")
    bands = losses.haar_bands(wrapped)
    assert bands["colour"].shape == (2, 3, 6, 8)
    assert bands["edges"].shape == (2, 9, 6, 8)
    energy = sum(band.square().sum() for band in bands.values())
    torch.testing.assert_close(energy, ((image + 1) / 2).square().sum())


def test_the_pixel_term_sees_a_checkerboard():
    smooth = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    assert losses.pixel_style(smooth, smooth) == 0
    assert losses.pixel_style(smooth + 0.2 * board, smooth) > 0.1


def test_the_grid_term_sees_patches_strong_or_faint_and_nothing_else():
    noise = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert losses.grid(noise, 4) < 0.01
    assert losses.grid(torch.zeros(1, 3, 9, 11), 4) == 0
    columns = torch.arange(64) // 4 % 2  # squares of 4 px
    rows = torch.arange(48)[:, None] // 4 % 2
    for strength in (0.02, 0.5):
        squares = strength * (columns + rows).expand(2, 3, -1, -1)
        assert losses.grid(squares, 4) > 0.1
        # On another grid the same steps fall on every place.
        assert losses.grid(squares, 3) < 0.1 * losses.grid(squares, 4)
    with pytest.raises(ValueError, match="patches of 2 px or more, two a side"):
        losses.grid(noise, 48)


def test_the_grid_of_two_patches_sees_what_alternates_between_them():
    noise = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert losses.grid(noise, 8) < 0.01
    alternating = noise * (1 + torch.arange(128) // 4 % 2)  # every other patch of 4 px is twice as rough
    assert losses.grid(alternating, 8) > 5 * losses.grid(alternating, 4)


def test_two_draws_of_the_shuffles_are_compared_in_unit_range():
    stylized = torch.zeros(1, 3, 4, 4)
    assert losses.shuffles(stylized, stylized) == 0
    assert losses.shuffles(stylized, stylized + 0.2) == pytest.approx(0.01)


def test_gradients_are_right_and_finite_on_a_flat_map():
    random = torch.Generator().manual_seed(0)
    first = torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=random, requires_grad=True)
    second = {"a": torch.randn(1, 2, 4, 3, generator=random)}

    flat = torch.zeros(1, 2, 3, 4, requires_grad=True)
    term = losses.style({"a": flat}, second) + losses.content({"a": flat}, {"a": second["a"].mT})
    (gradient,) = torch.autograd.grad(term, flat)
    assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(losses.style({"a": first}, second), first)
    assert gradient.abs().max() > 0


def test_maps_of_another_name_are_an_error():
    with pytest.raises(
        ValueError, match=r"expected the same maps on both sides, got \['a', 'b'\] and \['a'\]"
    ):
        losses.style(maps(0), {"a": maps(0)["a"]})
