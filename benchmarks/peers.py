"""How others compute the scan without a compiler, written from their formulas, to compare with."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mambastyle.models import mamba_st, samam
from mambastyle.nn import ss2d

_SCANNING = (samam, mamba_st, ss2d)  # the modules that call ss2d_scan


def published(u, delta, A, B, C, D, delta_bias) -> Tensor:  # type: ignore
    """The steps of mamba-ssm's `selective_scan_ref`: everything over length at once, then a loop.

    A is (channels, state), or (batch, channels, state). The backward pass costs O(length^2).
    """
    groups = B.shape[1]
    group = u.shape[1] // groups
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,bdn->bdln", delta, A.expand(len(u), *A.shape[-2:])))
    drive = torch.einsum("bdl,bdnl,bdl->bdln", delta, B.repeat_interleave(group, dim=1), u)
    C = C.repeat_interleave(group, dim=1)
    h = A.new_zeros(u.shape[0], u.shape[1], A.shape[-1])
    steps = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + drive[:, :, t]
        steps.append(torch.einsum("bdn,bdn->bd", h, C[..., t]))
    return torch.stack(steps, dim=2) + u * D[..., None]


def published_ss2d(u, dt_low, dt_weight, A, B, C, D, dt_bias, paths, write_paths=None) -> Tensor:  # type: ignore
    """`ss2d_scan` as VMamba has it in PyTorch: copies in the order of each path, `published`, a merge."""
    u, dt_low, B, C = (x.float() for x in (u, dt_low, B, C))
    number = torch.arange(len(paths))[:, None]

    def in_order(x: Tensor) -> Tensor:  # (batch, length, paths, n) -> (batch, paths, n, length)
        return x[:, paths, number].transpose(-1, -2)

    steps = torch.einsum("kdr,bkrl->bkdl", dt_weight, in_order(dt_low)).flatten(1, 2)
    walked = u[:, paths].transpose(-1, -2).flatten(1, 2)
    D = D.flatten(-2)
    y = published(walked, steps, A.flatten(-3, -2), in_order(B), in_order(C), D, dt_bias.flatten())
    y = y.unflatten(1, (len(paths), -1)).permute(0, 1, 3, 2).flatten(1, 2)
    write_paths = paths if write_paths is None else write_paths
    return torch.zeros_like(u).index_add(1, write_paths.flatten(), y)


@contextlib.contextmanager
def swapped(scan: Callable[..., Tensor]) -> Iterator[None]:
    """Within it every network scans its grids by `scan` in the place of `mambastyle.ops.ss2d_scan`."""
    ours = [module.ss2d_scan for module in _SCANNING]
    for module in _SCANNING:
        module.ss2d_scan = scan
    try:
        yield
    finally:
        for module, one in zip(_SCANNING, ours, strict=True):
            module.ss2d_scan = one
