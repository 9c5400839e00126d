"""A picture's z, as a normal distribution (Kingma & Welling 2014): what lets a generator learn from pictures.

On a few thousand pictures and a small budget, a GAN's first 100k pictures go into finding out what a face is.
A generator that also reconstructs the training pictures from such a z is told (VAE-GAN, Larsen et al. 2016).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.models.stylegan2 import EqualLinear, MappingNetwork


class LatentDistribution(NamedTuple):
    """Independent normal distributions, one for each picture and dimension of z."""

    mean: Float[Tensor, "batch z_dim"]
    log_variance: Float[Tensor, "batch z_dim"]

    def sample(self, noise: Float[Tensor, "batch z_dim"]) -> Float[Tensor, "batch z_dim"]:
        """`mean + deviation * noise`."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def divergence(self) -> Float[Tensor, ""]:
        """KL to the standard normal distribution in nats, the mean over pictures (Kingma & Welling, B)."""
        nats = 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)
        return nats.sum(1).mean()


class LatentEncoder(nn.Module):
    """Pictures in [-1, 1] of one size to the distribution of their z: strided convolutions, one linear layer.

    widths: channels at half the size, at a quarter, and so on down to 4 px.
    """

    def __init__(self, resolution: int, widths: Sequence[int], z_dim: int) -> None:
        super().__init__()
        if resolution != 4 * 2 ** len(widths):
            raise ValueError(
                f"{len(widths)} widths lead from {4 * 2 ** len(widths)} to 4 px, not {resolution}"
            )
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(1, after),
                nn.LeakyReLU(0.2),
                nn.Conv2d(after, after, 3, padding=1),
                nn.LeakyReLU(0.2),
            ]
        self.convs = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1] * 16, 2 * z_dim)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> LatentDistribution:
        mean, log_variance = self.linear(self.convs(image).flatten(1)).float().chunk(2, dim=1)
        return LatentDistribution(mean, log_variance.clamp(-10, 4))


@torch.no_grad()
def fit_prior(
    mapping: MappingNetwork,
    encoder: LatentEncoder,
    batches: Iterable[Float[Tensor, "_ 3 height width"]],
    generator: torch.Generator,
) -> None:
    """Give the z of pictures mean 0 and covariance 1, by a change of coordinates on both sides.

    The divergence alone leaves them far from a standard normal, and a drawn z then lies where the generator
    has learned nothing (Ghosh et al. 2020 fit a density afterwards for this). With z' = T^-1 (z - mu), T the
    root of the covariance over all pictures, the encoder's last layer gives z' and the mapping's first
    layer takes it; `w_avg` is measured anew. What is reconstructed stays nearly the same: the noise of a
    picture's z loses its correlations, and the mapping takes z at unit length.
    """
    found = [encoder(batch) for batch in batches]
    means = torch.cat([part.mean for part in found]).double()
    noise = torch.cat([part.log_variance for part in found]).double().exp().mean(0)
    mean, covariance = means.mean(0), torch.cov(means.T) + noise.diag()
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors * values.rsqrt()) @ vectors.T
    length = ((values.sum() + mean.square().sum()) / len(mean)).sqrt()

    z_dim, first, last = len(mean), mapping.fc[0], encoder.linear
    assert isinstance(first, EqualLinear)
    weight = first.weight[:, :z_dim].double()
    first.bias += (weight @ mean / length * (first.weight_gain / first.bias_gain)).float()
    first.weight[:, :z_dim] = (weight @ root / length).float()

    last.weight[:z_dim] = (inverse @ last.weight[:z_dim].double()).float()
    last.bias[:z_dim] = (inverse @ (last.bias[:z_dim].double() - mean)).float()
    last.bias[z_dim:] += ((inverse.square() @ noise) / noise).log().float()

    z = torch.randn(10_000, z_dim, generator=generator, device=first.weight.device)
    if mapping.embed is None:
        mapping.w_avg.copy_(mapping.w(z).mean(0))
