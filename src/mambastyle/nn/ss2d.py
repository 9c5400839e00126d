"""SS2D, the two-dimensional selective scan (VMamba, Liu et al. 2024, section 4; MambaStyle, section 3.2)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.ops import cross_paths, ss2d_scan

Scan = Literal["selective", "identity"]


@dataclass(frozen=True)
class SS2DConfig:
    """Sizes of one SS2D.

    `scan="identity"` leaves out the recurrence and all that feeds it: the ablation "without SS2D".
    """

    dim: int
    state: int = 16
    expand: int = 2
    kernel_size: int = 3
    scan: Scan = "selective"

    def __post_init__(self) -> None:
        if min(self.dim, self.state, self.expand) < 1:
            raise ValueError(f"dim, state and expand must be positive, got {self}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep height and width, got {self.kernel_size}")
        if self.scan not in get_args(Scan):
            raise ValueError(f"scan must be one of {get_args(Scan)}, got {self.scan!r}")

    @property
    def inner(self) -> int:
        return self.expand * self.dim

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.dim / 16)


class SS2D(nn.Module):
    """Mix a grid: `out_proj(LN(merge(scan(SiLU(conv(x))))) * SiLU(z))`, with `x, z = split(in_proj(grid))`.

    Input and output are (batch, height, width, channels). The scan keeps its state in float32 or wider.
    """

    def __init__(self, config: SS2DConfig) -> None:
        super().__init__()
        self.config = config
        dim, inner, state, rank = config.dim, config.inner, config.state, config.dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(
            inner, inner, config.kernel_size, padding=config.kernel_size // 2, groups=inner
        )
        if config.scan == "selective":
            self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * state, inner))
            self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank))
            self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
            self.A_logs = nn.Parameter(torch.empty(4 * inner, state))
            self.Ds = nn.Parameter(torch.empty(4 * inner))
            self.reset_scan_parameters()
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def reset_scan_parameters(self) -> None:
        """A_log = log(1..N), D = 1, delta at rest log-uniform in [1e-3, 1e-1] (Mamba, section 3.6)."""
        with torch.no_grad():
            # nn.Linear's own bound, as four Linears would have.
            nn.init.uniform_(self.x_proj_weight, -(self.config.inner**-0.5), self.config.inner**-0.5)
            nn.init.uniform_(self.dt_projs_weight, -(self.config.dt_rank**-0.5), self.config.dt_rank**-0.5)
            self.dt_projs_bias.copy_(initial_delta_bias(self.dt_projs_bias))
            self.A_logs.copy_(initial_A_log(self.A_logs))
            self.Ds.fill_(1.0)

    def forward(
        self, grid: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch height width channels"]:
        # Two products and not one that is cut: each half is then contiguous for what comes next.
        to_x, to_z = self.in_proj.weight.chunk(2)
        x, z = F.linear(grid, to_x), F.linear(grid, to_z)  # (batch, height, width, inner)
        # A permuted contiguous grid is what torch calls channels-last: nothing is moved.
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.scan(x) if self.config.scan == "selective" else x
        return self.out_proj(self.out_norm(y).to(z.dtype) * F.silu(z))

    def scan(self, x: Float[Tensor, "batch height width inner"]) -> Float[Tensor, "batch height width inner"]:
        """Scan along the four paths, each with its own parameters, and add the results."""
        height, width = x.shape[1:3]
        rank, state = self.config.dt_rank, self.config.state
        tokens = x.flatten(1, 2)  # (batch, length, inner)
        # A projection acts on one position at a time: one product serves all four paths.
        projected = F.linear(tokens, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (4, -1))
        dt_low, B, C = projected.split((rank, state, state), dim=-1)
        y = ss2d_scan(
            tokens,
            dt_low,
            self.dt_projs_weight,
            -torch.exp(self.A_logs.float()).unflatten(0, (4, -1)),
            B,
            C,
            self.Ds.float().unflatten(0, (4, -1)),
            self.dt_projs_bias,
            cross_paths(height, width, device=x.device),
        )
        return y.unflatten(1, (height, width))


def initial_A_log(like: Float[Tensor, "channels state"]) -> Float[Tensor, "channels state"]:
    """log(1), ..., log(N) for every channel: the real part of S4D-Real."""
    return torch.arange(1, like.shape[-1] + 1).to(like).log().expand_as(like)


def initial_delta_bias(
    like: Float[Tensor, "*shape"], low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4
) -> Float[Tensor, "*shape"]:
    """softplus^-1 of a log-uniform draw from [low, high]."""
    delta = torch.exp(torch.rand_like(like) * math.log(high / low) + math.log(low)).clamp(min=floor)
    return delta + torch.log(-torch.expm1(-delta))
