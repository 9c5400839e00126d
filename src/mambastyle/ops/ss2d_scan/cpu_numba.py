"""The scan of a grid along several paths on the CPU: Numba kernels, and the PyTorch ops around them.

Tokens are (batch, length, channels): sixteen neighbouring channels are a vector as they lie in memory, and a
table of positions leads a path through them, so that no reordered copy of the grid exists. Each tile of CHUNK
steps computes its step sizes from their low rank, scans, and adds to the output. docs/kernels.md has the
design and what was measured.

The module imports numba and is itself imported only when a scan asks for it.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from mambastyle.ops.cpu_vectors import (
    LANES,
    LN_2,
    LOG2_E,
    STATES,
    broadcast,
    broadcast_states,
    dot_states,
    exp2,
    fma,
    kernel,
    load,
    load_states,
    logistic,
    scalar,
    softplus,
    splat,
    store,
    sum_rows,
)
from mambastyle.ops.selective_scan.cpu_threads import run_ranges

CHUNK = 32  # steps per tile, and between the states that the backward pass starts from; a multiple of LANES
# The channels are cut until there are this many tasks; fixed, so that sums do not depend on threads. With
# fewer blocks a task would spend its time on fetching dt, B and C, which its blocks share.
SPLITS = 16
BLOCKS_PER_TASK = 4
# About 0.5 ms of work on one core: below it a thread costs more than it brings.
SERIAL_STATE_STEPS = 3_000_000

# ------------------------------------------------------------------------------------------------------------
# Kernels. All arrays are flat; u, dt, B, C and grad_y are float32 or bfloat16 seen as uint16, the rest is
# float32. A block is 16 channels, its tiles are [step, lane]; the last block may have fewer `rows`, and its
# other lanes compute on zeros and are never stored. `parameters` is [path, block, entry, lane] with the
# entries log2(e) A (state), the weight of the step sizes (rank), their bias, and D.


@kernel
def _gather(source, table, first, base, row_step, tile, steps, rows):  # type: ignore
    """tile[step, lane] = source[base + table[first + step] * row_step + lane]."""
    if rows == LANES:
        for step in range(steps):
            store(tile, step * LANES, load(source, base + table[first + step] * row_step))
    else:
        for step in range(steps):
            at = base + table[first + step] * row_step
            for lane in range(rows):
                tile[step * LANES + lane] = scalar(source, at + lane)
            for lane in range(rows, LANES):
                tile[step * LANES + lane] = np.float32(0)


@kernel
def _scatter_add(tile, table, first, target, base, row_step, steps, rows):  # type: ignore
    """target[base + table[first + step] * row_step + lane] += tile[step, lane]."""
    if rows == LANES:
        for step in range(steps):
            at = base + table[first + step] * row_step
            store(target, at, load(target, at) + load(tile, step * LANES))
    else:
        for step in range(steps):
            at = base + table[first + step] * row_step
            for lane in range(rows):
                target[at + lane] += tile[step * LANES + lane]


@kernel
def _gather_entries(source, table, first, base, row_step, tile, steps, entries):  # type: ignore
    """tile[step, entry] = source[base + table[first + step] * row_step + entry]."""
    safe = source.size - (entries + LANES - 1) // LANES * LANES
    for step in range(steps):
        at = base + table[first + step] * row_step
        if at <= safe:
            # Whole vectors: what they write too much, the next step writes again.
            for entry in range(0, entries, LANES):
                store(tile, step * entries + entry, load(source, at + entry))
        else:
            for entry in range(entries):
                tile[step * entries + entry] = scalar(source, at + entry)


@kernel
def _sum_entries(tile, sums, target, table, first, base, row_step, steps, entries):  # type: ignore
    """target[base + table[first + step] * row_step + entry] += the sum of the lanes of tile[step, entry]."""
    for index in range(0, steps * entries, LANES):
        store(sums, index, sum_rows(tile, index * LANES))
    for step in range(steps):
        at = base + table[first + step] * row_step
        for entry in range(entries):
            target[at + entry] += sums[step * entries + entry]


@kernel
def _clear(array, size):  # type: ignore
    zero = splat(np.float32(0))
    for index in range(0, size, LANES):
        store(array, index, zero)


@kernel
def _step_sizes(parameters, weight, dt_tile, d_tile, steps, rank):  # type: ignore
    """d_tile[step, lane] = bias + the weights' product with dt_tile[step]."""
    bias = load(parameters, weight + rank * LANES)
    quads_end = rank // STATES * STATES
    for step in range(steps):
        d = bias
        for r in range(0, quads_end, STATES):
            weights = load_states(parameters, weight + r * LANES)
            d = dot_states(weights, broadcast_states(dt_tile, step * rank + r), d)
        for r in range(quads_end, rank):
            d = fma(load(parameters, weight + r * LANES), broadcast(dt_tile, step * rank + r), d)
        store(d_tile, step * LANES, d)


