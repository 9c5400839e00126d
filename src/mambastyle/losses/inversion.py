"""The loss of MambaStyle (section 3.4, equations 3 to 7) as named unweighted terms.

The reconstruction terms compare a picture with its inversion; the edit terms hold an edit to what the
generator itself makes of it. Which of them count, and how much, is the run file's business.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mambastyle import images
from mambastyle.losses import reconstruction
from mambastyle.losses.reconstruction import Maps

Terms = dict[str, Float[Tensor, ""]]


def reconstruction_terms(
    rendered: Float[Tensor, "batch 3 height width"],
    image: Float[Tensor, "batch 3 height width"],
    *,
    l2_size: int | None = None,
    smooth_l1_sizes: tuple[int | None, ...] = (None,),
) -> Terms:
    """`l2` and `smooth_l1` (equation 3); published sizes for 1024 px: 256, and 512, 768, 1024 summed."""
    return {
        "l2": reconstruction.l2(rendered, image, l2_size),
        "smooth_l1": reconstruction.smooth_l1(rendered, image, smooth_l1_sizes),
    }


def perceptual(rendered: Maps, image: Maps) -> Float[Tensor, ""]:
    """L_perc: the distance of normalised maps (equation 4)."""
    return reconstruction.perceptual(rendered, image)


def identity(rendered: Maps, image: Maps) -> Float[Tensor, ""]:
    """L_id: 1 - cos at every depth of a network that knows faces, summed (equation 5)."""
    return reconstruction.cosine(rendered, image)


def structure(rendered: Maps, image: Maps) -> Float[Tensor, ""]:
    """L_struct: the same on the contracting levels of a network that parses faces (equation 6)."""
    return reconstruction.cosine(rendered, image)


def edit_consistency(
    ws: Float[Tensor, "batch num_ws w_dim"],
    ws_edited: Float[Tensor, "batch num_ws w_dim"],
    direction: Float[Tensor, "batch num_ws w_dim"],
) -> Float[Tensor, ""]:
    """L_e = |(w_e - w) - d|_1 (equation 7), a mean over entries.

    `ws` and `ws_edited` are what the encoder gives for X = G(w) and X_e = G(w + d).
    """
    return ((ws_edited - ws) - direction).abs().mean()


def w_norm(ws: Float[Tensor, "batch num_ws w_dim"]) -> Float[Tensor, ""]:
    """|w - w_avg|_2 over all layers, the mean over pictures; `ws` is what the encoder gives, less `w_avg`."""
    return ws.flatten(1).norm(dim=1).mean()


def feature(
    feature: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Smooth L1 between F and the map it should be: H, or what G's activations lack (`feature_gap`)."""
    return F.smooth_l1_loss(feature, target)


def feature_gap(
    wanted: Float[Tensor, "batch channels height width"],
    rendered: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """What F has to add: G's activations for the true latents less those for the latents it is given.

    The published target is `wanted` alone, although F is added to `rendered`. A target has no gradient.
    """
    return (wanted - rendered).detach()


@torch.no_grad()
def composite(
    image: Float[Tensor, "batch 3 height width"],
    plain: Float[Tensor, "batch 3 height width"],
    moved: Float[Tensor, "batch 3 height width"],
    full_change: float = 0.25,
) -> Float[Tensor, "batch 3 height width"]:
    """What an edit of a real picture should look like, from `plain` = G(w) and `moved` = G(w + d).

    Where the edit leaves G's picture alone the picture stays; where it changes little the change is added;
    where it changes G's picture by `full_change` (on [-1, 1], the mean over channels, blurred) or more, G's
    edited picture takes the place: what was there before would show through it. In [-1, 1], no gradient.
    """
    plain, moved = plain.clamp(-1, 1), moved.clamp(-1, 1)
    change = images.blur((moved - plain).abs().mean(1, keepdim=True), max(image.shape[-2] / 32, 0.5))
    taken = (change / full_change).clamp(0, 1)
    return (image + (moved - plain) + taken * (plain - image)).clamp(-1, 1)


def total_variation(rendered: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, ""]:
    """Smoothness of an edited picture."""
    return reconstruction.total_variation(rendered)


def cycle(
    returned: Float[Tensor, "batch 3 height width"], image: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """Squared difference between a picture and what comes back when its edit is encoded and undone."""
    return reconstruction.l2(returned, image)
