"""SaMam (Liu et al. 2025, arXiv 2503.15934): a style-aware state space model for arbitrary style transfer.

    style -> encoder -> embedder -> code E;  content -> encoder -> groups of SAVSSMs led by E -> CNN decoder

E makes the normalisation, the depthwise kernels, and the matrices A and D of each picture's own scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.nn.cnn_decoder import CNNDecoder, check_stages
from mambastyle.nn.patches import PatchEmbedding
from mambastyle.nn.ss2d import SS2DConfig, initial_A_log, initial_delta_bias
from mambastyle.ops import zigzag_paths
from mambastyle.ops.ss2d_scan import ss2d_scan

# Height and width of the style code.
_CODE_SIZE = 3


@dataclass(frozen=True)
class SaMamConfig:
    """Sizes of SaMam; the defaults are the published ones with patches of 8 px."""

    dim: int = 256
    state: int = 16
    expand: int = 2
    patch: int = 8
    encoder_layers: int = 2
    groups: int = 2
    group_layers: int = 2
    squeeze: int = 32
    """Width of the narrow part of a LoE."""
    style_dim: int = 64
    """Channels of the style code E, which has 3x3 positions."""
    embedder_steps: int = 3
    """Halvings of the style's map before it is pooled to 4x4."""
    decoder: tuple[tuple[int, ...], ...] = ((128,), (128, 128, 128, 64), (64, 32), (32, 3))
    """Widths of the CNN decoder's convolutions, stage by stage, each at twice the size of the one before."""
    token_limit: float | None = None
    """The greatest value of the tokens that a SAVSSM scans; greater ones are cut. Not in the paper: steps,
    inputs and read-outs all grow with a token, so the scan's output with about its fourth power, and under
    styles unlike the trained ones single tokens burnt spots into the picture."""
    grain: float = 0.0
    """Deviation of the noise, on [-1, 1], that contents have: they had it in training, and callers add it
    (`images.add_grain`). Not in the paper: where a content is flat, a network without noise can draw nothing
    but a pattern that repeats with its patches."""
    published: bool = False
    """Modulate as the published code does: gamma = g and SCM = sigmoid, so a SAVSSM that starts from zero
    halves its input. Otherwise as the paper means it: a SAVSSM starts as the identity."""

    def __post_init__(self) -> None:
        check_stages(self.decoder, self.patch)
        counts = {"encoder_layers": self.encoder_layers, "groups": self.groups}
        counts |= {"group_layers": self.group_layers, "embedder_steps": self.embedder_steps}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be 1 or more, got {count}")
        if self.grain < 0:
            raise ValueError(f"grain must not be negative, got {self.grain}")
        if self.token_limit is not None and not self.token_limit > 0:
            raise ValueError(f"token_limit must be above 0, or None for none, got {self.token_limit}")

    @property
    def ss2d(self) -> SS2DConfig:
        return SS2DConfig(self.dim, state=self.state, expand=self.expand)


SAMAM_PATCH4 = SaMamConfig(patch=4, embedder_steps=4, decoder=((128,), (128, 128, 64), (64, 32, 32, 3)))
"""The published configuration with patches of 4 px."""

SAMAM_SMALL = SaMamConfig(
    dim=64,
    state=4,
    patch=4,
    squeeze=16,
    style_dim=32,
    embedder_steps=4,
    decoder=((64,), (48, 48), (32, 3)),
    token_limit=6.0,
    grain=0.06,
)
"""Trains on two CPU cores. With patches of 8 px and twice the width a step costs the same and learns less:
after 2,000 pairs the content was still unrecognisable, where these show it after 1,600."""


# ---- Shared by content and style (section 3.2)


class ChannelAttention(nn.Module):
    """Scale each channel by what the means of all say."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand = nn.Conv2d(squeeze, channels, 1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.squeeze(means))))


class LoE(nn.Module):
    """Local enhancement: `x + CA(conv(GELU(conv(x))))`."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, squeeze, 3, padding=1)
        self.conv_2 = nn.Conv2d(squeeze, channels, 3, padding=1)
        self.attention = ChannelAttention(channels, squeeze)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return x + self.attention(self.conv_2(F.gelu(self.conv_1(x))))


