"""Editing directions as others publish them: InterFaceGAN's, GANSpace's and StyleCLIP's, to ours.

| file | holds | becomes |
|---|---|---|
| InterFaceGAN .npy or .pt | a unit normal, (1, 512), (512,) or one per layer, (18, 512) | one direction |
| GANSpace .pt | comp (n, 512), std (n,), mean | n directions; a strength of 1 is one standard deviation |
| GANSpace .npz | lat_comp (n, 1, 512), lat_stdev (n,), lat_mean | the same |
| StyleCLIP's fs3.npy | what CLIP sees change with each style channel, (channels, 512) | `StyleClipGlobal` |

StyleCLIP's global directions live in the space of styles, which our latents are mapped to: see there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambastyle.latents.directions import Direction, Directions
from mambastyle.latents.text import style_affines
from mambastyle.models.stylegan2 import Generator
from mambastyle.published.reader import tensors_in
from mambastyle.published.unpickler import PublishedError, StoredTensor

NUM_WS = 18
"""Latents of the 1024 px generators for which nearly all directions are published."""
_PCA_NAMES = (("comp", "std"), ("lat_comp", "lat_stdev"))


def find(tree: Any) -> dict[str, Tensor | StoredTensor] | None:
    """The tensors of a tree that holds directions; None where it holds something else."""
    if isinstance(tree, Tensor | StoredTensor):
        return {"direction": tree}
    tensors = tensors_in(tree)
    if any(set(names) <= set(tensors) for names in _PCA_NAMES):
        return tensors
    return None


def parse(tensors: Mapping[str, Tensor], name: str, num_ws: int = NUM_WS) -> "Directions | StyleClipGlobal":
    """The directions in what `find` found, for a generator of `num_ws` latents."""
    for components, deviations in _PCA_NAMES:
        if components in tensors:
            return _pca(tensors[components], tensors[deviations], num_ws)
    vector = tensors["direction"]
    # A table with far more rows than any generator has layers holds one row per style channel.
    if vector.ndim == 2 and len(vector) > 64:
        return StyleClipGlobal(vector.float())
    return Directions([boundary(tensors["direction"], name, num_ws)])


def boundary(vector: Tensor, name: str, num_ws: int = NUM_WS) -> Direction:
    """InterFaceGAN's normal of a boundary, in W (applied to all layers) or in W+ (a row per layer)."""
    rows = vector.float()
    if rows.ndim == 3 and rows.shape[0] == 1:
        rows = rows[0]
    clean = name.replace("=", "-").replace(",", "-").replace("@", "-").strip() or "direction"
    if rows.ndim == 1 or rows.shape[0] == 1:
        return Direction.from_w(clean, rows.reshape(-1), num_ws)
    if rows.ndim != 2 or rows.shape[0] != num_ws:
        raise PublishedError(
            f"a direction of shape {tuple(vector.shape)}, expected (1, w_dim) or ({num_ws}, w_dim): "
            "give num_ws= for another generator"
        )
    return Direction(clean, rows.contiguous(), space="w+")


def _pca(components: Tensor, deviations: Tensor, num_ws: int) -> Directions:
    vectors = components.float().reshape(len(components), -1)
    scales = deviations.float().reshape(-1)
    if len(scales) != len(vectors):
        raise PublishedError(f"{len(vectors)} principal components and {len(scales)} deviations")
    return Directions(
        Direction.from_w(f"pc{i}", vector, num_ws, scale=float(scale), description="GANSpace")
        for i, (vector, scale) in enumerate(zip(vectors, scales, strict=True))
    )


@dataclass(frozen=True, eq=False)
class StyleClipGlobal:
    """StyleCLIP's global directions (Patashnik et al. 2021, section 6): text to a direction, by one table.

    relevance: (channels, clip_dim), how the CLIP embedding of a picture moves with each style channel; the
    channels of all convolutions in order (to_rgb has none); `fs3.npy` in the authors' repository.
    """

    relevance: Float[Tensor, "channels clip_dim"]

    def styles(self, text: Float[Tensor, " clip_dim"], threshold: float = 0.1) -> Float[Tensor, " channels"]:
        """How much each style channel moves, in its standard deviations, the largest being 1.

        text: the embedding of the target text less that of the neutral one, each of unit length.
        threshold: the authors' beta; channels of less relevance stay (larger: fewer channels, more specific).
        Raises ValueError when no channel passes the threshold.
        """
        moved = self.relevance.float() @ torch.nn.functional.normalize(text.float(), dim=0)
        moved = moved.where(moved.abs() >= threshold, torch.zeros(()))
        largest = moved.abs().max()
        if largest == 0:
            raise ValueError(
                f"no style channel has a relevance of {threshold} for this text: lower threshold"
            )
        return moved / largest

    @torch.no_grad()
    def direction(
        self,
        name: str,
        text: Float[Tensor, " clip_dim"],
        generator: Generator,
        *,
        threshold: float = 0.1,
        samples: int = 2000,
    ) -> Direction:
        """The direction in W+ whose styles come nearest (least squares) to those of the text.

        A style is affine in the w of its layer, so each layer is solved by itself; one of up to w_dim
        channels is met exactly. `samples` mapped latents give the styles' standard deviations.
        """
        config = generator.config
        random = torch.Generator().manual_seed(0)
        w = generator.mapping.w(torch.randn(samples, config.z_dim, generator=random))
        moved = self.styles(text, threshold)
        affines = style_affines(generator)
        widths = [affine.weight.shape[0] for affine in affines]
        if sum(widths) != len(moved):
            raise ValueError(
                f"the table is for {len(moved)} style channels and this generator has {sum(widths)}: "
                "use the table of this generator"
            )
        rows = torch.zeros(config.num_ws, config.w_dim)
        for row, (affine, part) in enumerate(zip(affines, moved.split(widths), strict=True)):
            matrix = (affine.weight * affine.weight_gain).double()
            target = part.double() * affine(w).std(0).double()
            rows[row] = (torch.linalg.pinv(matrix) @ target).float()
        return Direction(name, rows, space="w+", description="StyleCLIP, global")
