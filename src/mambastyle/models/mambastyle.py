"""MambaStyle (Lopez et al. 2025, arXiv 2505.15822): the encoder and fuser that invert and edit in one pass.

    image -> Encoder -> (ws', H);  ws = ws' + w_avg + direction;  F = Fuser(H, direction);  G(ws, F) -> image

The generator G is frozen and lives in `models.stylegan2`; F is added to its activations at one layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.checkpoints import nearest
from mambastyle.nn.irse import Bottleneck
from mambastyle.nn.modulated import ModulatedConv
from mambastyle.nn.s6 import S6, S6Config
from mambastyle.nn.ss2d import SS2DConfig
from mambastyle.nn.vss_block import OnGrid, ViTBlock, VSSBlock

Mixer = Literal["ss2d", "identity-scan", "vit", "none"]


@dataclass(frozen=True)
class MambaStyleConfig:
    """Sizes and variant of MambaStyle; the defaults are the paper's, for faces with the 1024 px generator.

    Of the three scales, the first is always the finest. `mixer` and `fuser` name the rows of the paper's
    ablation: "ss2d" with fuser is Final, without it W/o Fuser; "none" is Base; "vit" is ViT; "identity-scan"
    is our reading of W/o SS2D, which the paper does not define (its parameter count differs from ours).
    Without `feature` (and so without `fuser`) it is an encoder into W+, the baseline of the field.
    """

    image_size: int = 256
    """Height and width the encoder is trained at; it takes any multiple of `multiple`."""
    frame: tuple[int, int] | None = None
    """(height, width) of the middle of the generator's picture that shows something; None for all of it.

    LSUN's cars are 384 x 512 between black bars: pictures get the bars, and lose them when rendered."""
    num_ws: int = 18
    w_dim: int = 512

    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    blocks: tuple[int, int, int, int] = (2, 2, 5, 2)
    strides: tuple[int, int, int, int] = (2, 2, 2, 2)
    fpn_width: int = 512
    position_patch: int = 8
    position_grid: int = 18
    latent_split: tuple[int, int, int] = (4, 5, 9)
    """How many latents each scale predicts; the finest map gives the coarsest latents."""
    head_pools: tuple[tuple[int, int, int], ...] = ((64, 9, 9), (64, 6, 6), (128, 5, 5))
    """For each scale the (channels, height, width) to which its map is pooled before the linear layer."""

    feature_channels: int = 512
    """Channels of the generator where F is added."""
    feature_layer: int = 9
    """The paper's k: F is added after this convolution, counted from 1 at 4 px; 9 is the second at 64 px.

    Another layer asks for its own `feature_channels`, and for `strides` whose first two bring `image_size` to
    its size: in the generator of `KAOKORE64`, layer 5 (16 px) takes 128 and (2, 2, 1, 2).
    """

    direction_tokens: int = 32
    direction_grid: int = 32
    direction_width: int = 32
    direction_widths: tuple[int, int, int] = (64, 128, 256)

    mixer: Mixer = "ss2d"
    feature: bool = True
    """False: latents alone (W+ only); the encoder gives no H, and nothing is added inside G."""
    fuser: bool = True
    state: int = 16
    expand: int = 2
    vit_mlp: int = 4
    """How many times as wide the MLP of a ViT block is: it sets that variant's parameters."""

    def __post_init__(self) -> None:
        if self.mixer not in get_args(Mixer):
            raise ValueError(f"mixer must be one of {get_args(Mixer)}, got {self.mixer!r}")
        if self.fuser and not self.feature:
            raise ValueError("without feature there is nothing to fuse: set fuser to false as well")
        if sum(self.latent_split) != self.num_ws:
            raise ValueError(f"latent_split {self.latent_split} must add up to num_ws {self.num_ws}")
        if len(self.head_pools) != 3:
            raise ValueError(f"head_pools must name three scales, got {len(self.head_pools)}")
        for channels, _, _ in self.head_pools:
            if self.fpn_width % channels:
                raise ValueError(f"head_pools: {channels} channels do not divide fpn_width {self.fpn_width}")
        if self.image_size % self.multiple:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {self.multiple}")
        if self.frame is not None and min(self.frame) < 1:
            raise ValueError(f"frame must be a height and a width of 1 or more, got {self.frame}")
        if self.direction_tokens != self.direction_width:
            # Each token becomes one channel of the direction's grid (the transposition in section 3.3).
            raise ValueError(
                f"direction_tokens {self.direction_tokens} must equal direction_width {self.direction_width}"
            )

    @property
    def multiple(self) -> int:
        """What height and width must be a multiple of."""
        return math.lcm(math.prod(self.strides), self.position_patch)

    @property
    def feature_stride(self) -> int:
        """Pixels of the encoder's input for each position of H."""
        return self.strides[0] * self.strides[1]

    @property
    def feature_size(self) -> int:
        return self.image_size // self.feature_stride


