"""Pictures of any size to patch tokens: mirrored up to whole patches, embedded by one strided convolution."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Pictures (batch, 3, height, width) in [-1, 1] to a map with one position for each patch.

    The picture is first mirrored at the bottom and the right up to whole patches, `least` of them at least
    (see `mirror_to`). The convolution sees [0, 1], the range of the published style-transfer networks.
    """

    def __init__(self, dim: int, patch: int, least: int = 1) -> None:
        super().__init__()
        self.patch, self.least = patch, least
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        height, width = (
            # The next whole number of patches. ONNX rounds the division of negative numbers otherwise.
            self.patch * max((size + self.patch - 1) // self.patch, self.least)
            for size in image.shape[2:]
        )
        return self.proj((mirror_to(image, height, width) + 1) / 2)


def mirror_to(
    image: Float[Tensor, "batch channels _ _"], height: int, width: int
) -> Float[Tensor, "batch channels {height} {width}"]:
    """Continue a picture downwards and to the right by mirroring it, as often as the size asks for.

    A padding of up to one less than the picture is torch's "reflect"; a side of 1 px is repeated.
    """
    rows, columns = _mirrored(image.shape[2], height, image), _mirrored(image.shape[3], width, image)
    # An exported graph serves every size, also those that need no mirroring.
    always = torch.compiler.is_exporting()
    if always or height != image.shape[2]:
        image = image[:, :, rows]
    return image[:, :, :, columns] if always or width != image.shape[3] else image


def _mirrored(size: int, wanted: int, like: Tensor) -> Tensor:
    """0 1 2 1 0 1 2 ... for size 3: positions of a triangle wave."""
    if wanted < size:
        raise ValueError(f"cannot mirror {size} px to {wanted}: crop with images.crop")
    positions = torch.arange(wanted, device=like.device)
    last = size - 1
    return last - (positions % max(2 * last, 1) - last).abs()
