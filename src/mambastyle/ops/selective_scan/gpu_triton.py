"""The selective scan on a GPU: Triton kernels, and the PyTorch ops around them.

A program is a block of channels of one group of one image. It takes the steps tile by tile, keeps the state
between the tiles in registers, and scans each tile of each state at once (ops/gpu_tiles.py). docs/kernels.md
has the design. Inputs are read in their own dtype and widened to float32.

The module imports triton and is itself imported only when a scan asks for it.
"""

# pyright: basic, reportMissingParameterType=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambastyle.ops import gpu_tiles
from mambastyle.ops.gpu_tiles import (
    LN_2,
    LOG2_E,
    column,
    jit,
    logistic,
    scan_tile,
    scan_tile_back,
    shifted,
    softplus,
    with_column,
)
from mambastyle.ops.registration import custom_op
from mambastyle.ops.selective_scan import operator

TILE = 64  # steps per tile, and between the states that the backward pass starts from


@jit
def _step_sizes(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """d_t of a tile and its slope; both zero outside, where the state stays as it is."""
    x = delta.to(tl.float32) + bias[:, None]
    if SOFTPLUS:
        return tl.where(inside, softplus(x), 0.0), tl.where(inside, logistic(x), 0.0)
    return tl.where(inside, x, 0.0), tl.where(inside, 1.0, 0.0)


@jit
def _per_row(x, at, rows, GIVEN: tl.constexpr):
    """x[at] as float32, zeros where there is none."""
    if GIVEN:
        return tl.load(x + at, mask=rows, other=0.0).to(tl.float32)
    return tl.zeros(at.shape, tl.float32)


@jit
def _forward(
    u, delta, A, B, C, D, bias, y, last, starts,
    channels, groups, length, chunks, A_image, D_image,
    STATE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP_STARTS: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK channels. `starts` (batch, channels, chunks, state) gets each tile's first state."""
    image_group = tl.program_id(0).to(tl.int64)
    group = channels // groups
    in_group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = in_group < group
    image = image_group // groups
    channel = image_group % groups * group + in_group
    row = image * channels + channel
    step = tl.arange(0, STEPS)
    states = tl.arange(0, STATES)
    bias_d = _per_row(bias, channel, rows, HAS_BIAS)
    D_d = _per_row(D, image * D_image + channel, rows, HAS_D)
    A_row = A + (image * A_image + channel) * STATE
    h = tl.zeros([BLOCK, STATES], tl.float32)
    for chunk in range(chunks):
        t = chunk * STEPS + step
        inside = rows[:, None] & (t < length)[None, :]
        at = row[:, None] * length + t[None, :]
        u_t = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        d, _ = _step_sizes(tl.load(delta + at, mask=inside, other=0.0), bias_d, inside, SOFTPLUS)
        du = d * u_t
        y_t = D_d[:, None] * u_t
        for n in range(STATE):
            entry = (image_group * STATE + n) * length + t
            A_n = tl.load(A_row + n, mask=rows, other=0.0).to(tl.float32) * LOG2_E
            B_n = tl.load(B + entry, mask=t < length, other=0.0).to(tl.float32)
            C_n = tl.load(C + entry, mask=t < length, other=0.0).to(tl.float32)
            h_n = column(h, n, states)
            if KEEP_STARTS:
                tl.store(starts + (row * chunks + chunk) * STATE + n, h_n, mask=rows)
            h_t, h_n = scan_tile(d, du, A_n, B_n, h_n, step, STEPS)
            y_t += h_t * C_n[None, :]
            h = with_column(h, n, states, h_n)
        tl.store(y + at, y_t, mask=inside)
    own = rows[:, None] & (states < STATE)[None, :]
    tl.store(last + row[:, None] * STATE + states[None, :], h, mask=own)


@jit
def _backward(
    grad_y, grad_last, u, delta, A, B, C, D, bias, starts,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
    channels, groups, length, chunks, A_image, D_image,
    STATE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK channels, last tile first.

    grad_A, grad_D and grad_bias are per image; grad_B and grad_C are (batch, groups, blocks, state, length),
    to be summed over the blocks.
    """
    image_group = tl.program_id(0).to(tl.int64)
    group = channels // groups
    in_group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = in_group < group
    image = image_group // groups
    channel = image_group % groups * group + in_group
    row = image * channels + channel
    part = image_group * tl.num_programs(1) + tl.program_id(1)
    step = tl.arange(0, STEPS)
    states = tl.arange(0, STATES)
    own = rows[:, None] & (states < STATE)[None, :]
    bias_d = _per_row(bias, channel, rows, HAS_BIAS)
    D_d = _per_row(D, image * D_image + channel, rows, HAS_D)
    A_row = A + (image * A_image + channel) * STATE
    gh = tl.load(grad_last + row[:, None] * STATE + states[None, :], mask=own, other=0.0)
    gA = tl.zeros([BLOCK, STATES], tl.float32)
    gD = tl.zeros([BLOCK], tl.float32)
    gbias = tl.zeros([BLOCK], tl.float32)
    d_first = tl.zeros([BLOCK], tl.float32)  # step size of the first step behind the tile
    for from_end in range(chunks):
        chunk = chunks - 1 - from_end
        t = chunk * STEPS + step
        inside = rows[:, None] & (t < length)[None, :]
        at = row[:, None] * length + t[None, :]
        u_t = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        gy = tl.load(grad_y + at, mask=inside, other=0.0)
        d, slope = _step_sizes(tl.load(delta + at, mask=inside, other=0.0), bias_d, inside, SOFTPLUS)
        du = d * u_t
        du_before = shifted(du, step, BLOCK, STEPS, -1)
        d_after = tl.where((step == STEPS - 1)[None, :], d_first[:, None], shifted(d, step, BLOCK, STEPS, 1))
        d_first = column(d, 0, step)
        gdrive = tl.zeros([BLOCK, STEPS], tl.float32)
        gexponent = tl.zeros([BLOCK, STEPS], tl.float32)
        for n in range(STATE):
            entry = (image_group * STATE + n) * length + t
            out = (part * STATE + n) * length + t
            A_n = tl.load(A_row + n, mask=rows, other=0.0).to(tl.float32) * LOG2_E
            B_n = tl.load(B + entry, mask=t < length, other=0.0).to(tl.float32)
            before = (step > 0) & (t <= length)
            B_before = tl.load(B + entry - 1, mask=before, other=0.0).to(tl.float32)
            C_n = tl.load(C + entry, mask=t < length, other=0.0).to(tl.float32)
            h_n = tl.load(starts + (row * chunks + chunk) * STATE + n, mask=rows, other=0.0)
            h_t, gh_t, gexponent_n, gh_n = scan_tile_back(
                d, du, du_before, d_after, gy, A_n, B_n, B_before, C_n, h_n, column(gh, n, states), step
            )
            gh = with_column(gh, n, states, gh_n)
            gdrive += gh_t * B_n[None, :]
            gexponent += gexponent_n * A_n[:, None]
            gA = with_column(gA, n, states, column(gA, n, states) + tl.sum(gexponent_n * d, 1))
            tl.store(grad_B + out, tl.sum(gh_t * du, 0), mask=t < length)
            tl.store(grad_C + out, tl.sum(gy * h_t, 0), mask=t < length)
        # A_n carries log2(e), which ln(2) takes out again.
        gdelta = (gdrive * u_t + gexponent * LN_2) * slope
        tl.store(grad_u + at, gdrive * d + gy * D_d[:, None], mask=inside)
        tl.store(grad_delta + at, gdelta, mask=inside)
        gD += tl.sum(gy * u_t, 1)
        gbias += tl.sum(gdelta, 1)
    tl.store(grad_A + row[:, None] * STATE + states[None, :], gA, mask=own)
    tl.store(grad_D + row, gD, mask=rows)
    tl.store(grad_bias + row, gbias, mask=rows)


def _sizes(
    u: Tensor, A: Tensor, B: Tensor, D: Tensor | None
) -> tuple[tuple[int, int], tuple, dict[str, int]]:
    """The grid of programs, and the sizes that both kernels take."""
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    block = gpu_tiles.block_channels(channels // groups, batch * groups)
    per_image = (channels if A.ndim == 3 else 0, channels if D is not None and D.ndim == 2 else 0)
    sizes = (channels, groups, length, -(-length // TILE), *per_image)
    constants = {"STATE": state, "STATES": triton.next_power_of_2(state), "BLOCK": block, "STEPS": TILE}
    constants["num_warps"] = gpu_tiles.warps(block, TILE)
    return (batch * groups, -(-(channels // groups) // block)), sizes, constants


def _empty_outputs(u: Tensor, A: Tensor, B: Tensor, keep_starts: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    state = A.shape[-1]
    shapes = [(batch, channels, length), (batch, channels, state)]
    shapes += [(batch, channels, -(-length // TILE) if keep_starts else 0, state)]
    y, last, starts = (u.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return y, last, starts


@custom_op("mambastyle::selective_scan_triton")
def scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep_starts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, starts = _empty_outputs(u, A, B, keep_starts)
    u, delta, A, B, C = (x.contiguous() for x in (u, delta, A, B, C))
    grid, sizes, constants = _sizes(u, A, B, D)
    # What is absent is never read: the kernel is compiled without it.
    D_given, bias_given = (A if x is None else x.contiguous() for x in (D, delta_bias))
    with gpu_tiles.on_device_of(u):
        _forward[grid](
            u, delta, A, B, C, D_given, bias_given, y, last, starts, *sizes, **constants,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            KEEP_STARTS=keep_starts,
        )  # fmt: skip
    return y, last, starts


@custom_op("mambastyle::selective_scan_triton_backward")
def scan_backward_op(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    grad_y, grad_last, u, delta, A, B, C = (x.contiguous() for x in (grad_y, grad_last, u, delta, A, B, C))
    grid, sizes, constants = _sizes(u, A, B, D)

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    grad_u, grad_delta = u.new_empty(u.shape), delta.new_empty(u.shape)
    grad_A, grad_D, grad_bias = empty(batch, channels, state), empty(batch, channels), empty(batch, channels)
    grad_B, grad_C = (empty(batch, groups, grid[1], state, length) for _ in range(2))
    D_given, bias_given = (A if x is None else x.contiguous() for x in (D, delta_bias))
    with gpu_tiles.on_device_of(grad_y):
        _backward[grid](
            grad_y, grad_last, u, delta, A, B, C, D_given, bias_given, starts,
            grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, *sizes, **constants,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        )  # fmt: skip
    return (
        grad_u,
        grad_delta,
        operator.as_given(grad_A, A),
        grad_B.sum(2).to(B.dtype),
        grad_C.sum(2).to(C.dtype),
        operator.as_given(grad_D, D),
        operator.as_given(grad_bias, delta_bias),
    )


operator.register("selective_scan_triton", "triton", _empty_outputs)
