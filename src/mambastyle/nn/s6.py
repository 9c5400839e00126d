"""The S6 block for sequences (Mamba, Gu and Dao 2023, section 3.4), without its norm and residual."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.nn.ss2d import initial_A_log, initial_delta_bias
from mambastyle.ops import selective_scan


@dataclass(frozen=True)
class S6Config:
    """Sizes of one S6 block, Mamba-1's defaults; without a `rank` it is dim / 16, rounded up."""

    dim: int
    state: int = 16
    expand: int = 2
    kernel_size: int = 4
    rank: int | None = None
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self) -> None:
        if min(self.dim, self.state, self.expand, self.kernel_size, self.dt_rank) < 1:
            raise ValueError(f"dim, state, expand, kernel_size and rank must be positive, got {self}")

    @property
    def inner(self) -> int:
        return self.expand * self.dim

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.dim / 16) if self.rank is None else self.rank


class S6(nn.Module):
    """`out_proj(scan(SiLU(conv(x))) * SiLU(z))`, `x, z = split(in_proj(.))`, causal along the length."""

    def __init__(self, config: S6Config) -> None:
        super().__init__()
        self.config = config
        dim, inner, state, rank = config.dim, config.inner, config.state, config.dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=config.bias)
        self.conv1d = nn.Conv1d(inner, inner, config.kernel_size, groups=inner, bias=config.conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=config.bias)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(initial_delta_bias(self.dt_proj.bias))
            self.A_log.copy_(initial_A_log(self.A_log))

    def forward(self, tokens: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        rank, state = self.config.dt_rank, self.config.state
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (batch, inner, length)
        x = F.silu(self.conv1d(F.pad(x, (self.config.kernel_size - 1, 0))))
        delta, B, C = torch.matmul(self.x_proj.weight, x).split((rank, state, state), dim=1)
        y = selective_scan(
            x,
            torch.matmul(self.dt_proj.weight, delta),
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            z=z,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)  # a pair only where the last state is asked for
        return self.out_proj(y.transpose(1, 2).to(tokens.dtype))
