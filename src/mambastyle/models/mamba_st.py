"""Mamba-ST (Botti et al. 2025, arXiv 2409.10385): style transfer by a state space model fed by two pictures.

    content, style -> patches -> content encoder, style encoder -> ST decoder -> CNN decoder -> stylized

In the decoder the style is what is scanned and what sets the scan's steps and inputs; the content reads out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambastyle.nn.cnn_decoder import CNNDecoder, check_stages
from mambastyle.nn.patches import PatchEmbedding
from mambastyle.nn.ss2d import SS2DConfig, initial_A_log, initial_delta_bias
from mambastyle.nn.vss_block import VSSBlock
from mambastyle.ops import cross_paths
from mambastyle.ops.ss2d_scan import ss2d_scan

SHUFFLE_SEED = 0
"""Of the permutations that are drawn where no generator is given."""


@dataclass(frozen=True)
class MambaSTConfig:
    """Sizes of Mamba-ST; the defaults are the published ones."""

    dim: int = 512
    state: int = 16
    expand: int = 2
    patch: int = 8
    encoder_layers: int = 3
    decoder_layers: int = 3
    decoder: tuple[tuple[int, ...], ...] = ((256,), (256, 256, 256, 128), (128, 64), (64, 3))
    """Widths of the CNN decoder's convolutions, stage by stage, each at twice the size of the one before."""
    shuffle: bool = True
    """Every decoder layer sees the style tokens in another random order."""
    position_grid: int | None = None
    """Side of the pooled content that codes positions (published option: 18); None for no code."""
    grain: float = 0.0
    """Deviation of the noise that contents have, as in `SaMamConfig`."""

    def __post_init__(self) -> None:
        check_stages(self.decoder, self.patch)
        if min(self.encoder_layers, self.decoder_layers) < 1:
            raise ValueError(
                f"encoder_layers and decoder_layers must be 1 or more, got {self.encoder_layers} "
                f"and {self.decoder_layers}"
            )
        if self.grain < 0:
            raise ValueError(f"grain must not be negative, got {self.grain}")
        if self.position_grid is not None and self.position_grid < 1:
            raise ValueError(f"position_grid must be 1 or more, or None for none, got {self.position_grid}")

    @property
    def ss2d(self) -> SS2DConfig:
        return SS2DConfig(self.dim, state=self.state, expand=self.expand)


MAMBA_ST_SMALL = MambaSTConfig(
    dim=96,
    state=4,
    patch=4,
    encoder_layers=2,
    decoder_layers=2,
    decoder=((64,), (48, 48), (32, 3)),
    grain=0.06,
)
"""Trains on two CPU cores."""


# ---- The ST decoder (section 3.3, figure 3)


