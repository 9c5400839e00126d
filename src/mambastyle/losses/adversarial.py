"""Losses of GAN training: non-saturating, R1 and path length (StyleGAN2), hinge (Projected GAN), spectra."""

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


def spectrum_distance(
    fake: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"], finest: float = 0.25, bands: int = 6
) -> Float[Tensor, ""]:
    """How much the power of fine detail differs between two sets of pictures: (ln of the ratio)^2.

    The mean over rings of the Fourier plane from `finest` cycles a pixel to its corners, each picture under a
    Hann window. Spectral regularisation (Durall et al. 2020, section 4) with logarithms, not cross-entropy.
    The range of the pictures cancels if it is the same; a set without any detail in a ring gives inf.
    """
    height, width = fake.shape[2:]
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    edges = torch.linspace(finest, math.sqrt(0.5), bands + 1)[:-1]
    # 0 is what is coarser than `finest`.
    ring = torch.bucketize(torch.hypot(rows[:, None], columns), edges, right=True).to(fake.device)
    window = torch.outer(torch.hann_window(height), torch.hann_window(width)).to(fake.device)

    def powers(pictures: Tensor) -> Tensor:
        power = torch.fft.rfft2(pictures.float() * window).abs().square().mean((0, 1))
        return torch.stack([power[ring == number].mean() for number in range(1, bands + 1)])

    return (powers(fake) / powers(real)).log().square().mean()