class ZigzagScan(nn.Module):
    """What the two scans of SaMam have in common: tokens along four zigzag paths, with given A and D."""

    def __init__(self, config: SS2DConfig) -> None:
        super().__init__()
        self.config = config
        inner, state, rank = config.inner, config.state, config.dt_rank
        self.x_proj_weight = nn.Parameter(
            torch.empty(4, rank + 2 * state, inner).uniform_(-1, 1) * inner**-0.5
        )
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank).uniform_(-1, 1) * rank**-0.5)
        self.dt_projs_bias = nn.Parameter(initial_delta_bias(torch.empty(4, inner)))

    def forward(
        self,
        x: Float[Tensor, "batch inner height width"],
        A: Float[Tensor, "*images 4 inner state"],
        D: Float[Tensor, "*images 4 inner"],
    ) -> Float[Tensor, "batch inner height width"]:
        height, width = x.shape[2:]
        rank, state = self.config.dt_rank, self.config.state
        tokens = x.flatten(2).transpose(1, 2)  # (batch, length, inner)
        projected = F.linear(tokens, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (4, -1))
        dt_low, B, C = projected.split((rank, state, state), dim=-1)
        paths = zigzag_paths(height, width, device=x.device)
        y = ss2d_scan(tokens, dt_low, self.dt_projs_weight, A, B, C, D, self.dt_projs_bias, paths)
        return y.transpose(1, 2).unflatten(2, (height, width))


class VSSM(nn.Module):
    """`x + out_proj(scan(SiLU(conv(in_proj(x)))))` on a map, without norm or gate."""

    def __init__(self, config: SS2DConfig) -> None:
        super().__init__()
        dim, inner = config.dim, config.inner
        self.in_proj = nn.Conv2d(dim, inner, 1, bias=False)
        self.conv2d = nn.Conv2d(
            inner, inner, config.kernel_size, padding=config.kernel_size // 2, groups=inner
        )
        self.scan = ZigzagScan(config)
        self.A_logs = nn.Parameter(initial_A_log(torch.empty(4 * inner, config.state)).clone())
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_proj = nn.Conv2d(inner, dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        A = -torch.exp(self.A_logs.float()).unflatten(0, (4, -1))
        inner = F.silu(self.conv2d(self.in_proj(x)))
        return x + self.out_proj(self.scan(inner, A, self.Ds.unflatten(0, (4, -1))))


class Encoder(nn.Module):
    """Pictures in [-1, 1] to a map: patches, VSSMs, one LoE."""

    def __init__(self, config: SaMamConfig, least: int) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config.dim, config.patch, least)
        self.blocks = nn.ModuleList(VSSM(config.ss2d) for _ in range(config.encoder_layers))
        self.loe = LoE(config.dim, config.squeeze)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        x = self.embedding(image)
        for block in self.blocks:
            x = block(x)
        return self.loe(x)


class StyleEmbedder(nn.Module):
    """The style's map to the code E (batch, style_dim, 3, 3)."""

    def __init__(self, config: SaMamConfig) -> None:
        super().__init__()
        dim = config.dim
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, padding_mode="reflect") for _ in range(config.embedder_steps)
        )
        self.fc = nn.Linear(dim * 4 * 4, config.style_dim * _CODE_SIZE**2)

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch style_dim 3 3"]:
        for conv in self.convs:
            x = F.avg_pool2d(F.leaky_relu(conv(x), 0.01), 2)
        code = self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))
        return code.unflatten(1, (-1, _CODE_SIZE, _CODE_SIZE))


# ---- Led by the style (section 3.3, figure 3)


