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