class STSS2D(nn.Module):
    """The two-dimensional scan with two sources, a style s and a content.

        h_t = exp(d_t A) h_{t-1} + d_t B_t s_t;  y_t = C_t h_t + D s_t

    B and the steps d come from the style, C from the content; the content also gates the output. Both go
    through the same depthwise convolution. Content (batch, height, width, dim) and style of the same shape.
    """

    def __init__(self, config: SS2DConfig) -> None:
        super().__init__()
        self.config = config
        dim, inner, state, rank = config.dim, config.inner, config.state, config.dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.in_style_proj = nn.Linear(dim, inner, bias=False)
        self.conv2d = nn.Conv2d(
            inner, inner, config.kernel_size, padding=config.kernel_size // 2, groups=inner
        )
        self.style_proj_weight = nn.Parameter(
            torch.empty(4, rank + state, inner).uniform_(-1, 1) * inner**-0.5
        )
        self.x_proj_weight = nn.Parameter(torch.empty(4, state, inner).uniform_(-1, 1) * inner**-0.5)
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank).uniform_(-1, 1) * rank**-0.5)
        # The published code overwrites the initial A and delta bias with Xavier draws, by which all states
        # start with about the same time scale; here they stay as Mamba has them.
        self.dt_projs_bias = nn.Parameter(initial_delta_bias(torch.empty(4, inner)))
        self.A_logs = nn.Parameter(initial_A_log(torch.empty(4 * inner, state)).clone())
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        content: Float[Tensor, "batch height width dim"],
        style: Float[Tensor, "batch height width dim"],
    ) -> Float[Tensor, "batch height width dim"]:
        height, width = content.shape[1:3]
        rank, state = self.config.dt_rank, self.config.state
        # Each map is made when it is needed and dropped after: at 4096 px the largest take a gigabyte each.
        to_x, to_z = self.in_proj.weight.chunk(2)
        content_tokens = self.mix_neighbours(F.linear(content, to_x))  # (batch, length, inner)
        C = F.linear(content_tokens, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (4, -1))
        del content_tokens
        style_tokens = self.mix_neighbours(self.in_style_proj(style))
        from_style = F.linear(style_tokens, self.style_proj_weight.flatten(0, 1)).unflatten(-1, (4, -1))
        dt_low, B = from_style.split((rank, state), dim=-1)  # (batch, length, 4, ...)
        y = ss2d_scan(
            style_tokens,
            dt_low,
            self.dt_projs_weight,
            -torch.exp(self.A_logs.float()).unflatten(0, (4, -1)),
            B,
            C,
            self.Ds.unflatten(0, (4, -1)),
            self.dt_projs_bias,
            cross_paths(height, width, device=content.device),
        )
        del style_tokens, from_style, dt_low, B, C
        z = F.linear(content, to_z)
        y = self.out_norm(y).to(z.dtype).unflatten(1, (height, width))
        return self.out_proj(y * F.silu(z))

    def mix_neighbours(
        self, x: Float[Tensor, "batch height width inner"]
    ) -> Float[Tensor, "batch length inner"]:
        """Depthwise convolution and SiLU, as tokens."""
        return F.silu(self.conv2d(x.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)


class STBlock(nn.Module):
    """`LN_post(x * skip_scale + STSS2D(LN_pre(x), style))`: a VSSM block with a second source."""

    def __init__(self, config: SS2DConfig) -> None:
        super().__init__()
        self.ln_pre = nn.LayerNorm(config.dim)
        self.ss2d = STSS2D(config)
        self.skip_scale = nn.Parameter(torch.ones(config.dim))
        self.ln_post = nn.LayerNorm(config.dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"], style: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return self.ln_post(x * self.skip_scale + self.ss2d(self.ln_pre(x), style))


class PositionCode(nn.Module):
    """The content on a coarse grid of fixed size, projected and enlarged again (StyTr2's CAPE)."""

    def __init__(self, dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        code = self.proj(F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.grid))
        return F.interpolate(code, x.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)


# ---- The whole (figure 2)


class MambaST(nn.Module):
    """Content and style in [-1, 1], of any and different sizes, to a picture of the content's size."""

    def __init__(self, config: MambaSTConfig) -> None:
        super().__init__()
        self.config = config
        # Two positions a side at least: the CNN decoder mirrors its borders.
        self.embedding = PatchEmbedding(config.dim, config.patch, least=2)
        self.position = (
            None if config.position_grid is None else PositionCode(config.dim, config.position_grid)
        )
        self.content_encoder = nn.ModuleList(VSSBlock(config.ss2d) for _ in range(config.encoder_layers))
        self.style_encoder = nn.ModuleList(VSSBlock(config.ss2d) for _ in range(config.encoder_layers))
        self.st_decoder = nn.ModuleList(STBlock(config.ss2d) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.cnn_decoder = CNNDecoder(config.dim, config.decoder)

    def forward(
        self,
        content: Float[Tensor, "batch 3 height width"],
        style: Float[Tensor, "#batch 3 _ _"],
        *,
        generator: torch.Generator | None = None,
        average: int = 1,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Stylize; not clamped. For a style that is used again, `encode_style` once and then `stylize`."""
        return self.stylize(content, self.encode_style(style), generator=generator, average=average)

    def encode_style(
        self, style: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        """All that depends on the style alone: its encoded tokens."""
        x = self.embedding(style).permute(0, 2, 3, 1)
        for block in self.style_encoder:
            x = block(x) + x
        return x

    def stylize(
        self,
        content: Float[Tensor, "batch 3 height width"],
        style_code: Float[Tensor, "#batch _ _ dim"],
        *,
        generator: torch.Generator | None = None,
        average: int = 1,
        orders: Int[Tensor, "draws layers positions"] | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Stylize by what `encode_style` gave, one style for each picture or one for all; not clamped."""
        decoded = self.transfer(content, style_code, generator=generator, average=average, orders=orders)
        return self.paint(decoded, *content.shape[2:])

    def transfer(
        self,
        content: Float[Tensor, "batch 3 height width"],
        style_code: Float[Tensor, "#batch _ _ dim"],
        *,
        generator: torch.Generator | None = None,
        average: int = 1,
        orders: Int[Tensor, "draws layers positions"] | None = None,
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The map behind the ST decoder, which `paint` makes a picture of.

        The shuffles come from `generator`; without one they are the same at every call. The batch shares
        them. `average` > 1 runs the ST decoder under so many different shuffles and gives the mean of its
        outputs, which depends less on the draw. `orders` gives the shuffles themselves instead, as
        `draw_orders` does.
        """
        if average < 1:
            raise ValueError(f"average must be 1 or more, got {average}")
        if style_code.shape[0] not in (1, content.shape[0]):
            raise ValueError(
                f"expected 1 style or {len(content)}, one for each picture, got {len(style_code)}"
            )
        x = self.embedding(content).permute(0, 2, 3, 1)
        position = torch.zeros_like(x[:1, :1, :1]) if self.position is None else self.position(x)
        for block in self.content_encoder:
            x = x + position
            x = block(x) + x

        style = fit_tokens(style_code, *x.shape[1:3]).expand_as(x)
        if orders is None:
            orders = self.draw_orders(x.shape[1] * x.shape[2], generator, average)
        decoded = torch.stack([self.decode(x, style, position, order) for order in orders]).mean(0)
        return decoded.permute(0, 3, 1, 2)

    def paint(
        self, x: Float[Tensor, "batch dim rows columns"], height: int, width: int
    ) -> Float[Tensor, "batch 3 {height} {width}"]:
        """The picture of a map, cut to the content's size; not clamped."""
        return (self.cnn_decoder(x) * 2 - 1)[..., :height, :width]

    def draw_orders(
        self, positions: int, generator: torch.Generator | None = None, draws: int = 1
    ) -> Int[Tensor, "draws layers positions"]:
        """The orders in which the ST layers see the style tokens; without a shuffle, once as they are."""
        layers = len(self.st_decoder)
        if not self.config.shuffle:
            return torch.arange(positions).expand(1, layers, -1)
        if generator is None:
            generator = torch.Generator().manual_seed(SHUFFLE_SEED)
        drawn = [
            torch.randperm(positions, generator=generator, device=generator.device)
            for _ in range(draws * layers)
        ]
        return torch.stack(drawn).unflatten(0, (draws, layers))

    def decode(
        self,
        content: Float[Tensor, "batch rows columns dim"],
        style: Float[Tensor, "batch rows columns dim"],
        position: Float[Tensor, "#batch #rows #columns dim"],
        orders: Int[Tensor, "layers positions"],
    ) -> Float[Tensor, "batch rows columns dim"]:
        """The ST layers; each sees the style tokens in its own order."""
        x = content
        for block, order in zip(self.st_decoder, orders.to(x.device), strict=True):
            x = x + position
            x = block(x, reorder(style, order) if self.config.shuffle else style) + x
        return self.norm(x)


def fit_tokens(
    tokens: Float[Tensor, "batch _ _ dim"], height: int, width: int
) -> Float[Tensor, "batch {height} {width} dim"]:
    """Bring a grid of style tokens to the content's size: each position takes the nearest token.

    Equal sizes stay as they are. Tokens are repeated or left out, never mixed: a mean of two strokes is no
    stroke of the style, and blending lowers the deviation of what the decoder is trained to see.
    """
    # An exported graph serves every size, also those that fit already.
    if not torch.compiler.is_exporting() and tokens.shape[1:3] == (height, width):
        return tokens
    grid = F.interpolate(tokens.permute(0, 3, 1, 2), (height, width), mode="nearest-exact")
    return grid.permute(0, 2, 3, 1)


def reorder(
    tokens: Float[Tensor, "batch height width dim"], order: Int[Tensor, " positions"]
) -> Float[Tensor, "batch height width dim"]:
    """All positions in another order, the same one for the whole batch."""
    height, width = tokens.shape[1:3]
    return tokens.flatten(1, 2)[:, order].unflatten(1, (height, width))