# ---- Named sizes, and the rows of the ablation

FACES1024 = MambaStyleConfig()
"""The paper's model of faces, with FFHQ's 1024 px generator."""

FACES256 = MambaStyleConfig(num_ws=14, latent_split=(4, 4, 6))
"""For a 256 px generator of faces with 512 channels at 64 px (the .pt layout); the split is ours.

NVIDIA's own 256 px generators have half the channels there: set feature_channels to 256 for one of them.
"""

CARS512 = MambaStyleConfig(num_ws=16, latent_split=(4, 4, 8), frame=(384, 512))
"""The paper's model of cars: LSUN's 512 px generator, pictures of 384 x 512."""

KAOKORE64 = MambaStyleConfig(
    image_size=64,
    num_ws=10,
    w_dim=256,
    widths=(24, 48, 80, 128),
    blocks=(2, 2, 3, 2),
    strides=(2, 1, 2, 2),
    fpn_width=64,
    position_patch=4,
    position_grid=9,
    latent_split=(2, 3, 5),
    head_pools=((32, 6, 6), (32, 6, 6), (64, 4, 4)),
    feature_channels=64,
    feature_layer=7,
    direction_tokens=16,
    direction_grid=16,
    direction_width=16,
    direction_widths=(32, 32, 64),
    state=8,
    expand=1,
    vit_mlp=2,
)
"""For a 64 px generator with 10 latents of 256 and 64 channels at 32 px: trains on two CPU cores."""

CONFIGS: Mapping[str, MambaStyleConfig] = MappingProxyType(
    {"faces1024": FACES1024, "faces256": FACES256, "cars512": CARS512, "kaokore64": KAOKORE64}
)
"""Every named size; run files and the command line take these names."""

VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "final": {"mixer": "ss2d", "fuser": True},
        "base": {"mixer": "none"},
        "vit": {"mixer": "vit"},
        "no-ss2d": {"mixer": "identity-scan"},
        "no-fuser": {"fuser": False},
        "no-le": {},
        "w-plus": {"feature": False, "fuser": False},
    }
)
"""The rows of the paper's table 3, the encoder into W+ alone, and the fields of the config that each changes.

"no-le" is trained without the edit loss: the network is Final's, the run file's `variant` drops the term.
"""


def variant_of(config: MambaStyleConfig, variant: str) -> MambaStyleConfig:
    """`config` as a row of the ablation: `variant_of(KAOKORE64, "vit")`. ValueError for an unknown name."""
    if variant not in VARIANTS:
        near = nearest(variant, VARIANTS)
        hint = f"did you mean {near!r}?" if near else f"choose among {', '.join(VARIANTS)}"
        raise ValueError(f"no variant {variant!r}: {hint}")
    return replace(config, **VARIANTS[variant])


class Inversion(NamedTuple):
    """What the encoder gives, and what an edit gives back.

    `ws` is (batch, num_ws, w_dim) *before* the generator's `w_avg` is added: render
    `synthesis(w_avg + ws, feature)`. `feature` is (batch, channels, height, width), to be added to the
    generator's activations at `config.feature_layer`; None where only the latents are used.
    """

    ws: Float[Tensor, "batch num_ws w_dim"]
    feature: Float[Tensor, "batch channels height width"] | None


