"""What the Triton kernels of both scans share: tiles of channels by steps, scanned along the steps at once.

Within a tile h_t = decay_t h_{t-1} + drive_t is an associative scan of the pairs (decay, drive), so that all
steps of the tile work at once; from tile to tile the state is carried. The module imports triton and is
itself imported only by the kernels.
"""

# Triton compiles these functions from source: their arguments have no annotations.
# pyright: basic, reportMissingParameterType=false, reportInvalidTypeForm=false

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

# What it returns is called without the options of a launch, and launched with them.
jit: Any = triton.jit

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Programs (batch, groups or paths, blocks of channels) that fill a large GPU. Fixed, and not asked of the
# device, so that sums are cut in the same way everywhere.
PROGRAMS = 512


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, in this process and on CPU tensors."""
    return bool(knobs.runtime.interpret)


def unavailable() -> str | None:
    """Why no kernel can run in this process, with the remedy, or None."""
    if torch.cuda.is_available() or interpreted():
        return None
    return (
        "PyTorch finds no CUDA GPU (torch.cuda.is_available() is False); move to a machine with one and a "
        "CUDA build of torch, or set TRITON_INTERPRET=1 to run the kernels, very slowly, on the CPU"
    )


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Where a kernel on this tensor is to be launched: Triton launches on the current device, wherever its
    tensors lie, and PyTorch sets that one only where autograd calls an op.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def block_channels(channels: int, others: int, least: int = 4) -> int:
    """Channels of a program, of `others` times all channels: as many as leave enough programs, at most 16."""
    block = 16
    while block > least and (block >= 2 * channels or others * -(-channels // block) < PROGRAMS):
        block //= 2
    return block


def warps(block: int, steps: int) -> int:
    """Eight elements of a tile for each thread: two vectors of four."""
    return max(1, block * steps // 256)


@jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|), which overflows nowhere."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    one_e = 1.0 + e
    # log1p: what rounding 1 + e lost is made good by e / ((1 + e) - 1).
    log1p = tl.where(one_e == 1.0, e, tl.log(one_e) * (e / tl.where(one_e == 1.0, 1.0, one_e - 1.0)))
    # Not tl.maximum, which drops NaN.
    return tl.where(x < 0, 0.0, x) + log1p


@jit
def logistic(x):
    """1 / (1 + exp(-x)), the slope of softplus: (1 or e) / (1 + e) with e = exp(-|x|)."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    return tl.where(x > 0, 1.0, e) / (1.0 + e)


@jit
def _compose(first_decay, first_drive, decay, drive):
    """The two steps h -> decay h + drive, one after the other, as one."""
    return decay * first_decay, decay * first_drive + drive


@jit
def column(tile, number, index):
    """tile[:, number], for a number that is not known when compiling; `index` counts the columns."""
    return tl.sum(tl.where((index == number)[None, :], tile, 0.0), 1)


@jit
def with_column(tile, number, index, values):
    """The tile with `values` in the place of tile[:, number]."""
    return tl.where((index == number)[None, :], values[:, None], tile)


@jit
def scan_tile(d, du, A_n, B_n, h_n, step, STEPS: tl.constexpr):
    """One state along a tile: h after each step [channel, step], and after the last one [channel].

    d and du = d u are [channel, step], A_n (times log2(e)) and the state before the tile h_n [channel], B_n
    and step [step].
    """
    decay = tl.exp2(d * A_n[:, None])
    drive = du * B_n[None, :]
    drive = tl.where((step == 0)[None, :], decay * h_n[:, None] + drive, drive)
    _, h = tl.associative_scan((decay, drive), 1, _compose)
    return h, column(h, STEPS - 1, step)


@jit
def shifted(tile, step, BLOCK: tl.constexpr, STEPS: tl.constexpr, BY: tl.constexpr):
    """tile[:, step + BY], or the tile's own border where that lies outside."""
    index = tl.minimum(tl.maximum(step + BY, 0), STEPS - 1)
    return tl.gather(tile, tl.broadcast_to(index[None, :], (BLOCK, STEPS)), 1)


@jit
def scan_tile_back(d, du, du_before, d_after, gy, A_n, B_n, B_before, C_n, h_n, gh_n, step):
    """What one state says about a tile, from the state before it and the gradient of the state behind it.

    du_before and B_before are a step late, d_after a step early; gh_n [channel] is the gradient of the state
    after the first step behind the tile, which has passed d_after already if there is no such step.

    Returns, each [channel, step]: h after each step, its gradient, and the gradient of the exponent d_t A;
    and the gradient of the state after the tile's first step [channel].
    """
    decay = tl.exp2(d * A_n[:, None])
    # Scanning decay_t h_{t-1} instead of h_t gives the part of the state that was kept without a difference.
    kept = decay * tl.where((step == 0)[None, :], h_n[:, None], du_before * B_before[None, :])
    _, kept = tl.associative_scan((decay, kept), 1, _compose)
    h = kept + du * B_n[None, :]
    decay_after = tl.exp2(d_after * A_n[:, None])
    gh = gy * C_n[None, :]
    last = step == tl.max(step, 0)
    gh = tl.where(last[None, :], decay_after * gh_n[:, None] + gh, gh)
    _, gh = tl.associative_scan((decay_after, gh), 1, _compose, reverse=True)
    return h, gh, gh * kept, column(gh, 0, step)
