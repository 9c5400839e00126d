"""Adaptive discriminator augmentation (Karras et al. 2020b): one affine map and one colour map per picture.

Fixed order as in the paper's figure 3 (pixel blitting, geometry, colour); the image-space filtering and
corruptions, which the paper found of no use, are left out.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def augment(
    image: Float[Tensor, "b 3 h w"], probability: float, generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Each transformation happens to each picture with `probability`; differentiable (once) in the picture.

    Integer translation up to 1/8, isotropic and anisotropic scaling (log-normal, 0.2 octave), rotation
    (normal, 0.07 turns), brightness, contrast, saturation. Left out against the paper: any angle, hue, luma
    flips, whose traces showed as cyan and orange faces after 50k pictures at probabilities around 0.3.
    """
    if probability <= 0:
        return image
    batch, device = image.shape[0], image.device

    def normal(scale: float) -> Tensor:
        return torch.randn(batch, generator=generator, device=device) * scale

    def uniform() -> Tensor:
        return torch.rand(batch, generator=generator, device=device)

    def happens(value: Tensor, otherwise: float) -> Tensor:
        return torch.where(uniform() < probability, value, torch.full_like(value, otherwise))

    scale = happens(torch.exp2(normal(0.2)), 1.0)
    stretch = happens(torch.exp2(normal(0.2)), 1.0)
    angle = happens(normal(0.07 * 2 * math.pi), 0.0)
    shift_x = happens(torch.round((uniform() * 2 - 1) * image.shape[3] / 8) * 2 / image.shape[3], 0.0)
    shift_y = happens(torch.round((uniform() * 2 - 1) * image.shape[2] / 8) * 2 / image.shape[2], 0.0)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * scale * stretch, -sin * scale, shift_x], 1),
            torch.stack([sin * scale * stretch, cos * scale, shift_y], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    image = F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    brightness = happens(normal(0.2), 0.0)
    contrast = happens(torch.exp2(normal(0.5)), 1.0)
    saturation = happens(torch.exp2(normal(0.5)), 1.0)
    matrix = _colour_matrix(contrast, saturation)
    flat = torch.baddbmm(brightness[:, None, None].expand(-1, 3, 1), matrix, image.flatten(2))
    return flat.view_as(image)


def _colour_matrix(contrast: Tensor, saturation: Tensor) -> Float[Tensor, "b 3 3"]:
    """Contrast times saturation: the grey axis scales by the first, colours across it by both."""
    along = torch.full((3, 3), 1 / 3, device=contrast.device)
    across = torch.eye(3, device=contrast.device) - along
    return contrast[:, None, None] * (along + saturation[:, None, None] * across)


class AdaptiveProbability:
    """Raise or lower the probability so that the share of real pictures called real stays near a target.

    r_t = E[sign(D(real))] (equation 1 of the paper); each update moves by 1 / `images` of its full range.
    """

    def __init__(self, target: float = 0.6, images: int = 200_000, maximum: float = 0.8) -> None:
        self.target, self.images, self.maximum = target, images, maximum
        self.value = 0.0

    def update(self, sign_mean: float, pictures: int) -> None:
        step = math.copysign(pictures / self.images, sign_mean - self.target)
        self.value = min(max(self.value + step, 0.0), self.maximum)