def make_mixer(config: MambaStyleConfig, channels: int) -> nn.Module:
    """The block that mixes a map (batch, channels, height, width): a VSSM block in the final model."""
    if config.mixer == "none":
        return nn.Identity()
    if config.mixer == "vit":
        return OnGrid(ViTBlock(channels, mlp_ratio=config.vit_mlp))
    scan = "selective" if config.mixer == "ss2d" else "identity"
    return OnGrid(VSSBlock(SS2DConfig(channels, state=config.state, expand=config.expand, scan=scan)))


def make_sequence_mixer(config: MambaStyleConfig, channels: int) -> nn.Module:
    """The block that mixes a sequence (batch, length, channels): S6 in the final model."""
    if config.mixer == "none":
        return nn.Identity()
    if config.mixer == "vit":
        return ViTBlock(channels, mlp_ratio=config.vit_mlp)
    return S6(S6Config(channels, state=config.state, expand=config.expand))


# ---- Encoder (section 3.2, figure 2 left)


class Body(nn.Module):
    """The improved residual network: four stages, of which the last three give their maps."""

    def __init__(self, config: MambaStyleConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        in_channels = config.widths[0]
        for width, blocks, stride in zip(config.widths, config.blocks, config.strides, strict=True):
            stage = [Bottleneck(in_channels, width, stride)]
            stage += [Bottleneck(width, width, 1) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            in_channels = width

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class PositionBranch(nn.Module):
    """The content-aware positional code: patches of the image itself on a coarse grid of fixed size."""

    def __init__(self, config: MambaStyleConfig) -> None:
        super().__init__()
        self.grid = config.position_grid
        self.patches = nn.Conv2d(3, config.fpn_width, config.position_patch, config.position_patch)
        self.proj = nn.Conv2d(config.fpn_width, config.fpn_width, 1)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], height: int, width: int
    ) -> Float[Tensor, "batch channels {height} {width}"]:
        code = self.proj(F.adaptive_avg_pool2d(self.patches(image), self.grid))
        return F.interpolate(code, (height, width), mode="bilinear")


class LatentHead(nn.Module):
    """BN, average pooling over channels, height and width, and one linear layer: one scale's latents."""

    def __init__(self, in_channels: int, pool: tuple[int, int, int], latents: int, w_dim: int) -> None:
        super().__init__()
        self.pool, self.latents = pool, latents
        self.norm = nn.BatchNorm2d(in_channels)
        self.linear = nn.Linear(math.prod(pool), latents * w_dim)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch latents w_dim"]:
        channels, height, width = self.pool
        x = F.adaptive_avg_pool2d(self.norm(x), (height, width))
        x = x.unflatten(1, (channels, -1)).mean(2)  # (batch, pooled channels, pooled height, pooled width)
        return self.linear(x.flatten(1)).unflatten(1, (self.latents, -1))


