"""The distribution of a picture's z: closed forms, and sizes that do not fit."""

import pytest
import torch

from mambastyle.models.stylegan2 import MappingNetwork, StyleGAN2Config
from mambastyle.training.latent_encoder import LatentDistribution, LatentEncoder, fit_prior


def test_the_divergence_from_a_standard_normal_has_its_closed_form():
    standard = LatentDistribution(torch.zeros(2, 5), torch.zeros(2, 5))
    assert standard.divergence() == 0
    mean, log_variance = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, -0.7]])
    ours = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(LatentDistribution(mean, log_variance).divergence(), expected)


def test_samples_have_the_mean_and_the_deviation():
    found = LatentDistribution(torch.full((1, 3), 2.0), torch.full((1, 3), 4.0).log())
    torch.testing.assert_close(found.sample(torch.zeros(1, 3)), torch.full((1, 3), 2.0))
    torch.testing.assert_close(found.sample(torch.ones(1, 3)), torch.full((1, 3), 4.0))


def test_two_pictures_are_encoded_as_each_alone():
    torch.manual_seed(0)
    encoder = LatentEncoder(16, (4, 6), 5)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    both = encoder(pictures)
    assert both.mean.shape == both.log_variance.shape == (2, 5)
    for number in range(2):
        alone = encoder(pictures[number : number + 1])
        torch.testing.assert_close(both.mean[number : number + 1], alone.mean)


def test_widths_that_do_not_lead_to_4_px_are_an_error():
    with pytest.raises(ValueError, match="3 widths lead from 32 to 4 px, not 16"):
        LatentEncoder(16, (4, 4, 4), 2)


def test_a_fitted_prior_is_where_pictures_are_and_keeps_their_reconstructions():
    torch.manual_seed(0)
    config = StyleGAN2Config(
        resolution=32, z_dim=6, w_dim=8, mapping_layers=2, widths=(4, 4, 4, 4), feature_layer=0
    )
    mapping, encoder = MappingNetwork(config), LatentEncoder(16, (4, 6), 6)
    with torch.no_grad():
        encoder.linear.weight.mul_(4)
        encoder.linear.bias[:6] = torch.tensor([3.0, 0, 0, -2, 0, 1])
        encoder.linear.bias[6:] = -6
    pictures = torch.rand(200, 3, 16, 16) * 2 - 1
    # A mapping without its normalisation and first activation: what is left is linear and must not change.
    before = encoder(pictures)
    w = torch.nn.functional.linear(before.mean, mapping.fc[0].weight)
    length = (before.mean.square() + before.log_variance.exp()).mean().sqrt()

    fit_prior(mapping, encoder, pictures.split(64), torch.Generator().manual_seed(0))
    after = encoder(pictures)
    spread = torch.cov(after.mean.T) + after.log_variance.exp().mean(0).diag()
    torch.testing.assert_close(after.mean.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(spread, torch.eye(6), atol=2e-2, rtol=0)
    first = mapping.fc[0]
    again = torch.nn.functional.linear(
        after.mean, first.weight, first.bias * first.bias_gain / first.weight_gain
    )
    torch.testing.assert_close(again, w / length, atol=1e-4, rtol=1e-3)
