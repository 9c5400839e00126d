"""The scan of a grid along several paths on the CPU: Numba kernels, and the PyTorch ops around them.

Tokens are (batch, length, channels): sixteen neighbouring channels are a vector as they lie in memory, and a
table of positions leads a path through them, so that no reordered copy of the grid exists. Each tile of CHUNK
steps computes its step sizes from their low rank, scans, and adds to the output. docs/kernels.md has the
design and what was measured.

The module imports numba and is itself imported only when a scan asks for it.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mambastyle.ops.cpu_threads import run_ranges
from mambastyle.ops.cpu_tiles import SPAN, clear, put, scan_tile, scan_tile_back, slots, sum_lanes
from mambastyle.ops.cpu_vectors import (
    LANES,
    LN_2,
    STATES,
    address,
    broadcast,
    broadcast_states,
    dot_states,
    fma,
    fold_states,
    kernel,
    load,
    load_states,
    prefetch,
    scalar,
    splat,
    store,
)
from mambastyle.ops.registration import custom_op
from mambastyle.ops.ss2d_scan import operator

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
    sum_lanes(tile, sums, steps, entries)
    for step in range(steps):
        at = base + table[first + step] * row_step
        for entry in range(entries):
            target[at + entry] += sums[step * entries + entry]


@kernel
def _step_sizes(  # type: ignore
    parameters, weight, dt_tile, d_tile, steps, rank, u, read, y, write, ahead, base, row_step
):
    """d_tile[step, lane] = the weights' product with dt_tile[step]; the bias comes later.

    Meanwhile it asks memory for what the path's next tile reads of u and y, from `ahead` on in the tables.
    """
    zero = splat(np.float32(0))
    quads_end = rank // STATES * STATES
    for step in range(steps):
        prefetch(address(u) + (base + read[ahead + step] * row_step) * u.itemsize)
        prefetch(address(y) + (base + write[ahead + step] * row_step) * y.itemsize)
        d = zero
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
    used += blocks * state * LANES
    decay_tile = scratch[used : used + SPAN * STATES * LANES]
    for task in range(first, end):
        image = task // splits
        first_block = blocks * (task % splits) // splits
        end_block = blocks * (task % splits + 1) // splits
        for path in range(paths):
            clear(h_lanes, blocks * state * LANES)
            for chunk in range(chunks):
                start = chunk * CHUNK
                steps = min(CHUNK, length - start)
                here = path * length + start
                ahead = here + CHUNK if start + 2 * CHUNK <= length else here  # whole tiles: as many steps
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
                    bias = weight + rank * LANES  # and D behind it
                    h_start = block * state * LANES
                    if keep_starts:
                        kept = (((image * blocks + block) * paths + path) * chunks + chunk) * state * LANES
                        for n in range(state):
                            store(starts, kept + n * LANES, load(h_lanes, h_start + n * LANES))
                    _gather(u, read, here, data, channels, y_tile, steps, rows)
                    _step_sizes(
                        parameters, weight, dt_tile, d_tile, steps, rank,
                        u, read, y, write, ahead, data, channels,
                    )  # fmt: skip
                    scan_tile(
                        parameters, A_start, parameters, bias, parameters, bias + LANES, h_lanes, h_start,
                        B_tile, C_tile, 0, y_tile, d_tile, du_tile, decay_tile, None, True, state, steps,
                    )  # fmt: skip
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
    backwards. grad_dt, grad_B and grad_C keep their lanes apart, as `cpu_tiles.put` lays them out, until all
    blocks of the task are through with the tile.
    """
    blocks = (channels + LANES - 1) // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    rank_quads = rank // STATES
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
    gB_tile = scratch[used : used + size * slots(state)]
    used += size * slots(state)
    gC_tile = scratch[used : used + size * slots(state)]
    used += size * slots(state)
    gdt_tile = scratch[used : used + size * slots(rank)]
    used += size * slots(rank)
    gh_lanes = scratch[used : used + blocks * block_size]  # what later tiles say about the state
    used += blocks * block_size
    dt_tile = scratch[used : used + CHUNK * rank + LANES]
    used += CHUNK * rank + LANES
    B_tile = scratch[used : used + CHUNK * state + LANES]
    used += CHUNK * state + LANES
    C_tile = scratch[used : used + CHUNK * state + LANES]
    used += CHUNK * state + LANES
    sums = scratch[used : used + CHUNK * max(rank, state)]
    for task in range(first, end):
        image = task // splits
        first_block = blocks * (task % splits) // splits
        end_block = blocks * (task % splits + 1) // splits
        for path in range(paths):
            clear(gh_lanes, blocks * block_size)
            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                steps = min(CHUNK, length - start)
                here = path * length + start
                ahead = max(here - CHUNK, path * length)
                at = image * dt_steps[0] + path * dt_steps[2]
                _gather_entries(dt, read, here, at, dt_steps[1], dt_tile, steps, rank)
                at = image * B_steps[0] + path * B_steps[2]
                _gather_entries(B, read, here, at, B_steps[1], B_tile, steps, state)
                at = image * C_steps[0] + path * C_steps[2]
                _gather_entries(C, read, here, at, C_steps[1], C_tile, steps, state)
                clear(gB_tile, size * slots(state))
                clear(gC_tile, size * slots(state))
                clear(gdt_tile, size * slots(rank))
                for block in range(first_block, end_block):
                    rows = min(LANES, channels - block * LANES)
                    data = image * length * channels + block * LANES
                    A_start = image * parameters_image + (path * blocks + block) * entries
                    gA_start = ((image * paths + path) * blocks + block) * entries
                    weight = A_start + block_size
                    bias = weight + rank * LANES  # and D behind it
                    gweight = gA_start + block_size
                    gh_start = block * block_size
                    h_start = (((image * blocks + block) * paths + path) * chunks + chunk) * block_size
                    _gather(u, read, here, data, channels, u_tile, steps, rows)
                    _gather(grad_y, write, here, data, channels, gy_tile, steps, rows)
                    _step_sizes(
                        parameters, weight, dt_tile, d_tile, steps, rank,
                        u, read, grad_y, write, ahead, data, channels,
                    )  # fmt: skip
                    scan_tile_back(
                        parameters, A_start, parameters, bias, parameters, bias + LANES, starts, h_start,
                        B_tile, C_tile, 0, gh_lanes, gh_start, grad_parameters, gA_start,
                        grad_parameters, gweight + rank * LANES, gB_tile, gC_tile,
                        u_tile, d_tile, du_tile, slope_tile, gy_tile, drive_tile, exponent_tile,
                        decay_tile, kept_tile, None, True, state, steps, True,
                    )  # fmt: skip
                    _scatter_add(gy_tile, read, here, grad_u, data, channels, steps, rows)

                    for quad in range(rank_quads):
                        r = quad * STATES
                        weights = load_states(parameters, weight + r * LANES)
                        gweights = load_states(grad_parameters, gweight + r * LANES)
                        for step in range(steps):
                            entry = step * rank + r
                            gdelta = load(slope_tile, step * LANES)
                            gweights = fma(gdelta, broadcast_states(dt_tile, entry), gweights)
                            put(
                                gdt_tile,
                                (step * rank_quads + quad) * LANES,
                                fold_states(gdelta * weights),
                                True,
                            )
                        store(grad_parameters, gweight + r * LANES, gweights)
                    for r in range(rank_quads * STATES, rank):
                        single = steps * rank_quads + r - rank_quads * STATES
                        weight_1 = load(parameters, weight + r * LANES)
                        gweight_1 = load(grad_parameters, gweight + r * LANES)
                        for step in range(steps):
                            entry = step * rank + r
                            gdelta = load(slope_tile, step * LANES)
                            gweight_1 = fma(gdelta, broadcast(dt_tile, entry), gweight_1)
                            put(gdt_tile, (single + step * (rank % STATES)) * LANES, gdelta * weight_1, True)
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
    x = x.contiguous()
    x = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    return x.numpy(force=True).ravel()  # `force` cuts it from autograd