class Encoder(nn.Module):
    """Image (batch, 3, height, width) in [-1, 1] to the latents, less `w_avg`, and the feature map H.

    H is None for a model without a feature. Height and width may differ; each must be a multiple of
    `config.multiple`, or a ValueError says so.
    """

    def __init__(self, config: MambaStyleConfig) -> None:
        super().__init__()
        self.config = config
        stem, fine, middle, coarse = config.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem)
        )
        self.body = Body(config)
        self.position = PositionBranch(config)
        # The published widths agree at the coarsest scale, where there is then no lateral convolution.
        self.lateral_coarse = (
            nn.Identity() if coarse == config.fpn_width else nn.Conv2d(coarse, config.fpn_width, 1)
        )
        self.lateral_middle = nn.Conv2d(middle, config.fpn_width, 1)
        self.lateral_fine = nn.Conv2d(fine, config.fpn_width, 1)
        self.mixers = nn.ModuleList(make_mixer(config, config.fpn_width) for _ in range(3))
        self.heads = nn.ModuleList(
            LatentHead(config.fpn_width, pool, latents, config.w_dim)
            for pool, latents in zip(config.head_pools, config.latent_split, strict=True)
        )
        self.to_feature = (
            nn.Conv2d(config.fpn_width, config.feature_channels, 3, padding=1) if config.feature else None
        )

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Inversion:
        for name, size in zip(("height", "width"), image.shape[2:], strict=True):
            if size % self.config.multiple:
                raise ValueError(
                    f"{name} {size} is not a multiple of {self.config.multiple}: "
                    "resize the image or pad it with images.pad_to_multiple"
                )
        fine, middle, coarse = self.body(self.stem(image))

        coarse = self.lateral_coarse(coarse)
        middle = upsample_add(coarse, self.lateral_middle(middle))
        middle = middle + self.position(image, *middle.shape[2:])
        fine = upsample_add(middle, self.lateral_fine(fine))

        maps = [mix(x) for mix, x in zip(self.mixers, (fine, middle, coarse), strict=True)]
        ws = torch.cat([head(x) for head, x in zip(self.heads, maps, strict=True)], dim=1)
        return Inversion(ws, None if self.to_feature is None else self.to_feature(maps[0]))


def upsample_add(
    coarse: Float[Tensor, "batch channels _ _"], fine: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch channels height width"]:
    """One step of the feature pyramid's way down (Lin et al. 2017)."""
    return fine + F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=True)


# ---- Fuser (section 3.3, figure 2 right)


class DirectionEncoder(nn.Module):
    """A direction (batch, num_ws, w_dim) to a map (batch, channels, height, width), to be mixed with H."""

    def __init__(self, config: MambaStyleConfig) -> None:
        super().__init__()
        self.grid = config.direction_grid
        tokens, width = config.direction_tokens, config.direction_width
        first, second, third = config.direction_widths
        self.layers_to_tokens = nn.Conv1d(config.num_ws, tokens, 3, padding=1)
        self.sequence_mixer = make_sequence_mixer(config, config.w_dim)
        self.latent_to_grid = nn.Conv1d(config.w_dim, self.grid**2, 3, padding=1)
        self.coarse_mixer = make_mixer(config, width)
        self.depthwise_1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise_1 = nn.Conv2d(width, first, 1)
        self.depthwise_2 = nn.Conv2d(first, first, 3, padding=1, groups=first)
        self.pointwise_2 = nn.Conv2d(first, second, 1)
        self.conv_1 = nn.Conv2d(second, second, 3, padding=1)
        self.conv_2 = nn.Conv2d(second, third, 1)
        self.conv_3 = nn.Conv2d(third, config.feature_channels, 3, padding=1)
        self.fine_mixer = make_mixer(config, config.feature_channels)

    def forward(
        self, direction: Float[Tensor, "batch num_ws w_dim"], height: int, width: int
    ) -> Float[Tensor, "batch channels {height} {width}"]:
        tokens = self.sequence_mixer(self.layers_to_tokens(direction))  # (batch, tokens, w_dim)
        grid = self.latent_to_grid(tokens.transpose(1, 2))  # (batch, positions, tokens)
        grid = grid.transpose(1, 2).unflatten(-1, (self.grid, self.grid))  # (batch, tokens, grid, grid)
        x = self.coarse_mixer(grid)
        x = self.pointwise_1(self.depthwise_1(x))
        x = self.pointwise_2(self.depthwise_2(x))
        x = F.interpolate(x, (height, width), mode="bilinear")
        x = self.conv_3(self.conv_2(self.conv_1(x)))
        return self.fine_mixer(x)


