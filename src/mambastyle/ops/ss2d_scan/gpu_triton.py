"""The scan of a grid along several paths on a GPU: Triton kernels, and the PyTorch ops around them.

A program is a block of channels on one path of one image. A table of positions leads it through the tokens,
tile by tile; step sizes are computed from their low rank inside, and the tile is scanned at once
(ops/gpu_tiles.py). What the paths give is merged by a second kernel, in the order of the tables, so that
nothing depends on which program is first. docs/kernels.md has the design. Inputs are read in their own dtype
and widened to float32.

The module imports triton and is itself imported only when a scan asks for it.
"""

# pyright: basic, reportMissingParameterType=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from mambastyle.ops import gpu_tiles
from mambastyle.ops.gpu_tiles import (
    LN_2,
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
from mambastyle.ops.ss2d_scan import operator

TILE = 64  # steps per tile, and between the states that the backward pass starts from
LEAST_BLOCK = 8  # channels of a program: 32 bytes of float32, what memory hands out at once
PACKED = tl.constexpr(operator.PACKED)


@jit
def _entries(x, image, position, path, steps):
    """Where the entries of the tile's positions begin."""
    return x + image * steps[0] + position * steps[1] + path * steps[2]


@jit
def _delta(weights, dt_at, bias, there, RANK: tl.constexpr):
    """bias + the weights' product with dt, [channel, step]."""
    delta = bias[:, None] + tl.zeros(there.shape, tl.float32)[None, :]
    for r in range(RANK):
        dt_r = tl.load(dt_at + r, mask=there, other=0.0).to(tl.float32)
        delta += tl.load(weights + r * PACKED)[:, None] * dt_r[None, :]
    return delta


@jit
def _forward(
    u, dt, B, C, parameters, read, y, starts, dt_steps, B_steps, C_steps,
    channels, length, paths, chunks, parameters_image,
    STATE: tl.constexpr, STATES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, KEEP_STARTS: tl.constexpr,
):  # fmt: skip
    """One path of BLOCK channels. y is (batch, paths, length, channels), in the order of the paths; `starts`
    (batch, paths, chunks, state, channels) gets each tile's first state.
    """
    image_path = tl.program_id(0).to(tl.int64)
    image = image_path // paths
    path = image_path % paths
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = channel < channels
    step = tl.arange(0, STEPS)
    states = tl.arange(0, STATES)
    block = path * tl.cdiv(channels, PACKED) + channel // PACKED
    own = parameters + image * parameters_image + block * (STATE + RANK + 2) * PACKED + channel % PACKED
    # The last block of parameters is filled up, the last block of channels of a program may lie behind it.
    own = tl.where(rows, own, parameters)
    bias = tl.load(own + (STATE + RANK) * PACKED)
    D = tl.load(own + (STATE + RANK + 1) * PACKED)
    h = tl.zeros([BLOCK, STATES], tl.float32)
    for chunk in range(chunks):
        t = chunk * STEPS + step
        there = t < length
        inside = rows[:, None] & there[None, :]
        position = tl.load(read + path * length + t, mask=there, other=0)
        u_at = u + (image * length + position)[None, :] * channels + channel[:, None]
        u_t = tl.load(u_at, mask=inside, other=0.0).to(tl.float32)
        delta = _delta(own + STATE * PACKED, _entries(dt, image, position, path, dt_steps), bias, there, RANK)
        d = tl.where(inside, softplus(delta), 0.0)
        du = d * u_t
        y_t = D[:, None] * u_t
        B_at = _entries(B, image, position, path, B_steps)
        C_at = _entries(C, image, position, path, C_steps)
        for n in range(STATE):
            B_n = tl.load(B_at + n, mask=there, other=0.0).to(tl.float32)
            C_n = tl.load(C_at + n, mask=there, other=0.0).to(tl.float32)
            h_n = column(h, n, states)
            if KEEP_STARTS:
                kept = ((image_path * chunks + chunk) * STATE + n) * channels + channel
                tl.store(starts + kept, h_n, mask=rows)
            h_t, h_n = scan_tile(d, du, tl.load(own + n * PACKED), B_n, h_n, step, STEPS)
            y_t += h_t * C_n[None, :]
            h = with_column(h, n, states, h_n)
        tl.store(y + (image_path * length + t)[None, :] * channels + channel[:, None], y_t, mask=inside)


@jit
def _backward(
    grad_y, u, dt, B, C, parameters, read, write, starts,
    grad_u, grad_dt, grad_B, grad_C, grad_parameters, dt_steps, B_steps, C_steps,
    channels, length, paths, chunks, parameters_image,
    STATE: tl.constexpr, STATES: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One path of BLOCK channels, last tile first.

    grad_u is (batch, paths, length, channels), in the order of the paths; grad_dt, grad_B and grad_C are
    (batch, paths, blocks, length, entries), in that order too and to be summed over the blocks;
    grad_parameters is per image.
    """
    image_path = tl.program_id(0).to(tl.int64)
    image = image_path // paths
    path = image_path % paths
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = channel < channels
    part = image_path * tl.num_programs(1) + tl.program_id(1)
    step = tl.arange(0, STEPS)
    states = tl.arange(0, STATES)
    ranks = tl.arange(0, RANKS)
    blocks = tl.cdiv(channels, PACKED)
    in_block = channel // PACKED * (STATE + RANK + 2) * PACKED + channel % PACKED
    size = blocks * (STATE + RANK + 2) * PACKED
    own = tl.where(rows, parameters + image * parameters_image + path * size + in_block, parameters)
    grad_own = grad_parameters + image_path * size + in_block
    bias = tl.load(own + (STATE + RANK) * PACKED)
    D = tl.load(own + (STATE + RANK + 1) * PACKED)
    gh = tl.zeros([BLOCK, STATES], tl.float32)
    gA = tl.zeros([BLOCK, STATES], tl.float32)
    gweights = tl.zeros([BLOCK, RANKS], tl.float32)
    gD = tl.zeros([BLOCK], tl.float32)
    gbias = tl.zeros([BLOCK], tl.float32)
    d_first = tl.zeros([BLOCK], tl.float32)  # step size of the first step behind the tile
    for from_end in range(chunks):
        chunk = chunks - 1 - from_end
        t = chunk * STEPS + step
        there = t < length
        inside = rows[:, None] & there[None, :]
        position = tl.load(read + path * length + t, mask=there, other=0)
        written = tl.load(write + path * length + t, mask=there, other=0)
        u_at = u + (image * length + position)[None, :] * channels + channel[:, None]
        gy_at = grad_y + (image * length + written)[None, :] * channels + channel[:, None]
        u_t = tl.load(u_at, mask=inside, other=0.0).to(tl.float32)
        gy = tl.load(gy_at, mask=inside, other=0.0).to(tl.float32)
        dt_at = _entries(dt, image, position, path, dt_steps)
        delta = _delta(own + STATE * PACKED, dt_at, bias, there, RANK)
        d = tl.where(inside, softplus(delta), 0.0)
        slope = tl.where(inside, logistic(delta), 0.0)
        du = d * u_t
        du_before = shifted(du, step, BLOCK, STEPS, -1)
        d_after = tl.where((step == STEPS - 1)[None, :], d_first[:, None], shifted(d, step, BLOCK, STEPS, 1))
        d_first = column(d, 0, step)
        B_at = _entries(B, image, position, path, B_steps)
        C_at = _entries(C, image, position, path, C_steps)
        before = (step > 0) & (t <= length)
        position = tl.load(read + path * length + t - 1, mask=before, other=0)
        B_before_at = _entries(B, image, position, path, B_steps)
        gdrive = tl.zeros([BLOCK, STEPS], tl.float32)
        gexponent = tl.zeros([BLOCK, STEPS], tl.float32)
        out = part * length + t
        for n in range(STATE):
            A_n = tl.load(own + n * PACKED)
            B_n = tl.load(B_at + n, mask=there, other=0.0).to(tl.float32)
            B_before = tl.load(B_before_at + n, mask=before, other=0.0).to(tl.float32)
            C_n = tl.load(C_at + n, mask=there, other=0.0).to(tl.float32)
            kept = ((image_path * chunks + chunk) * STATE + n) * channels + channel
            h_n = tl.load(starts + kept, mask=rows, other=0.0)
            h_t, gh_t, gexponent_n, gh_n = scan_tile_back(
                d, du, du_before, d_after, gy, A_n, B_n, B_before, C_n, h_n, column(gh, n, states), step
            )
            gh = with_column(gh, n, states, gh_n)
            gdrive += gh_t * B_n[None, :]
            gexponent += gexponent_n * A_n[:, None]
            gA = with_column(gA, n, states, column(gA, n, states) + tl.sum(gexponent_n * d, 1))
            tl.store(grad_B + out * STATE + n, tl.sum(gh_t * du, 0), mask=there)
            tl.store(grad_C + out * STATE + n, tl.sum(gy * h_t, 0), mask=there)
        # A_n carries log2(e), which ln(2) takes out again.
        gdelta = (gdrive * u_t + gexponent * LN_2) * slope
        at = (image_path * length + t)[None, :] * channels + channel[:, None]
        tl.store(grad_u + at, gdrive * d + gy * D[:, None], mask=inside)
        for r in range(RANK):
            weight = tl.load(own + (STATE + r) * PACKED)
            dt_r = tl.load(dt_at + r, mask=there, other=0.0).to(tl.float32)
            sums = column(gweights, r, ranks) + tl.sum(gdelta * dt_r[None, :], 1)
            gweights = with_column(gweights, r, ranks, sums)
            tl.store(grad_dt + out * RANK + r, tl.sum(gdelta * weight[:, None], 0), mask=there)
        gD += tl.sum(gy * u_t, 1)
        gbias += tl.sum(gdelta, 1)
    # The parameter is log2(e) A: its gradient is that of A times ln(2).
    entry = states[None, :] * PACKED
    tl.store(grad_own[:, None] + entry, gA * LN_2, mask=rows[:, None] & (states < STATE)[None, :])
    entry = (STATE + ranks)[None, :] * PACKED
    tl.store(grad_own[:, None] + entry, gweights, mask=rows[:, None] & (ranks < RANK)[None, :])
    tl.store(grad_own + (STATE + RANK) * PACKED, gbias, mask=rows)
    tl.store(grad_own + (STATE + RANK + 1) * PACKED, gD, mask=rows)


@jit
def _merge(
    values, order, first, target, rows, targets, width, paths,
    TARGETS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """target[image, q] = the sum of values[image, order[i]] for first[q paths] <= i < first[(q + 1) paths],
    in that order.
    """
    blocks = tl.cdiv(targets, TARGETS)
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    q = program % blocks * TARGETS + tl.arange(0, TARGETS)
    entry = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(first + q * paths, mask=q < targets, other=0)
    end = tl.load(first + (q + 1) * paths, mask=q < targets, other=0)
    total = tl.zeros([TARGETS, WIDTH], tl.float32)
    for number in range(tl.max(end - start, 0)):  # pyright: ignore[reportArgumentType]
        here = start + number < end
        source = image * rows + tl.load(order + start + number, mask=here, other=0)
        mask = here[:, None] & (entry < width)[None, :]
        total += tl.load(values + source[:, None] * width + entry[None, :], mask=mask, other=0.0)
    at = (image * targets + q)[:, None] * width + entry[None, :]
    tl.store(target + at, total, mask=(q < targets)[:, None] & (entry < width)[None, :])


def _merged(
    values: Float[Tensor, "batch rows width"],
    order: Int[Tensor, " rows"],
    first: Int[Tensor, " ends"],
    targets: int,
    dtype: torch.dtype,
    *,
    paths: int = 1,
) -> Float[Tensor, "batch targets width"]:
    """Adds up the rows that `_by_target` says go to one target; with `paths`, to one position on any path."""
    batch, rows, width = values.shape
    target = values.new_empty(batch, targets, width, dtype=dtype)
    block = min(triton.next_power_of_2(width), 64)
    many = max(1, 512 // block)
    grid = (batch * -(-targets // many), -(-width // block))
    with gpu_tiles.on_device_of(values):
        _merge[grid](
            values, order, first, target, rows, targets, width, paths,
            TARGETS=many, WIDTH=block, num_warps=4,
        )  # fmt: skip
    return target


def _by_target(table: Int[Tensor, "paths length"]) -> tuple[Tensor, Tensor]:
    """Which steps go to each position: their numbers, sorted by position, path and step, and where those of
    each position and path begin.
    """
    paths, length = table.shape
    number = torch.arange(paths, device=table.device)[:, None]
    target, order = torch.sort((table * paths + number).flatten(), stable=True)
    return order, torch.searchsorted(target, torch.arange(length * paths + 1, device=table.device))


def _sizes(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, parameters: Tensor) -> tuple[tuple, tuple, dict]:
    """The grid of programs, and the sizes that both kernels take."""
    batch, length, channels = u.shape
    paths, rank, state = dt.shape[2], dt.shape[3], B.shape[3]
    block = gpu_tiles.block_channels(channels, batch * paths, LEAST_BLOCK)
    per_image = parameters[0].numel() if len(parameters) > 1 else 0
    sizes = (dt.stride()[:3], B.stride()[:3], C.stride()[:3])
    sizes += (channels, length, paths, -(-length // TILE), per_image)
    constants = {"STATE": state, "STATES": triton.next_power_of_2(state), "BLOCK": block, "STEPS": TILE}
    constants |= {"RANK": rank, "RANKS": triton.next_power_of_2(rank)}
    constants["num_warps"] = gpu_tiles.warps(block, TILE)
    return (batch * paths, -(-channels // block)), sizes, constants


def _empty_outputs(u: Tensor, B: Tensor, keep_starts: bool) -> tuple[Tensor, Tensor]:
    batch, length, channels = u.shape
    chunks = -(-length // TILE) if keep_starts else 0
    shape = (batch, B.shape[2], chunks, B.shape[3], channels)
    return u.new_empty(u.shape), u.new_empty(shape, dtype=torch.float32)


@custom_op("mambastyle::ss2d_scan_triton")
def scan_op(
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    parameters: Tensor,
    read: Tensor,
    write: Tensor,
    keep_starts: bool,
) -> tuple[Tensor, Tensor]:
    batch, length, channels = u.shape
    for table in (read, write):
        operator.check_table(table, length)
    _, starts = _empty_outputs(u, B, keep_starts)
    u, parameters, read, write = (x.contiguous() for x in (u, parameters, read, write))
    dt, B, C = (operator.with_entries_together(x) for x in (dt, B, C))
    grid, sizes, constants = _sizes(u, dt, B, C, parameters)
    y = u.new_empty(batch, len(read) * length, channels, dtype=torch.float32)
    with gpu_tiles.on_device_of(u):
        _forward[grid](u, dt, B, C, parameters, read, y, starts, *sizes, **constants, KEEP_STARTS=keep_starts)
    order, first = _by_target(write)
    return _merged(y, order, first, length, u.dtype, paths=len(write)), starts


@custom_op("mambastyle::ss2d_scan_triton_backward")
def scan_backward_op(
    grad_y: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    parameters: Tensor,
    read: Tensor,
    write: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    paths = len(read)
    grad_y, u, parameters = grad_y.contiguous(), u.contiguous(), parameters.contiguous()
    read, write = read.contiguous(), write.contiguous()
    dt, B, C = (operator.with_entries_together(x) for x in (dt, B, C))
    grid, sizes, constants = _sizes(u, dt, B, C, parameters)

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    grad_u = empty(batch, paths * length, channels)
    grad_dt, grad_B, grad_C = (empty(batch, paths, grid[1], length, x.shape[3]) for x in (dt, B, C))
    grad_parameters = parameters.new_zeros(batch, *parameters.shape[1:])
    with gpu_tiles.on_device_of(grad_y):
        _backward[grid](
            grad_y, u, dt, B, C, parameters, read, write, starts,
            grad_u, grad_dt, grad_B, grad_C, grad_parameters, *sizes, **constants,
        )  # fmt: skip
    order, first = _by_target(read)

    def at_positions(x: Tensor, like: Tensor) -> Tensor:
        merged = _merged(x.sum(2).flatten(1, 2), order, first, length * paths, like.dtype)
        return merged.view(like.shape)

    return (
        _merged(grad_u, order, first, length, u.dtype, paths=paths),
        at_positions(grad_dt, dt),
        at_positions(grad_B, B),
        at_positions(grad_C, C),
        grad_parameters if len(parameters) == batch else grad_parameters.sum(0, keepdim=True),
    )


operator.register("ss2d_scan_triton", "triton", _empty_outputs)
