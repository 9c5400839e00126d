"""The terms of the inversion loss have their papers' values on cases that can be worked out by hand."""

import pytest
import torch

from mambastyle.losses import inversion, reconstruction


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pixel_terms_are_zero_for_equal_pictures_and_known_for_a_constant_difference():
    image = picture(2, 3, 8, 12)
    for shift, l2, smooth in ((0.0, 0.0, 0.0), (0.5, 0.25, 2 * 0.125)):
        terms = inversion.reconstruction_terms(image + shift, image, l2_size=4, smooth_l1_sizes=(4, None))
        assert set(terms) == {"l2", "smooth_l1"}
        assert terms["l2"].item() == pytest.approx(l2, abs=1e-6)
        assert terms["smooth_l1"].item() == pytest.approx(smooth, abs=1e-6)


def test_a_picture_is_made_smaller_but_never_larger():
    image = picture(2, 3, 8, 12)
    assert reconstruction.at_size(image, 4).shape == (2, 3, 4, 6)
    assert reconstruction.at_size(image, 16) is image
    assert reconstruction.at_size(image, None) is image


def test_resizing_passes_gradients_of_saturated_pixels():
    image = (picture(1, 3, 8, 8) * 3).requires_grad_()
    reconstruction.l2(image, torch.zeros(1, 3, 8, 8), size=4).backward()
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_perceptual_distance_ignores_the_length_of_channel_vectors():
    maps = {"fine": picture(2, 5, 4, 6), "coarse": picture(2, 3, 2, 3, seed=1)}
    scaled = {name: 3 * x for name, x in maps.items()}
    opposite = {name: -x for name, x in maps.items()}
    assert inversion.perceptual(maps, scaled).item() == pytest.approx(0, abs=1e-6)
    # |a - (-a)|^2 = 4 for unit vectors, in each of the two maps.
    assert inversion.perceptual(maps, opposite).item() == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize("term", [inversion.identity, inversion.structure])
def test_cosine_terms_are_one_minus_cos_for_each_depth(term):
    maps = {"fine": picture(2, 5, 4, 6), "coarse": picture(2, 3, 2, 3, seed=1)}
    assert term(maps, maps).item() == pytest.approx(0, abs=1e-6)
    assert term(maps, {name: -x for name, x in maps.items()}).item() == pytest.approx(4, rel=1e-5)


def test_maps_of_other_names_are_an_error():
    maps = {"fine": picture(1, 2, 3, 3)}
    with pytest.raises(ValueError, match=r"got \['fine'\] and \['coarse'\]"):
        inversion.perceptual(maps, {"coarse": maps["fine"]})
    with pytest.raises(ValueError, match="expected the same maps"):
        inversion.identity({}, {})


def test_edit_consistency_is_zero_when_the_encoder_sees_exactly_the_direction():
    ws, direction = picture(2, 4, 6), picture(2, 4, 6, seed=1)
    assert inversion.edit_consistency(ws, ws + direction, direction).item() == pytest.approx(0, abs=1e-6)
    off = inversion.edit_consistency(ws, ws + direction + 0.25, direction)
    assert off.item() == pytest.approx(0.25, rel=1e-5)


def test_w_norm_is_a_mean_over_pictures_of_the_norm_over_layers():
    ws = torch.zeros(2, 4, 6)
    ws[0, 1, 2], ws[0, 3, 5] = 3.0, 4.0
    assert inversion.w_norm(ws).item() == pytest.approx(2.5)


def test_the_feature_gap_is_what_has_to_be_added_and_has_no_gradient():
    wanted, rendered = picture(2, 3, 4, 6).requires_grad_(), picture(2, 3, 4, 6, seed=1)
    gap = inversion.feature_gap(wanted, rendered)
    assert not gap.requires_grad
    torch.testing.assert_close(rendered + gap, wanted.detach())
    assert inversion.feature(gap, gap).item() == 0


def test_a_composite_keeps_what_an_edit_leaves_adds_what_is_small_and_takes_what_is_large():
    image, plain = picture(2, 3, 8, 48) * 0.5, picture(2, 3, 8, 48, seed=1) * 0.2
    moved = plain.clone()
    moved[..., 16:32] += 0.05
    moved[..., 32:] += 0.6
    found = inversion.composite(image, plain.requires_grad_(), moved)
    assert not found.requires_grad
    torch.testing.assert_close(found[..., :12], image[..., :12])
    torch.testing.assert_close(found[..., 36:], moved[..., 36:].detach())
    # A fifth of what counts as a full change: a fifth of the old picture gives way, and the change is added.
    middle = image + 0.05 + 0.2 * (plain - image)
    torch.testing.assert_close(found[..., 20:28], middle[..., 20:28].detach())


def test_total_variation_of_a_ramp_is_its_slope():
    ramp = torch.arange(6.0).expand(2, 3, 4, 6)
    assert inversion.total_variation(ramp).item() == pytest.approx(1.0)
    assert inversion.total_variation(ramp.transpose(2, 3)).item() == pytest.approx(1.0)


def test_the_cycle_term_is_the_squared_difference():
    image = picture(2, 3, 4, 6)
    assert inversion.cycle(image + 0.5, image).item() == pytest.approx(0.25, rel=1e-5)
