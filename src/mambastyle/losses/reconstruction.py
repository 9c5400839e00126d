"""How far a picture, or what a frozen network sees in it, is from another: one number for a batch."""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Maps = Mapping[str, Float[Tensor, "batch _ _ _"]]
"""What a frozen network sees: its maps by name, shallow to deep."""


def l2(
    image: Float[Tensor, "batch 3 height width"],
    target: Float[Tensor, "batch 3 height width"],
    size: int | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference, both pictures brought to `size` px first."""
    return F.mse_loss(at_size(image, size), at_size(target, size))


def smooth_l1(
    image: Float[Tensor, "batch 3 height width"],
    target: Float[Tensor, "batch 3 height width"],
    sizes: Iterable[int | None] = (None,),
) -> Float[Tensor, ""]:
    """Smooth L1 (threshold 1) at each of `sizes`, summed; None is the size as it comes."""
    return total(F.smooth_l1_loss(at_size(image, size), at_size(target, size)) for size in sizes)


def perceptual(maps: Maps, target: Maps) -> Float[Tensor, ""]:
    """Squared distance of unit-length channel vectors, averaged over positions, summed over the maps.

    LPIPS (Zhang et al. 2018, equation 1) without its learned weights: w_l = 1.
    """
    return total(
        (F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square().sum(1).mean()
        for ours, theirs in pairs(maps, target)
    )


def cosine(maps: Maps, target: Maps) -> Float[Tensor, ""]:
    """1 - cos of the angle between the flattened maps, averaged over pictures, summed over the maps."""
    return total(
        (1 - F.cosine_similarity(ours.flatten(1), theirs.flatten(1))).mean()
        for ours, theirs in pairs(maps, target)
    )


def total_variation(image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Mean absolute step to the next row plus that to the next column (Rudin et al. 1992, anisotropic)."""
    rows, columns = image.diff(dim=2), image.diff(dim=3)
    return rows.abs().mean() + columns.abs().mean()


def at_size(
    image: Float[Tensor, "batch 3 _ _"], size: int | None
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """The picture with a short side of `size`, antialiased; a smaller one stays as it is."""
    height, width = image.shape[2:]
    short = min(height, width)
    if size is None or size >= short:
        return image
    # images.resize clamps to [-1, 1], which would stop the gradient of every saturated pixel.
    shape = (round(height * size / short), round(width * size / short))
    return F.interpolate(image, shape, mode="bilinear", antialias=True)


def pairs(maps: Maps, target: Maps) -> list[tuple[Tensor, Tensor]]:
    """The maps of both sides by name, in float32; ValueError when the names differ."""
    if not maps or list(maps) != list(target):
        raise ValueError(f"expected the same maps on both sides, got {list(maps)} and {list(target)}")
    return [(maps[name].float(), target[name].float()) for name in maps]


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one or more scalars; ValueError for none, which would be a loss that nothing moves."""
    found = list(terms)
    if not found:
        raise ValueError("nothing to add up: name at least one size or map")
    return torch.stack(found).sum()