class Fuser(nn.Module):
    """H and a direction to the map F that is added to the generator's activations.

    Every picture has its own direction. `direction_feature` depends on the direction alone: for one that is
    used again, compute it once (batch 1) and hand it to `forward`.
    """

    def __init__(self, config: MambaStyleConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.feature_channels
        self.direction_encoder = DirectionEncoder(config)
        self.pair_conv = nn.Conv2d(2 * channels, channels, 3, padding=1, groups=channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.mixer = make_mixer(config, channels)
        self.modulated_1 = ModulatedConv(channels, channels, config.w_dim)
        self.modulated_2 = ModulatedConv(channels, channels, config.w_dim)

    def direction_feature(
        self, direction: Float[Tensor, "batch num_ws w_dim"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """The direction branch alone; `size` is H's (height, width), by default a square training image's."""
        self.check_direction(direction)
        height, width = size or (self.config.feature_size, self.config.feature_size)
        return self.direction_encoder(direction, height, width)

    def forward(
        self,
        feature: Float[Tensor, "batch channels height width"],
        direction: Float[Tensor, "batch num_ws w_dim"],
        direction_feature: Float[Tensor, "#batch channels height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        self.check_direction(direction)
        if direction.shape[0] != feature.shape[0]:
            raise ValueError(
                f"expected one direction for each of {len(feature)} pictures, got {len(direction)}: "
                "expand the direction"
            )
        if direction_feature is None:
            height, width = feature.shape[2:]
            direction_feature = self.direction_feature(direction, (height, width))
        fused = self.mixer(self.conv(self._pair(feature, direction_feature)))
        style = direction.mean(dim=1)
        return self.modulated_2(self.modulated_1(fused, style), style)

    def _pair(
        self, feature: Tensor, direction_feature: Tensor
    ) -> Float[Tensor, "batch channels height width"]:
        """Channel i of H and channel i of the direction's map, interleaved, meet in group i of `pair_conv`.

        The two halves of each group's kernel go over their own map: no interleaved copy, one pass over a
        direction that all pictures share, and depthwise convolutions, whose backward pass is several times
        as fast as that of groups of two on a CPU.
        """
        weight, channels = self.pair_conv.weight, feature.shape[1]
        ours = F.conv2d(feature, weight[:, :1], self.pair_conv.bias, padding=1, groups=channels)
        return ours + F.conv2d(direction_feature, weight[:, 1:], padding=1, groups=channels)

    def check_direction(self, direction: Tensor) -> None:
        if direction.shape[1:] != (self.config.num_ws, self.config.w_dim):
            raise ValueError(
                f"expected a direction (batch, {self.config.num_ws}, {self.config.w_dim}), "
                f"got {tuple(direction.shape)}"
            )


# ---- The whole


class MambaStyle(nn.Module):
    """Encoder and fuser; the generator is not part of it. `fuser` is None where H goes straight into G."""

    def __init__(self, config: MambaStyleConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.fuser = Fuser(config) if config.fuser else None

    def forward(
        self,
        image: Float[Tensor, "batch 3 height width"],
        direction: Float[Tensor, "batch num_ws w_dim"] | None = None,
    ) -> Inversion:
        """Encode, then edit; without a direction this is inversion, `direction = 0`."""
        return self.edit(self.encoder(image), direction)

    def edit(
        self,
        encoded: Inversion,
        direction: Float[Tensor, "batch num_ws w_dim"] | None = None,
        direction_feature: Float[Tensor, "#batch channels height width"] | None = None,
    ) -> Inversion:
        """`(ws + direction, Fuser(H, direction))` for what `encoder` gave.

        An edit starts from the encoder's own output, never from another edit: H has to be the unfused map.
        """
        if direction is None:
            direction = torch.zeros_like(encoded.ws)
            if self.fuser is not None and encoded.feature is not None and direction_feature is None:
                # All pictures share the zero direction: its branch runs once.
                height, width = encoded.feature.shape[2:]
                direction_feature = self.fuser.direction_feature(direction[:1], (height, width))
        feature = encoded.feature
        if self.fuser is not None and feature is not None:
            feature = self.fuser(feature, direction, direction_feature)
        return Inversion(encoded.ws + direction, feature)
