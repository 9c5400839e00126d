"""Losses of GAN training: non-saturating, R1 and path length (StyleGAN2), hinge (Projected GAN)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def generator_loss(fake_logits: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Non-saturating loss, -log sigmoid(D(G(z))) (Goodfellow et al. 2014)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(
    fake_logits: Float[Tensor, "b n"], real_logits: Float[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Logistic loss of the discriminator."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Float[Tensor, ""]:
    """-D(G(z)), as in Projected GAN (Sauer et al. 2021, equation 2)."""
    return -fake_logits.mean()


def hinge_discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Float[Tensor, ""]:
    """max(0, 1 + D(fake)) + max(0, 1 - D(real))."""
    return F.relu(1 + fake_logits).mean() + F.relu(1 - real_logits).mean()


def r1_penalty(real: Float[Tensor, "b 3 h w"], real_logits: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean over pictures of |grad_x D(x)|^2 (Mescheder et al. 2018); `real` must require a gradient."""
    (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def path_lengths(
    image: Float[Tensor, "b 3 h w"], ws: Float[Tensor, "b num_ws w_dim"], noise: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, " b"]:
    """|J_w^T y| for a random picture y ~ N(0, 1) (StyleGAN2, section 3.2), with a graph for the penalty.

    The penalty is the squared distance of each length to the running mean of the lengths.
    """
    scaled = noise / math.sqrt(image.shape[2] * image.shape[3])
    (gradient,) = torch.autograd.grad((image * scaled).sum(), ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()