class SAIN(nn.Module):
    """Style-aware instance norm: `IN(x) * (base + gamma(E)) + beta(E)`, each `LeakyReLU(linear(mean of E))`.

    `base` None is the published form, `IN(x) * gamma(E) + beta(E)` with ordinary initial weights. Otherwise
    both embedders start at zero: base 1 starts as the plain norm, base 0 closes a branch.
    """

    def __init__(self, channels: int, style_dim: int, base: float | None) -> None:
        super().__init__()
        self.base = base
        self.gamma, self.beta = nn.Linear(style_dim, channels), nn.Linear(style_dim, channels)
        if base is not None:
            for layer in (self.gamma, self.beta):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], code: Float[Tensor, "batch style_dim 3 3"]
    ) -> Float[Tensor, "batch channels height width"]:
        mean = code.mean((2, 3))
        gamma = F.leaky_relu(self.gamma(mean), 0.1)[:, :, None, None] + (self.base or 0.0)
        beta = F.leaky_relu(self.beta(mean), 0.1)[:, :, None, None]
        # Not F.instance_norm: it refuses a map of one position. Not var_mean: several times slower on a CPU.
        centred = x - x.mean((2, 3), keepdim=True)
        variance = centred.square().mean((2, 3), keepdim=True)
        return torch.addcmul(beta, centred, torch.rsqrt(variance + 1e-5) * gamma)


class SConv(nn.Module):
    """A depthwise 3x3 convolution on mirrored borders whose kernels E makes, for each picture its own."""

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(style_dim, channels, 3, padding=1, padding_mode="reflect")

    def forward(
        self, x: Float[Tensor, "batch channels height width"], code: Float[Tensor, "batch style_dim 3 3"]
    ) -> Float[Tensor, "batch channels height width"]:
        kernels = (
            F.leaky_relu(self.kernel(code), 0.1).flatten(0, 1).unsqueeze(1)
        )  # (batch * channels, 1, 3, 3)
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        if len(x) == 1:  # a map that is channels-last stays so: a tenth of the time
            return F.conv2d(padded, kernels, groups=len(kernels))
        return F.conv2d(padded.flatten(0, 1), kernels, groups=len(kernels)).unflatten(0, x.shape[:2])


class SCM(nn.Module):
    """Style-aware channel modulation: a factor for each channel of the skip, in (0, 2) and 1 at the start.

    The published factor lies in (0, 1).
    """

    def __init__(self, channels: int, style_dim: int, published: bool, squeeze: int = 16) -> None:
        super().__init__()
        self.top = 1.0 if published else 2.0
        self.conv = nn.Conv2d(style_dim, squeeze, _CODE_SIZE, bias=False)
        self.prelu = nn.PReLU()
        self.linear = nn.Conv2d(squeeze, channels, 1, bias=False)
        if not published:
            nn.init.zeros_(self.linear.weight)

    def forward(self, code: Float[Tensor, "batch style_dim 3 3"]) -> Float[Tensor, "batch channels 1 1"]:
        return self.top * torch.sigmoid(self.linear(self.prelu(self.conv(code))))


class S7(nn.Module):
    """The style-aware scan: steps, B and C come from the content, A = -exp(linear(E)) and D = linear(E)."""

    def __init__(
        self, config: SS2DConfig, style_dim: int, published: bool, token_limit: float | None
    ) -> None:
        super().__init__()
        self.config, self.token_limit = config, token_limit
        dim, inner, state = config.dim, config.inner, config.state
        self.in_proj = nn.Conv2d(dim, inner, 1, bias=False)
        self.sconv = SConv(inner, style_dim)
        self.scan = ZigzagScan(config)
        self.A_log = nn.Linear(style_dim, 4 * inner * state)
        self.D = nn.Linear(style_dim, 4 * inner)
        self.sain = SAIN(inner, style_dim, None if published else 0.0)
        self.out_proj = nn.Conv2d(inner, dim, 1, bias=False)
        with torch.no_grad():
            # Around what every scan starts from: A = -1 ... -N, D = 1; the style moves it.
            self.A_log.bias.view(-1, state).copy_(initial_A_log(torch.empty(4 * inner, state)))
            self.D.bias.fill_(1.0)

    def forward(
        self, x: Float[Tensor, "batch dim height width"], code: Float[Tensor, "batch style_dim 3 3"]
    ) -> Float[Tensor, "batch dim height width"]:
        mean = code.mean((2, 3))
        A = -torch.exp(self.A_log(mean).float()).unflatten(1, (4, -1, self.config.state))
        D = self.D(mean).unflatten(1, (4, -1))
        inner = F.silu(self.sconv(self.in_proj(x), code))
        if self.token_limit is not None:
            inner = inner.clamp(max=self.token_limit)  # SiLU's least is -0.28
        return self.out_proj(self.sain(self.scan(inner, A, D), code))


