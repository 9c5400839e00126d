"""The convolutional decoder from patch tokens to pixels that Mamba-ST and SaMam share (StyTr2's)."""

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Larger maps are decoded in strips where no gradient is wanted: the finest activations of a picture of
# 4096 px would take 4 GB each.
_STRIP_POSITIONS = 128 * 128


class CNNDecoder(nn.Module):
    """3x3 convolutions on mirrored borders, a ReLU after each but the last; x2 (nearest) between stages.

    `stages` names the output widths of the convolutions of each stage, so the last number is the picture's 3
    channels. Takes a map (batch, channels, rows, columns) of 2x2 positions or more and gives
    (batch, 3, rows * scale, columns * scale), with scale = 2^(stages - 1), in [0, 1] as trained, not clamped.
    """

    def __init__(self, channels: int, stages: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        widths = [channels, *(width for stage in stages for width in stage)]
        convs: list[nn.Conv2d] = [nn.Conv2d(a, b, 3) for a, b in pairwise(widths)]
        with torch.no_grad():
            for conv in convs:
                # torch's own draw loses the signal on the way: pictures would start black and flat (a
                # deviation of 0.001). He's keeps it, and the last layer starts near mid-grey.
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                assert conv.bias is not None
                conv.bias.fill_(0.5 if conv is convs[-1] else 0.0)
            convs[-1].weight.mul_(0.2)
        self.convs = nn.ModuleList(convs)
        self.doublings = frozenset(accumulate(len(stage) for stage in stages[:-1]))
        self.scale = 2 ** len(self.doublings)

    def forward(
        self, x: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        # An exported graph serves every size, so it has no strips.
        whole = torch.is_grad_enabled() or torch.compiler.is_exporting()
        if whole or x.shape[2] * x.shape[3] <= _STRIP_POSITIONS:
            return self.decode(x)
        return self.decode_strips(x, max(_STRIP_POSITIONS // x.shape[3], 1))

    def decode(
        self, x: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The whole map at once."""
        for number, conv in enumerate(self.convs):
            if number in self.doublings:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv(F.pad(x, (1, 1, 1, 1), mode="reflect"))
            if number < len(self.convs) - 1:
                x = F.relu(x, inplace=True)
        return x

    def decode_strips(
        self, x: Float[Tensor, "batch channels rows columns"], rows: int
    ) -> Float[Tensor, "batch 3 height width"]:
        """The same picture from strips of `rows` rows and as many neighbours as a pixel depends on."""
        height, margin = x.shape[2], self.margin
        picture = x.new_empty(len(x), 3, height * self.scale, x.shape[3] * self.scale)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first = max(start - margin, 0)
            strip = self.decode(x[:, :, first : min(stop + margin, height)])
            kept = slice((start - first) * self.scale, (stop - first) * self.scale)
            picture[:, :, start * self.scale : stop * self.scale] = strip[:, :, kept]
        return picture

    @property
    def margin(self) -> int:
        """Rows of the map beyond which a pixel does not depend on what is there."""
        reach = 0
        for number in range(len(self.convs)):
            reach = (2 * reach if number in self.doublings else reach) + 1
        return -(-reach // self.scale)


def check_stages(stages: tuple[tuple[int, ...], ...], patch: int) -> None:
    """ValueError unless such a decoder makes pictures of three channels and one patch of each position."""
    if not all(stages) or stages[-1][-1] != 3:
        raise ValueError(f"decoder must name the widths of each stage and end in 3 channels, got {stages}")
    if 2 ** (len(stages) - 1) != patch:
        raise ValueError(
            f"decoder has {len(stages)} stages, which enlarge by {2 ** (len(stages) - 1)}: "
            f"patch {patch} needs an enlargement of {patch}"
        )
