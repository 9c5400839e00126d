"""Pictures are mirrored up to whole patches; the CNN decoder gives the same picture in strips."""

import pytest
import torch
import torch.nn.functional as F

from mambastyle.nn.cnn_decoder import CNNDecoder
from mambastyle.nn.patches import PatchEmbedding, mirror_to


@pytest.mark.parametrize(("height", "width"), [(5, 7), (6, 10), (9, 13)])
def test_mirroring_is_torchs_reflect_padding_where_that_exists(height, width):
    image = torch.randn(2, 3, 5, 7)
    expected = F.pad(image, (0, width - 7, 0, height - 5), mode="reflect")
    assert torch.equal(mirror_to(image, height, width), expected)


def test_a_picture_is_mirrored_as_often_as_needed():
    image = torch.tensor([0.0, 1.0, 2.0]).expand(1, 3, 1, 3)
    mirrored = mirror_to(image, 2, 8)
    assert mirrored[0, 0].tolist() == [[0, 1, 2, 1, 0, 1, 2, 1]] * 2
    with pytest.raises(ValueError, match="cannot mirror 3 px to 2"):
        mirror_to(image, 1, 2)


def test_a_small_picture_still_has_the_least_number_of_patches():
    embedding = PatchEmbedding(6, 4, least=2)
    assert embedding(torch.randn(2, 3, 1, 13)).shape == (2, 6, 2, 4)


@pytest.mark.parametrize("stages", [((8,), (8, 6), (4, 3)), ((4,), (4, 4, 4, 4), (4, 4), (4, 3))])
@pytest.mark.parametrize("rows", [1, 3, 5])
@torch.no_grad()
def test_strips_make_the_same_picture(stages, rows):
    torch.manual_seed(0)
    decoder = CNNDecoder(5, stages)
    x = torch.randn(2, 5, 16, 3)
    whole = decoder(x)
    assert whole.shape == (2, 3, 16 * decoder.scale, 3 * decoder.scale)
    torch.testing.assert_close(decoder.decode_strips(x, rows), whole, rtol=1e-5, atol=1e-6)
    # A margin of one row less would be visible.
    assert decoder.margin <= 4


@torch.no_grad()
def test_the_decoder_starts_near_mid_grey_and_passes_the_signal_on():
    torch.manual_seed(0)
    stages = ((64,), (64, 64, 48), (48, 32), (24, 3))
    picture = CNNDecoder(128, stages)(torch.randn(2, 128, 6, 8))
    assert (picture.mean() - 0.5).abs() < 0.25
    assert 0.03 < picture.std((2, 3)).mean() < 0.5