class SAVSSM(nn.Module):
    """`S7(SAIN(x, E), E) + x * SCM(E)`."""

    def __init__(self, config: SaMamConfig) -> None:
        super().__init__()
        self.sain = SAIN(config.dim, config.style_dim, None if config.published else 1.0)
        self.s7 = S7(config.ss2d, config.style_dim, config.published, config.token_limit)
        self.scm = SCM(config.dim, config.style_dim, config.published)

    def forward(
        self, x: Float[Tensor, "batch dim height width"], code: Float[Tensor, "batch style_dim 3 3"]
    ) -> Float[Tensor, "batch dim height width"]:
        return self.s7(self.sain(x, code), code) + x * self.scm(code)


class SAVSSGroup(nn.Module):
    """`LoE(SAVSSM(SAVSSM(x, E), E) + x)`."""

    def __init__(self, config: SaMamConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SAVSSM(config) for _ in range(config.group_layers))
        self.loe = LoE(config.dim, config.squeeze)

    def forward(
        self, x: Float[Tensor, "batch dim height width"], code: Float[Tensor, "batch style_dim 3 3"]
    ) -> Float[Tensor, "batch dim height width"]:
        y = x
        for block in self.blocks:
            y = block(y, code)
        return self.loe(y + x)


# ---- The whole (figure 2)


class SaMam(nn.Module):
    """Content and style in [-1, 1], of any and different sizes, to a picture of the content's size."""

    def __init__(self, config: SaMamConfig) -> None:
        super().__init__()
        self.config = config
        # Borders are mirrored, which takes two positions a side; the style's map is halved before that.
        self.content_encoder = Encoder(config, least=2)
        self.style_encoder = Encoder(config, least=2**config.embedder_steps)
        self.style_embedder = StyleEmbedder(config)
        self.groups = nn.ModuleList(SAVSSGroup(config) for _ in range(config.groups))
        self.cnn_decoder = CNNDecoder(config.dim, config.decoder)

    def forward(
        self, content: Float[Tensor, "batch 3 height width"], style: Float[Tensor, "#batch 3 _ _"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Stylize; not clamped. For a style that is used again, `encode_style` once and then `stylize`."""
        return self.stylize(content, self.encode_style(style))

    def encode_style(
        self, style: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch style_dim 3 3"]:
        """All that depends on the style alone: the code E."""
        return self.style_embedder(self.style_encoder(style))

    def mix_styles(
        self, codes: Sequence[Float[Tensor, "batch style_dim 3 3"]], weights: Sequence[float]
    ) -> Float[Tensor, "batch style_dim 3 3"]:
        """A style between several: the weighted mean of their codes."""
        return torch.stack([weight * code for code, weight in zip(codes, weights, strict=True)]).sum(0)

    def stylize(
        self,
        content: Float[Tensor, "batch 3 height width"],
        style_code: Float[Tensor, "#batch style_dim 3 3"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """Stylize by what `encode_style` gave, one style for each picture or one for all; not clamped."""
        return self.paint(self.transfer(content, style_code), *content.shape[2:])

    def transfer(
        self,
        content: Float[Tensor, "batch 3 height width"],
        style_code: Float[Tensor, "#batch style_dim 3 3"],
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The content's map after the groups, which `paint` makes a picture of."""
        if style_code.shape[0] not in (1, content.shape[0]):
            raise ValueError(
                f"expected 1 style or {len(content)}, one for each picture, got {len(style_code)}"
            )
        x = self.content_encoder(content)
        code = style_code.expand(x.shape[0], -1, -1, -1)
        for group in self.groups:
            x = group(x, code)
        return x

    def paint(
        self, x: Float[Tensor, "batch dim rows columns"], height: int, width: int
    ) -> Float[Tensor, "batch 3 {height} {width}"]:
        """The picture of a map, cut to the content's size; not clamped."""
        return (self.cnn_decoder(x) * 2 - 1)[..., :height, :width]