@kernel
def _ss2d_forward(  # type: ignore
    u, dt, B, C, parameters, read, write, y, starts, keep_starts,
    dt_steps, B_steps, C_steps, channels, length, paths, rank, state, parameters_image, splits, first, end,
    scratch,
):  # fmt: skip
    """Tasks first..end-1, each one run of an image's blocks along all paths. `y` is added to; `starts` gets
    each tile's first state.

    dt_steps, B_steps and C_steps say how far apart two images, positions and paths lie.
    """
    blocks = (channels + LANES - 1) // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    quads_end = state // STATES * STATES
    size = CHUNK * LANES
    entries = (state + rank + 2) * LANES
    y_tile = scratch[0:size]  # u at first
    d_tile = scratch[size : 2 * size]
    du_tile = scratch[2 * size : 3 * size]
    used = 3 * size
    dt_tile = scratch[used : used + CHUNK * rank + LANES]
    used += CHUNK * rank + LANES
    B_tile = scratch[used : used + CHUNK * state + LANES]
    used += CHUNK * state + LANES
    C_tile = scratch[used : used + CHUNK * state + LANES]
    used += CHUNK * state + LANES
    h_lanes = scratch[used : used + blocks * state * LANES]
    for task in range(first, end):
        image = task // splits
        first_block = blocks * (task % splits) // splits
        end_block = blocks * (task % splits + 1) // splits
        for path in range(paths):
            _clear(h_lanes, blocks * state * LANES)
            for chunk in range(chunks):
                start = chunk * CHUNK
                steps = min(CHUNK, length - start)
                here = path * length + start
                at = image * dt_steps[0] + path * dt_steps[2]
                _gather_entries(dt, read, here, at, dt_steps[1], dt_tile, steps, rank)
                at = image * B_steps[0] + path * B_steps[2]
                _gather_entries(B, read, here, at, B_steps[1], B_tile, steps, state)
                at = image * C_steps[0] + path * C_steps[2]
                _gather_entries(C, read, here, at, C_steps[1], C_tile, steps, state)
                for block in range(first_block, end_block):
                    rows = min(LANES, channels - block * LANES)
                    data = image * length * channels + block * LANES
                    A_start = image * parameters_image + (path * blocks + block) * entries
                    weight = A_start + state * LANES
                    h_start = block * state * LANES
                    if keep_starts:
                        kept = (((image * blocks + block) * paths + path) * chunks + chunk) * state * LANES
                        for n in range(state):
                            store(starts, kept + n * LANES, load(h_lanes, h_start + n * LANES))
                    _gather(u, read, here, data, channels, y_tile, steps, rows)
                    _step_sizes(parameters, weight, dt_tile, d_tile, steps, rank)
                    D_block = load(parameters, weight + (rank + 1) * LANES)
                    for step in range(steps):
                        at = step * LANES
                        u_t = load(y_tile, at)
                        d = softplus(load(d_tile, at))
                        store(d_tile, at, d)
                        store(du_tile, at, d * u_t)
                        store(y_tile, at, D_block * u_t)
                    # States outside, steps inside: A and h stay in registers, and exp2 of many steps overlap.
                    for n in range(0, quads_end, STATES):
                        A_n = load_states(parameters, A_start + n * LANES)
                        h = load_states(h_lanes, h_start + n * LANES)
                        for step in range(steps):
                            at = step * LANES
                            entry = step * state + n
                            drive = load(du_tile, at) * broadcast_states(B_tile, entry)
                            h = fma(exp2(load(d_tile, at) * A_n), h, drive)
                            y_t = dot_states(h, broadcast_states(C_tile, entry), load(y_tile, at))
                            store(y_tile, at, y_t)
                        store(h_lanes, h_start + n * LANES, h)
                    for n in range(quads_end, state):
                        A_1 = load(parameters, A_start + n * LANES)
                        h_1 = load(h_lanes, h_start + n * LANES)
                        for step in range(steps):
                            at = step * LANES
                            entry = step * state + n
                            drive_1 = load(du_tile, at) * broadcast(B_tile, entry)
                            h_1 = fma(exp2(load(d_tile, at) * A_1), h_1, drive_1)
                            store(y_tile, at, fma(h_1, broadcast(C_tile, entry), load(y_tile, at)))
                        store(h_lanes, h_start + n * LANES, h_1)
                    _scatter_add(y_tile, write, here, y, data, channels, steps, rows)


