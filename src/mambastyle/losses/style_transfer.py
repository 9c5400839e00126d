"""The losses of Mamba-ST and SaMam (StyTr2's, Deng et al. 2022, section 3.4), as unweighted terms.

Content and style are compared in the maps of a frozen network, by name, shallow to deep. Identity: a picture
stylized by itself should come back. Pixels count in [0, 1], as published, so that published weights apply.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mambastyle.losses.reconstruction import Maps, pairs, total

VGG_CONTENT = ("relu4_1", "relu5_1")
VGG_STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
"""The published maps, of a VGG-19 normalised so that its maps are near 1."""

SQUEEZENET_CONTENT = ("fire5", "fire8")
SQUEEZENET_STYLE = ("relu1", "fire2", "fire4", "fire6", "fire8")
SQUEEZENET_SCALES = {
    "relu1": 50.0,
    "fire2": 155.0,
    "fire3": 300.0,
    "fire4": 265.0,
    "fire5": 400.0,
    "fire6": 200.0,
    "fire7": 150.0,
    "fire8": 57.0,
    "fire9": 42.0,
}
"""Root mean square of SqueezeNet's maps over photographs and paintings of 192 px."""

# As published: the variance is that of a sample, and never 0.
_EPS = 1e-5


def content(maps: Maps, target: Maps) -> Float[Tensor, ""]:
    """Squared difference of maps that are brought to mean 0 and deviation 1 by channel, summed over maps.

    Published: relu4_1 and relu5_1 of a VGG-19.
    """
    return total(F.mse_loss(normalise(ours), normalise(theirs)) for ours, theirs in pairs(maps, target))


def style(maps: Maps, target: Maps, scales: Mapping[str, float] | None = None) -> Float[Tensor, ""]:
    """Squared difference of each channel's mean plus that of its deviation, summed over maps.

    Published: relu1_1 to relu5_1. The pictures may have different sizes. `scales` divides the maps of a name
    by a number: those of VGG are near 1 as they come, those of another network are brought there.
    """
    return total(
        F.mse_loss(ours, theirs)
        for name in _names(maps, target)
        for ours, theirs in zip(
            statistics(maps[name], _scale(scales, name)),
            statistics(target[name], _scale(scales, name)),
            strict=True,
        )
    )


def identity_pixels(
    stylized: Float[Tensor, "batch 3 height width"], picture: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """Identity 1 for one kind of picture: squared difference of a picture and what its own style makes of it.

    The published term is the sum of that of contents and that of styles.
    """
    return F.mse_loss(stylized, picture) / 4  # differences in [0, 1] are half of those in [-1, 1]


def identity_features(
    maps: Maps, target: Maps, scales: Mapping[str, float] | None = None
) -> Float[Tensor, ""]:
    """Identity 2 for one kind of picture: the same in the maps, summed over them."""
    return total(
        F.mse_loss(maps[name].float(), target[name].float()) / _scale(scales, name) ** 2
        for name in _names(maps, target)
    )


def shuffles(
    stylized: Float[Tensor, "batch 3 height width"], again: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """How much a picture of Mamba-ST depends on its random shuffles: squared difference under two draws.

    Not in the papers. What one draw has and another lacks belongs to neither picture: it shows as blotches in
    flat regions, and as flicker where seeds change. In training the grain of the two is another one as well.
    """
    return F.mse_loss(stylized, again) / 4  # in [0, 1]


def pixel_style(
    stylized: Float[Tensor, "batch 3 _ _"], style_picture: Float[Tensor, "batch 3 _ _"]
) -> Float[Tensor, ""]:
    """The style term of the picture's own finest bands: colours, and contrast from one pixel to the next.

    A network whose first layer has stride 2 (SqueezeNet) sees no noise of one pixel; the deviations of these
    bands do. They are divided by what photographs and paintings of 192 px have there.
    """
    return style(haar_bands(stylized), haar_bands(style_picture), {"colour": 0.2, "edges": 0.03})


def haar_bands(image: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, "batch _ _ _"]]:
    """A picture's 2x2 Haar bands at every position: `colour` (3, the means) and `edges` (9, differences).

    Pictures of 2 px a side or more, counted in [0, 1].
    """
    image = (image + 1) / 2
    low, down = (image[:, :, 1:] + image[:, :, :-1]) / 2, (image[:, :, 1:] - image[:, :, :-1]) / 2
    left, right = torch.cat([low, down], 1)[..., :-1], torch.cat([low, down], 1)[..., 1:]
    mean, step = (left + right) / 2, (right - left) / 2
    return {"colour": mean[:, :3], "edges": torch.cat([step, mean[:, 3:]], 1)}


def grid(image: Float[Tensor, "batch 3 height width"], patch: int) -> Float[Tensor, ""]:
    """How unevenly the steps from pixel to pixel lie within patches of `patch` px: 0 if the grid is unseen.

    Not in the papers. A decoder's patches show where steps of one place within a patch are larger than those
    of the others; twice the decoder's patch also sees what alternates from patch to patch, as zigzag walks
    do. For each picture and axis: the variance over the places of the log of their mean square,
    which strong edges decide, and of the mean log square, which flat regions decide too.
    """
    if patch < 2 or min(image.shape[2:]) <= patch:
        raise ValueError(f"expected patches of 2 px or more, two a side, got {patch} in {tuple(image.shape)}")
    spreads = []
    for axis in (2, 3):
        squares = image.float().diff(dim=axis).square().movedim(axis, -1)  # (batch, 3, across, along)
        places = squares[..., : squares.shape[-1] // patch * patch].unflatten(-1, (-1, patch))
        # Steps below a hundredth (1.3 of 255 levels) are flat.
        for logs in (places.mean((1, 2, 3)).add(1e-4).log(), places.add(1e-4).log().mean((1, 2, 3))):
            spreads.append(logs.var(1, correction=0).mean())
    return torch.stack(spreads).mean()


def normalise(maps: Float[Tensor, "batch channels _ _"]) -> Float[Tensor, "batch channels _ _"]:
    """Every channel of every picture to mean 0 and deviation 1."""
    mean, deviation = statistics(maps)
    return (maps.float() - mean[:, :, None, None]) / deviation[:, :, None, None]


def statistics(
    maps: Float[Tensor, "batch channels _ _"], scale: float = 1.0
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]:
    """Mean and deviation of every channel of every picture, the map divided by `scale` first."""
    flat = maps.float().flatten(2) / scale
    return flat.mean(2), (flat.var(2, correction=min(flat.shape[2] - 1, 1)) + _EPS).sqrt()


def _names(maps: Maps, target: Maps) -> list[str]:
    """The names of both sides, which must agree; sizes need not."""
    if not maps or list(maps) != list(target):
        raise ValueError(f"expected the same maps on both sides, got {list(maps)} and {list(target)}")
    return list(maps)


def _scale(scales: Mapping[str, float] | None, name: str) -> float:
    return 1.0 if scales is None else scales[name]
