"""The VSSM block of MambaStyle (section 3.2) and the blocks that its ablations put in the same place."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.nn.ss2d import SS2D, SS2DConfig


class VSSBlock(nn.Module):
    """`y = LN_post(x * skip_scale + SS2D(LN_pre(x)))` on a grid (batch, height, width, channels)."""

    def __init__(self, config: SS2DConfig) -> None:
        super().__init__()
        self.ln_pre = nn.LayerNorm(config.dim)
        self.ss2d = SS2D(config)
        self.skip_scale = nn.Parameter(torch.ones(config.dim))
        self.ln_post = nn.LayerNorm(config.dim)

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch height width channels"]:
        mixed = self.ss2d(self.ln_pre(x))
        # In the dtype of x: a float32 scale would make float32 maps of half-precision ones under autocast.
        return self.ln_post(x * self.skip_scale.to(x.dtype) + mixed)


class ViTBlock(nn.Module):
    """The pre-norm transformer block (Dosovitskiy et al. 2021): attention, then an MLP four times as wide.

    Takes a grid (batch, height, width, channels) or a sequence (batch, length, channels); every position
    attends to every other. There is no position code: the maps it mixes carry their own.
    """

    def __init__(self, dim: int, head_dim: int = 64, mlp_ratio: int = 4) -> None:
        super().__init__()
        if dim % min(dim, head_dim):
            raise ValueError(f"dim {dim} is not a multiple of head_dim {head_dim}")
        self.heads = dim // min(dim, head_dim)
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Float[Tensor, "batch *grid channels"]) -> Float[Tensor, "batch *grid channels"]:
        tokens = x.flatten(1, -2)  # (batch, length, channels)
        tokens = tokens + self.attention(self.norm_attention(tokens))
        tokens = tokens + self.mlp(self.norm_mlp(tokens))
        return tokens.view_as(x)

    def attention(self, x: Float[Tensor, "batch length channels"]) -> Float[Tensor, "batch length channels"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))  # (batch, heads, length, head_dim)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class OnGrid(nn.Module):
    """Apply a channels-last block to a map (batch, channels, height, width)."""

    def __init__(self, block: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        # Moved once here, or every norm, sum and product of the block would walk a transposed map.
        return self.block(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
