"""SS2D, the two-dimensional selective scan (VMamba, Liu et al. 2024, section 4; MambaStyle, section 3.2)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.ops import selective_scan

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


def cross_scan(
    x: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch 4 channels length"]:
    """Read a grid along rows, columns, and both reversed.

    The order is that of `ops.scan_paths.cross_paths`; transposes and flips are used because the backward of
    an index is a scattered add.
    """
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    forward = torch.stack((rows, columns), 1)
    return torch.cat((forward, forward.flip(-1)), 1)  # (batch, 4, channels, length)


def cross_order(
    x: Float[Tensor, "batch 4 channels height width"],
) -> Float[Tensor, "batch 4 channels length"]:
    """Put four maps, one for each path, into the order in which their path visits the grid."""
    rows, columns = x[:, 0::2].flatten(3), x[:, 1::2].transpose(3, 4).flatten(3)
    forward = torch.stack((rows[:, 0], columns[:, 0]), 1)
    reverse = torch.stack((rows[:, 1], columns[:, 1]), 1).flip(-1)
    return torch.cat((forward, reverse), 1)  # (batch, 4, channels, length)


def cross_merge(
    y: Float[Tensor, "batch 4 channels length"], height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """Put the outputs of the four paths back in place and add them: the adjoint of `cross_scan`."""
    forward = y[:, :2] + y[:, 2:].flip(-1)
    rows = forward[:, 0].unflatten(-1, (height, width))
    columns = forward[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
    return rows + columns


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
        x, z = self.in_proj(grid).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))  # (batch, inner, height, width)
        y = self.scan(x) if self.config.scan == "selective" else x
        y = self.out_norm(y.permute(0, 2, 3, 1)).to(z.dtype)  # (batch, height, width, inner)
        return self.out_proj(y * F.silu(z))

    def scan(self, x: Float[Tensor, "batch inner height width"]) -> Float[Tensor, "batch inner height width"]:
        """Scan along the four paths, each with its own parameters, and add the results."""
        height, width = x.shape[2:]
        rank, state = self.config.dt_rank, self.config.state
        # A projection acts on one position at a time: one product serves all four paths before they are
        # ordered, and only its few channels are moved.
        projected = torch.matmul(self.x_proj_weight.flatten(0, 1), x.flatten(2))
        projected = projected.unflatten(1, (4, -1)).unflatten(-1, (height, width))
        delta, B, C = cross_order(projected).split((rank, state, state), dim=2)
        delta = torch.matmul(self.dt_projs_weight, delta)  # (batch, 4, inner, length)
        y = selective_scan(
            cross_scan(x).flatten(1, 2),
            delta.flatten(1, 2),
            -torch.exp(self.A_logs.float()),
            B,
            C,
            self.Ds.float(),
            delta_bias=self.dt_projs_bias.flatten().float(),
            delta_softplus=True,
        )  # (batch, 4 * inner, length)
        assert isinstance(y, Tensor)  # a pair only where the last state is asked for
        return cross_merge(y.unflatten(1, (4, -1)), height, width)


def initial_A_log(like: Float[Tensor, "channels state"]) -> Float[Tensor, "channels state"]:
    """log(1), ..., log(N) for every channel: the real part of S4D-Real."""
    return torch.arange(1, like.shape[-1] + 1).to(like).log().expand_as(like)


def initial_delta_bias(
    like: Float[Tensor, "*shape"], low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4
) -> Float[Tensor, "*shape"]:
    """softplus^-1 of a log-uniform draw from [low, high]."""
    delta = torch.exp(torch.rand_like(like) * math.log(high / low) + math.log(low)).clamp(min=floor)
    return delta + torch.log(-torch.expm1(-delta))