@kernel
def _ss2d_backward(  # type: ignore
    grad_y, u, dt, B, C, parameters, read, write, starts,
    grad_u, grad_dt, grad_B, grad_C, grad_parameters,
    dt_steps, B_steps, C_steps, channels, length, paths, rank, state, parameters_image, splits, first, end,
    scratch,
):  # fmt: skip
    """Tasks as in the forward pass, each path's last tile first. Everything is added to.

    grad_parameters is per image; grad_dt, grad_B and grad_C are (task, length, path, entry), to be summed
    over the tasks of an image. For every four states a tile is computed forwards from its stored start, then
    backwards. grad_dt, grad_B and grad_C keep their 16 lanes apart until all blocks of the task are through
    with the tile.
    """
    blocks = (channels + LANES - 1) // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    quads_end = state // STATES * STATES
    rank_quads_end = rank // STATES * STATES
    size = CHUNK * LANES
    block_size = state * LANES
    entries = (state + rank + 2) * LANES
    u_tile = scratch[0:size]
    d_tile = scratch[size : 2 * size]
    du_tile = scratch[2 * size : 3 * size]
    slope_tile = scratch[3 * size : 4 * size]  # d d_t / d delta_t, becomes the gradient of delta_t
    gy_tile = scratch[4 * size : 5 * size]  # becomes grad_u
    drive_tile = scratch[5 * size : 6 * size]  # gradient of d_t u_t
    exponent_tile = scratch[6 * size : 7 * size]  # gradient of d_t through exp2(d_t A)
    used = 7 * size
    decay_tile = scratch[used : used + size * STATES]
    used += size * STATES
    kept_tile = scratch[used : used + size * STATES]  # exp2(d_t A) h_{t-1}
    used += size * STATES
    gB_tile = scratch[used : used + size * state]
    used += size * state
    gC_tile = scratch[used : used + size * state]
    used += size * state
    gdt_tile = scratch[used : used + size * rank]
    used += size * rank
    gh_lanes = scratch[used : used + blocks * block_size]  # what later tiles say about the state
    used += blocks * block_size
    dt_tile = scratch[used : used + CHUNK * rank + LANES]
    used += CHUNK * rank + LANES
    B_tile = scratch[used : used + CHUNK * state + LANES]
    used += CHUNK * state + LANES
    C_tile = scratch[used : used + CHUNK * state + LANES]
    used += CHUNK * state + LANES
    sums = scratch[used : used + CHUNK * max(rank, state)]
    zero = splat(np.float32(0))
    ln_2 = splat(LN_2)
    for task in range(first, end):
        image = task // splits
        first_block = blocks * (task % splits) // splits
        end_block = blocks * (task % splits + 1) // splits
        for path in range(paths):
            _clear(gh_lanes, blocks * block_size)
            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                steps = min(CHUNK, length - start)
                here = path * length + start
                at = image * dt_steps[0] + path * dt_steps[2]
                _gather_entries(dt, read, here, at, dt_steps[1], dt_tile, steps, rank)
                at = image * B_steps[0] + path * B_steps[2]
                _gather_entries(B, read, here, at, B_steps[1], B_tile, steps, state)
                at = image * C_steps[0] + path * C_steps[2]
                _gather_entries(C, read, here, at, C_steps[1], C_tile, steps, state)
                _clear(gB_tile, size * state)
                _clear(gC_tile, size * state)
                _clear(gdt_tile, size * rank)
                for block in range(first_block, end_block):
                    rows = min(LANES, channels - block * LANES)
                    data = image * length * channels + block * LANES
                    A_start = image * parameters_image + (path * blocks + block) * entries
                    gA_start = ((image * paths + path) * blocks + block) * entries
                    weight = A_start + block_size
                    gweight = gA_start + block_size
                    gh_start = block * block_size
                    h_start = (((image * blocks + block) * paths + path) * chunks + chunk) * block_size
                    _gather(u, read, here, data, channels, u_tile, steps, rows)
                    _gather(grad_y, write, here, data, channels, gy_tile, steps, rows)
                    _step_sizes(parameters, weight, dt_tile, d_tile, steps, rank)
                    for step in range(steps):
                        at = step * LANES
                        delta = load(d_tile, at)
                        d = softplus(delta)
                        store(d_tile, at, d)
                        store(slope_tile, at, logistic(delta))
                        store(du_tile, at, d * load(u_tile, at))
                        store(drive_tile, at, zero)
                        store(exponent_tile, at, zero)

                    for n in range(0, quads_end, STATES):
                        A_n = load_states(parameters, A_start + n * LANES)
                        h = load_states(starts, h_start + n * LANES)
                        for step in range(steps):
                            at = step * LANES
                            entry = step * state + n
                            decay = exp2(load(d_tile, at) * A_n)
                            kept = decay * h
                            h = fma(load(du_tile, at), broadcast_states(B_tile, entry), kept)
                            store(decay_tile, at * STATES, decay)
                            store(kept_tile, at * STATES, kept)
                            gC = fma(load(gy_tile, at), h, load_states(gC_tile, entry * LANES))
                            store(gC_tile, entry * LANES, gC)
                        gh = load_states(gh_lanes, gh_start + n * LANES)
                        gA = load_states(grad_parameters, gA_start + n * LANES)
                        for step in range(steps - 1, -1, -1):
                            at = step * LANES
                            entry = step * state + n
                            gh = fma(load(gy_tile, at), broadcast_states(C_tile, entry), gh)
                            gexponent = gh * load_states(kept_tile, at * STATES)
                            gA = fma(gexponent, load(d_tile, at), gA)
                            store(exponent_tile, at, dot_states(gexponent, A_n, load(exponent_tile, at)))
                            drive = dot_states(gh, broadcast_states(B_tile, entry), load(drive_tile, at))
                            store(drive_tile, at, drive)
                            gB = fma(gh, load(du_tile, at), load_states(gB_tile, entry * LANES))
                            store(gB_tile, entry * LANES, gB)
                            gh = gh * load_states(decay_tile, at * STATES)
                        store(gh_lanes, gh_start + n * LANES, gh)
                        store(grad_parameters, gA_start + n * LANES, gA)

                    for n in range(quads_end, state):
                        A_1 = load(parameters, A_start + n * LANES)
                        h_1 = load(starts, h_start + n * LANES)
                        for step in range(steps):
                            at = step * LANES
                            entry = step * state + n
                            decay_1 = exp2(load(d_tile, at) * A_1)
                            kept_1 = decay_1 * h_1
                            h_1 = fma(load(du_tile, at), broadcast(B_tile, entry), kept_1)
                            store(decay_tile, at, decay_1)
                            store(kept_tile, at, kept_1)
                            gC_1 = fma(load(gy_tile, at), h_1, load(gC_tile, entry * LANES))
                            store(gC_tile, entry * LANES, gC_1)
                        gh_1 = load(gh_lanes, gh_start + n * LANES)
                        gA_1 = load(grad_parameters, gA_start + n * LANES)
                        for step in range(steps - 1, -1, -1):
                            at = step * LANES
                            entry = step * state + n
                            gh_1 = fma(load(gy_tile, at), broadcast(C_tile, entry), gh_1)
                            gexponent_1 = gh_1 * load(kept_tile, at)
                            gA_1 = fma(gexponent_1, load(d_tile, at), gA_1)
                            store(exponent_tile, at, fma(gexponent_1, A_1, load(exponent_tile, at)))
                            store(drive_tile, at, fma(gh_1, broadcast(B_tile, entry), load(drive_tile, at)))
                            gB_1 = fma(gh_1, load(du_tile, at), load(gB_tile, entry * LANES))
                            store(gB_tile, entry * LANES, gB_1)
                            gh_1 = gh_1 * load(decay_tile, at)
                        store(gh_lanes, gh_start + n * LANES, gh_1)
                        store(grad_parameters, gA_start + n * LANES, gA_1)

                    D_block = load(parameters, weight + (rank + 1) * LANES)
                    gbias = load(grad_parameters, gweight + rank * LANES)
                    gD = load(grad_parameters, gweight + (rank + 1) * LANES)
                    for step in range(steps):
                        at = step * LANES
                        u_t = load(u_tile, at)
                        gy = load(gy_tile, at)
                        drive_t = load(drive_tile, at)
                        # A carries log2(e), which ln(2) takes out again.
                        gdelta = fma(drive_t, u_t, load(exponent_tile, at) * ln_2) * load(slope_tile, at)
                        store(slope_tile, at, gdelta)
                        store(gy_tile, at, fma(drive_t, load(d_tile, at), gy * D_block))
                        gbias = gbias + gdelta
                        gD = fma(gy, u_t, gD)
                    store(grad_parameters, gweight + rank * LANES, gbias)
                    store(grad_parameters, gweight + (rank + 1) * LANES, gD)
                    _scatter_add(gy_tile, read, here, grad_u, data, channels, steps, rows)

                    for r in range(0, rank_quads_end, STATES):
                        weights = load_states(parameters, weight + r * LANES)
                        gweights = load_states(grad_parameters, gweight + r * LANES)
                        for step in range(steps):
                            entry = step * rank + r
                            gdelta = load(slope_tile, step * LANES)
                            gweights = fma(gdelta, broadcast_states(dt_tile, entry), gweights)
                            gdt = fma(gdelta, weights, load_states(gdt_tile, entry * LANES))
                            store(gdt_tile, entry * LANES, gdt)
                        store(grad_parameters, gweight + r * LANES, gweights)
                    for r in range(rank_quads_end, rank):
                        weight_1 = load(parameters, weight + r * LANES)
                        gweight_1 = load(grad_parameters, gweight + r * LANES)
                        for step in range(steps):
                            entry = step * rank + r
                            gdelta = load(slope_tile, step * LANES)
                            gweight_1 = fma(gdelta, broadcast(dt_tile, entry), gweight_1)
                            gdt_1 = fma(gdelta, weight_1, load(gdt_tile, entry * LANES))
                            store(gdt_tile, entry * LANES, gdt_1)
                        store(grad_parameters, gweight + r * LANES, gweight_1)
                at = (task * length * paths + path) * rank
                _sum_entries(gdt_tile, sums, grad_dt, read, here, at, paths * rank, steps, rank)
                at = (task * length * paths + path) * state
                _sum_entries(gB_tile, sums, grad_B, read, here, at, paths * state, steps, state)
                _sum_entries(gC_tile, sums, grad_C, read, here, at, paths * state, steps, state)