def _rows(x: Float[Tensor, "batch length paths entries"]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A tensor as a flat array in which the entries are contiguous, and its other strides."""
    x = operator.with_entries_together(x)
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _flat(x.as_strided((span,), (1,))), (x.stride(0), x.stride(1), x.stride(2))


def _blocks(channels: int) -> int:
    return -(-channels // LANES)


def _splits(batch: int, channels: int) -> int:
    return max(1, min(-(-_blocks(channels) // BLOCKS_PER_TASK), SPLITS // batch))


def _sizes(u: Tensor, dt: Tensor, B: Tensor, parameters: Tensor) -> tuple[int, ...]:
    batch, length, channels = u.shape
    per_image = parameters[0].numel() if len(parameters) > 1 else 0
    return channels, length, dt.shape[2], dt.shape[3], B.shape[3], per_image, _splits(batch, channels)


def _empty_outputs(u: Tensor, B: Tensor, keep_starts: bool) -> tuple[Tensor, Tensor]:
    batch, length, channels = u.shape
    chunks = -(-length // CHUNK) if keep_starts else 0
    shape = (batch, _blocks(channels), B.shape[2], chunks, B.shape[3], LANES)
    return u.new_empty(u.shape), u.new_empty(shape, dtype=torch.float32)


@custom_op("mambastyle::ss2d_scan", "cpu")
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
    """The scan of float32 or bfloat16 tokens; see `operator.py`."""
    batch, length, channels = u.shape
    state, rank = B.shape[3], dt.shape[3]
    for table in (read, write):
        operator.check_table(table, length)
    y = u.new_zeros(u.shape, dtype=torch.float32)
    _, starts = _empty_outputs(u, B, keep_starts)
    (dt_array, dt_steps), (B_array, B_steps), (C_array, C_steps) = (_rows(x) for x in (dt, B, C))
    arrays = (_flat(u), dt_array, B_array, C_array, *(_flat(x) for x in (parameters, read, write, y, starts)))
    sizes = (dt_steps, B_steps, C_steps, *_sizes(u, dt, B, parameters))
    scratch = (3 * CHUNK + SPAN * STATES + _blocks(channels) * state + 3) * LANES + CHUNK * (rank + 2 * state)

    def work(first: int, end: int) -> None:
        memory = u.new_empty(scratch, dtype=torch.float32).numpy()
        _ss2d_forward(*arrays, keep_starts, *sizes, first, end, memory)

    state_steps = u.numel() * dt.shape[2] * state
    run_ranges(work, batch * _splits(batch, channels), parallel=state_steps > SERIAL_STATE_STEPS)
    return y.to(u.dtype), starts


@custom_op("mambastyle::ss2d_scan_backward", "cpu")
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
    tiles = 7 + 2 * STATES + 2 * slots.py_func(state) + slots.py_func(rank)
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


operator.register("ss2d_scan", "numba", _empty_outputs)
