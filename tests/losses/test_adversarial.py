"""Adversarial losses against closed forms."""

import math

import torch

from mambastyle.losses import adversarial


def test_logistic_losses_at_zero_are_log_two():
    zero = torch.zeros(4, 1)
    torch.testing.assert_close(adversarial.generator_loss(zero), torch.tensor(math.log(2)))
    torch.testing.assert_close(adversarial.discriminator_loss(zero, zero), torch.tensor(2 * math.log(2)))


def test_hinge_losses_end_at_the_margin():
    fake, real = torch.tensor([[-2.0], [0.5]]), torch.tensor([[3.0], [0.0]])
    torch.testing.assert_close(
        adversarial.hinge_discriminator_loss(fake, real), torch.tensor(1.5 / 2 + 1.0 / 2)
    )
    torch.testing.assert_close(adversarial.hinge_generator_loss(fake), torch.tensor(0.75))


def test_r1_of_a_linear_judge_is_its_squared_weight():
    weight = torch.randn(3 * 4 * 5, requires_grad=True)
    real = torch.randn(2, 3, 4, 5, requires_grad=True)
    penalty = adversarial.r1_penalty(real, real.flatten(1) @ weight[:, None])
    torch.testing.assert_close(penalty, weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_path_lengths_of_a_linear_generator():
    matrix = torch.randn(6, 3 * 2 * 2)
    ws = torch.randn(2, 4, 6, requires_grad=True)
    image = (ws.mean(1) @ matrix).view(2, 3, 2, 2)
    noise = torch.randn_like(image)
    lengths = adversarial.path_lengths(image, ws, noise)
    # Each of the four rows gets a quarter of J^T y; the mean of the squares over rows is (1/4)^2 |J^T y|^2.
    expected = (noise.flatten(1) / 2 @ matrix.t()).norm(dim=1) / 4
    torch.testing.assert_close(lengths, expected)


def test_spectra_of_equal_pictures_do_not_differ():
    pictures = torch.rand(2, 3, 16, 12)
    assert adversarial.spectrum_distance(pictures, pictures) == 0


def test_twice_the_contrast_is_four_times_the_power_everywhere():
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distance = adversarial.spectrum_distance(2 * pictures, pictures)
    torch.testing.assert_close(distance, torch.tensor(math.log(4) ** 2))


def test_only_fine_detail_counts_in_spectra():
    position = torch.arange(32.0)
    coarse = torch.cos(2 * math.pi * position / 8).expand(1, 3, 32, 32)
    hatching = torch.cos(math.pi * position)[:, None] * torch.cos(math.pi * position)
    noise = 0.1 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    added = [adversarial.spectrum_distance(noise + extra, noise) for extra in (coarse, hatching)]
    assert added[0] < 0.01 < 1 < added[1]
