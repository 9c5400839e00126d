"""ArcFace with the IR-SE50 body: who a face is, as 512 numbers (Deng et al. 2019; the judge of L_id)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.nn.irse import Bottleneck

SIZE = 112
STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))
"""(channels, bottlenecks) of the four stages; each halves the size."""


class ArcFace(nn.Module):
    """IR-SE50 and its embedding; frozen: gradients reach the picture, never the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        self.body = nn.ModuleList()
        channels = 64
        for width, blocks in STAGES:
            self.body.extend(
                Bottleneck(channels if i == 0 else width, width, 2 - (i > 0)) for i in range(blocks)
            )
            channels = width
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512),
        )
        self.requires_grad_(False)
        self.eval()

    def forward(self, image: Float[Tensor, "batch 3 112 112"]) -> Float[Tensor, "batch 512"]:
        """The embedding, of unit length, of an aligned face in [-1, 1]; `crop_face` makes one."""
        return self.maps(image)["embedding"]

    def maps(self, image: Float[Tensor, "batch 3 112 112"]) -> dict[str, Tensor]:
        """The five depths that L_id compares: the ends of the four stages, and the embedding."""
        if tuple(image.shape[2:]) != (SIZE, SIZE):
            height, width = image.shape[2:]
            raise ValueError(
                f"ArcFace takes faces of {SIZE} x {SIZE} px, got {height} x {width}: use identity.crop_face"
            )
        x = self.input_layer(image)
        maps, index = {}, 0
        for stage, (_, blocks) in enumerate(STAGES):
            for bottleneck in self.body[index : index + blocks]:
                x = bottleneck(x)
            index += blocks
            maps[f"stage{stage + 1}"] = x
        maps["embedding"] = F.normalize(self.output_layer(x))
        return maps


def crop_face(image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 112 112"]:
    """The face in a picture framed as FFHQ: of 256 px rows 35 to 223 and columns 32 to 220, at 112 px."""
    image = F.adaptive_avg_pool2d(image, 256)
    return F.adaptive_avg_pool2d(image[:, :, 35:223, 32:220], SIZE)