# ------------------------------------------------------------------------------------------------------------
# The ops that PyTorch sees.


def _flat(x: Tensor) -> np.ndarray:
    """A contiguous tensor as a flat array, bfloat16 as uint16."""
    x = x.detach().contiguous().view(-1)
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _rows(x: Float[Tensor, "batch length paths entries"]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A tensor, of which entries at least are contiguous, as a flat array, and its other strides.

    The three parts of one projection are read where they lie.
    """
    x = x.detach()
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _flat(x.as_strided((span,), (1,))), (x.stride(0), x.stride(1), x.stride(2))


def _blocks(channels: int) -> int:
    return -(-channels // LANES)


def _splits(batch: int, channels: int) -> int:
    return max(1, min(-(-_blocks(channels) // BLOCKS_PER_TASK), SPLITS // batch))


def _check_table(table: Tensor, length: int) -> None:
    low, high = (int(x) for x in torch.aminmax(table))
    if low < 0 or high >= length:
        raise ValueError(f"paths must hold positions from 0 to {length - 1}: got {low} to {high}")


def _sizes(u: Tensor, dt: Tensor, B: Tensor, parameters: Tensor) -> tuple[int, ...]:
    batch, length, channels = u.shape
    per_image = parameters[0].numel() if len(parameters) > 1 else 0
    return channels, length, dt.shape[2], dt.shape[3], B.shape[3], per_image, _splits(batch, channels)


def _empty_starts(u: Tensor, B: Tensor, keep_starts: bool) -> Tensor:
    batch, length, channels = u.shape
    chunks = -(-length // CHUNK) if keep_starts else 0
    shape = (batch, _blocks(channels), B.shape[2], chunks, B.shape[3], LANES)
    return u.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("mambastyle::ss2d_scan", mutates_args=(), device_types="cpu")
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
    """The scan of float32 or bfloat16 tokens: y in the dtype of u, and the state before each tile.

    `parameters` is what `pack` makes. States before the tiles are what gradients need; without `keep_starts`
    there are none.
    """
    batch, length, channels = u.shape
    state, rank = B.shape[3], dt.shape[3]
    for table in (read, write):
        _check_table(table, length)
    y = u.new_zeros(u.shape, dtype=torch.float32)
    starts = _empty_starts(u, B, keep_starts)
    (dt_array, dt_steps), (B_array, B_steps), (C_array, C_steps) = (_rows(x) for x in (dt, B, C))
    arrays = (_flat(u), dt_array, B_array, C_array, *(_flat(x) for x in (parameters, read, write, y, starts)))
    sizes = (dt_steps, B_steps, C_steps, *_sizes(u, dt, B, parameters))
    scratch = 3 * CHUNK * LANES + CHUNK * (rank + 2 * state) + 3 * LANES + _blocks(channels) * state * LANES

    def work(first: int, end: int) -> None:
        memory = u.new_empty(scratch, dtype=torch.float32).numpy()
        _ss2d_forward(*arrays, keep_starts, *sizes, first, end, memory)

    state_steps = u.numel() * dt.shape[2] * state
    run_ranges(work, batch * _splits(batch, channels), parallel=state_steps > SERIAL_STATE_STEPS)
    return y.to(u.dtype), starts


@scan_op.register_fake
def _(u, dt, B, C, parameters, read, write, keep_starts):  # type: ignore
    return u.new_empty(u.shape), _empty_starts(u, B, keep_starts)


@torch.library.custom_op("mambastyle::ss2d_scan_backward", mutates_args=(), device_types="cpu")
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
    """Gradients of u, dt, B, C and parameters, each in the dtype and shape of its tensor."""
    batch, length, channels = u.shape
    paths, rank, state = dt.shape[2], dt.shape[3], B.shape[3]
    splits = _splits(batch, channels)

    def zeros(*shape: int) -> Tensor:
        return u.new_zeros(shape, dtype=torch.float32)

    grad_u = zeros(*u.shape)
    grad_dt = zeros(batch, splits, length, paths, rank)
    grad_B, grad_C = (zeros(batch, splits, length, paths, state) for _ in range(2))
    grad_parameters = zeros(batch, *parameters.shape[1:])
    (dt_array, dt_steps), (B_array, B_steps), (C_array, C_steps) = (_rows(x) for x in (dt, B, C))
    arrays = (_flat(grad_y), _flat(u), dt_array, B_array, C_array)
    arrays += tuple(_flat(x) for x in (parameters, read, write, starts))
    arrays += tuple(_flat(x) for x in (grad_u, grad_dt, grad_B, grad_C, grad_parameters))
    sizes = (dt_steps, B_steps, C_steps, *_sizes(u, dt, B, parameters))
    tiles = 7 + 2 * STATES + 2 * state + rank
    scratch = tiles * CHUNK * LANES + _blocks(channels) * state * LANES
    scratch += CHUNK * (rank + 2 * state + max(rank, state)) + 3 * LANES

    def work(first: int, end: int) -> None:
        memory = u.new_empty(scratch, dtype=torch.float32).numpy()
        _ss2d_backward(*arrays, *sizes, first, end, memory)

    state_steps = 4 * u.numel() * paths * state
    run_ranges(work, batch * splits, parallel=state_steps > SERIAL_STATE_STEPS)

    def summed(x: Tensor, like: Tensor) -> Tensor:
        return (x[:, 0] if splits == 1 else x.sum(1)).to(like.dtype).contiguous()

    # A is stored times log2(e), and the kernel leaves out the ln(2) of the derivative of exp2.
    grad_parameters[:, :, :, :state] *= float(LN_2)
    if len(parameters) == 1 and batch > 1:
        grad_parameters = grad_parameters.sum(0, keepdim=True)
    return grad_u.to(u.dtype), summed(grad_dt, dt), summed(grad_B, B), summed(grad_C, C), grad_parameters


@scan_backward_op.register_fake
def _(grad_y, u, dt, B, C, parameters, read, write, starts):  # type: ignore
    return tuple(x.new_empty(x.shape) for x in (u, dt, B, C, parameters))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _ = inputs
    # Without this, autograd would make zeros of the size of all stored states.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_y: Tensor | None, grad_starts: None) -> tuple:
    if grad_y is None:
        return (None,) * 8
    grads = torch.ops.mambastyle.ss2d_scan_backward(grad_y, *ctx.saved_tensors)
    return (*grads, None, None, None)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the 'numba' SS2D scan has no second derivative: run it with backend='reference' "
        "where gradients are differentiated again (gradient penalties)"
    )


torch.library.register_autograd("mambastyle::ss2d_scan", _backward, setup_context=_setup_context)
torch.library.register_autograd("mambastyle::ss2d_scan_backward", _no_second_derivative)


@register_flop_formula(torch.ops.mambastyle.ss2d_scan)
def _flops(u_shape, dt_shape, B_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore
    """9 per state and step, 2 per step for D u and 2 for each rank of the step size, on every path."""
    batch, length, channels = u_shape
    return batch * length * channels * dt_shape[2] * (9 * B_shape[3] + 2 * dt_shape[3] + 2)


@register_flop_formula(torch.ops.mambastyle.ss2d_scan_backward)
def _backward_flops(grad_y_shape, *shapes, out_shape=None, **kwargs) -> int:  # type: ignore
    """Twice the forward pass, as for a matrix product."""
    return 2 * _flops(*shapes)


def pack(
    A: Float[Tensor, "images paths channels state"],
    dt_weight: Float[Tensor, "paths channels rank"],
    dt_bias: Float[Tensor, "paths channels"],
    D: Float[Tensor, "images paths channels"],
) -> Float[Tensor, "images paths blocks entries 16"]:
    """What the kernels know of each block of 16 channels, side by side; zeros fill up the last block."""
    images, _, channels, _ = A.shape
    parts = (A * float(LOG2_E), dt_weight.expand(images, -1, -1, -1))
    parts += (dt_bias.expand(images, -1, -1).unsqueeze(-1), D.unsqueeze(-1))
    packed = torch.cat(parts, dim=-1)  # (images, paths, channels, entries)
    if channels % LANES:
        packed = F.pad(packed, (0, 0, 0, -channels % LANES))
    return packed.unflatten(2, (-1, LANES)).transpose(-1, -2).contiguous()


def scan(
    u: Float[Tensor, "batch length channels"],
    dt: Float[Tensor, "batch length paths rank"],
    B: Float[Tensor, "batch length paths state"],
    C: Float[Tensor, "batch length paths state"],
    parameters: Float[Tensor, "images paths blocks entries 16"],
    read: Int[Tensor, "paths length"],
    write: Int[Tensor, "paths length"],
) -> Float[Tensor, "batch length channels"]:
    """`ss2d_scan` of float32 or bfloat16 tokens with packed parameters."""
    tensors = (u, dt, B, C, parameters)
    keep_starts = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    y, _ = torch.ops.mambastyle.ss2d_scan(*tensors, read, write, keep_starts)
    return y
