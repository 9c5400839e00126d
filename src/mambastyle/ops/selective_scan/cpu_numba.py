"""The selective scan on the CPU: Numba kernels, and the PyTorch ops around them.

Sixteen neighbouring channels share a vector, the states of a channel are vectors beside each other, and time
runs in sequence, in tiles of CHUNK steps that are transposed through registers on their way in and out.
One state runs along the rows instead, with time in the lanes. docs/kernels.md has the design and what was
measured.

The module imports numba and is itself imported only when a scan asks for it.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mambastyle.ops.cpu_threads import run_ranges
from mambastyle.ops.cpu_tiles import SPAN, add, clear, plan, scan_tile, scan_tile_back, slots, sum_lanes
from mambastyle.ops.cpu_vectors import (
    LANES,
    LOG2_E,
    STATES,
    WIDTH,
    address,
    broadcast_rows,
    exp2_to_128,
    exp_minus_abs,
    floats,
    fma,
    inlined,
    kernel,
    largest,
    last_states,
    load,
    load_row,
    load_rows,
    prefetch,
    scan_quarters,
    softplus_from,
    splat,
    splat_row,
    store,
    store_quarter,
    store_rows,
    transpose,
    transpose_quarters,
)
from mambastyle.ops.registration import custom_op
from mambastyle.ops.selective_scan import operator

CHUNK = 128  # steps per tile, and between the states that the backward pass starts from
# The backward pass cuts the channels until it has this many tasks; fixed, so that sums do not depend on
# threads.
SPLITS = 16
# Beyond it (base 2, a step) a product of sixteen decays may leave the range of float32 though no state does.
MOST_GROWTH = np.float32(7)
# About 0.5 ms of work on one core: below it a thread costs more than it brings.
SERIAL_STATE_STEPS = 3_000_000

# ------------------------------------------------------------------------------------------------------------
# Kernels. All arrays are flat float32, and kernels that are called from Python get their addresses. A block
# is 16 channels of one group of one image, its tiles are [step, lane]; the last block of a group may have
# fewer `rows`, and its other lanes compute on zeros and are never stored.


@kernel
def _load_tile(source, start, length, tile, steps, rows):  # type: ignore
    """tile[step, lane] = source[start + lane * length + step]."""
    step = 0
    if rows == LANES:
        while step + LANES <= steps:
            transpose(source, start + step, length, tile, step * LANES, LANES)
            step += LANES
    while step < steps:
        for lane in range(rows):
            tile[step * LANES + lane] = source[start + lane * length + step]
        for lane in range(rows, LANES):
            tile[step * LANES + lane] = np.float32(0)
        step += 1


@kernel
def _store_tile(tile, target, start, length, steps, rows):  # type: ignore
    """target[start + lane * length + step] = tile[step, lane]."""
    step = 0
    if rows == LANES:
        while step + LANES <= steps:
            transpose(tile, step * LANES, LANES, target, start + step, length)
            step += LANES
    while step < steps:
        for lane in range(rows):
            target[start + lane * length + step] = tile[step * LANES + lane]
        step += 1


@kernel
def _load_lanes(source, start, step, target, index, factor, rows):  # type: ignore
    """target[index + lane] = factor * source[start + lane * step], and zero beyond the rows."""
    for lane in range(rows):
        target[index + lane] = factor * source[start + lane * step]
    for lane in range(rows, LANES):
        target[index + lane] = np.float32(0)


@kernel
def _scan_forward(  # type: ignore
    u, delta, A, B, C, D, bias, use_softplus, y, last, starts, keep_starts,
    channels, groups, length, state, A_image, D_image, first, end, scratch,
):  # fmt: skip
    """Blocks first..end-1. B, C are (batch, groups, length, state); `starts` gets each tile's first state."""
    u, delta, A, B, C = floats(u), floats(delta), floats(A), floats(B), floats(C)
    D, bias, y, last = floats(D), floats(bias), floats(y), floats(last)
    starts, scratch = floats(starts), floats(scratch)
    group = channels // groups
    blocks = (group + LANES - 1) // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    size = CHUNK * LANES
    y_tile = scratch[0:size]  # u at first
    d_tile = scratch[size : 2 * size]
    du_tile = scratch[2 * size : 3 * size]
    used = 3 * size
    A_lanes = scratch[used : used + state * LANES]  # log2(e) A, so that exp is exp2
    used += state * LANES
    h_lanes = scratch[used : used + state * LANES]
    used += state * LANES
    parameter = scratch[used : used + 2 * LANES]  # bias and D
    used += 2 * LANES
    decay_tile = scratch[used : used + SPAN * STATES * LANES]
    ahead = np.empty(8, np.int64)
    plan(ahead, 3, address(scratch), 0)
    for block in range(first, end):
        image_group = block // blocks
        image = image_group // groups
        in_group = block % blocks * LANES
        channel = image_group % groups * group + in_group
        rows = min(LANES, group - in_group)
        data = (image * channels + channel) * length
        for n in range(state):
            _load_lanes(A, (image * A_image + channel) * state + n, state, A_lanes, n * LANES, LOG2_E, rows)
            store(h_lanes, n * LANES, splat(np.float32(0)))
        _load_lanes(bias, channel, 1, parameter, 0, np.float32(1), rows)
        _load_lanes(D, image * D_image + channel, 1, parameter, LANES, np.float32(1), rows)
        for chunk in range(chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            now = (image_group * length + start) * state
            if keep_starts:
                for n in range(state):
                    store(starts, ((block * chunks + chunk) * state + n) * LANES, load(h_lanes, n * LANES))
            _load_tile(u, data + start, length, y_tile, steps, rows)
            _load_tile(delta, data + start, length, d_tile, steps, rows)
            # The next tile of this block, or the first one of the next.
            following = data + start + CHUNK if chunk + 1 < chunks else data + LANES * length
            plan(ahead, 0, address(u) + following * 4, length * 4)
            plan(ahead, 1, address(delta) + following * 4, length * 4)
            plan(ahead, 2, address(y) + following * 4, length * 4)
            scan_tile(
                A_lanes, 0, parameter, 0, parameter, LANES, h_lanes, 0, B, C, now,
                y_tile, d_tile, du_tile, decay_tile, ahead, use_softplus, state, steps,
            )  # fmt: skip
            _store_tile(y_tile, y, data + start, length, steps, rows)
        for lane in range(rows):
            for n in range(state):
                last[(image * channels + channel + lane) * state + n] = h_lanes[n * LANES + lane]


@inlined
def _prepare_rows(  # type: ignore
    u, delta, first, second, third, fourth, B, entry, A, bias, use_softplus, decay_tile, drive_tile, steps,
    growth,
):  # fmt: skip
    """decay = exp2(d A) and drive = d u B of four rows; returns the largest logarithm of a decay so far."""
    for step in range(0, steps, WIDTH):
        d = load_rows(delta, first + step, second + step, third + step, fourth + step) + bias
        store_rows(decay_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step, d)
    if use_softplus:
        for step in range(0, steps, WIDTH):
            d = load_rows(decay_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step)
            store_rows(drive_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step, exp_minus_abs(d))
        for step in range(0, steps, WIDTH):
            d = load_rows(decay_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step)
            e = load_rows(drive_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step)
            d = softplus_from(d, e)
            store_rows(decay_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step, d)
    for step in range(0, steps, WIDTH):
        d = load_rows(decay_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step)
        drive = d * load_rows(u, first + step, second + step, third + step, fourth + step)
        drive = drive * load_row(B, entry + step)
        store_rows(drive_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step, drive)
        exponent = d * A
        growth = largest(exponent, growth)
        # Where `growth` is beyond 128 nobody uses what comes out.
        store_rows(decay_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step, exp2_to_128(exponent))
    return growth


@inlined
def _scan_rows(  # type: ignore
    u, delta, y, first, second, third, fourth, C, entry, D, decay_tile, drive_tile, steps, carry, next_chunk,
):  # fmt: skip
    """Runs four prepared rows, which begin at `first` to `fourth` in u and y, from the states `carry` on.

    Meanwhile it asks memory for what lies `next_chunk` floats further on.
    """
    for step in range(0, steps, WIDTH):
        for place in (first, second, third, fourth):
            ahead = 4 * (place + next_chunk + step)  # in bytes
            prefetch(address(u) + ahead)
            prefetch(address(delta) + ahead)
            prefetch(address(y) + ahead)
        decay = load_rows(decay_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step)
        drive = load_rows(drive_tile, step, CHUNK + step, 2 * CHUNK + step, 3 * CHUNK + step)
        states = scan_quarters(transpose_quarters(decay), transpose_quarters(drive), carry)
        u_t = load_rows(u, first + step, second + step, third + step, fourth + step)
        y_t = fma(transpose_quarters(states), load_row(C, entry + step), D * u_t)
        store_rows(y, first + step, second + step, third + step, fourth + step, y_t)
        carry = last_states(states)
    return carry


@kernel
def _scan_one_state(  # type: ignore
    u, delta, A, B, C, D, bias, use_softplus, y, last, starts, keep_starts,
    channels, groups, length, state, A_image, D_image, begin, end, scratch, most,
):  # fmt: skip
    """As `_scan_forward` for one state: along the rows, four at a time, which are transposed in quarters.

    most[block - begin] becomes the largest logarithm (base 2) of a decay: beyond MOST_GROWTH the block is
    wrong. Returns the largest of all.
    """
    u, delta, A, B, C = floats(u), floats(delta), floats(A), floats(B), floats(C)
    D, bias, y, last = floats(D), floats(bias), floats(y), floats(last)
    starts, scratch, most = floats(starts), floats(scratch), floats(most)
    group = channels // groups
    blocks = (group + LANES - 1) // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    whole = length // WIDTH * WIDTH
    tail = length - whole
    decay_tile = scratch[0 : STATES * CHUNK]
    drive_tile = scratch[STATES * CHUNK : 2 * STATES * CHUNK]
    used = 2 * STATES * CHUNK
    # The steps that fill no register, of four rows, with zeros behind.
    u_tail = scratch[used : used + STATES * WIDTH]
    used += STATES * WIDTH
    d_tail = scratch[used : used + STATES * WIDTH]
    used += STATES * WIDTH
    y_tail = scratch[used : used + STATES * WIDTH]
    used += STATES * WIDTH
    B_tail = scratch[used : used + WIDTH]
    used += WIDTH
    C_tail = scratch[used : used + WIDTH]
    u_tail[:], d_tail[:], B_tail[:], C_tail[:] = 0, 0, 0, 0
    all_blocks = np.float32(0)
    for block in range(begin, end):
        image_group = block // blocks
        image = image_group // groups
        entry = image_group * length
        first_row = image_group % groups * group + block % blocks * LANES
        last_row = first_row + min(LANES, group - block % blocks * LANES) - 1
        growth = splat_row(np.float32(0))
        if keep_starts and last_row - first_row + 1 < LANES:
            # Lanes without a channel: the backward pass computes on zeros there.
            starts[block * chunks * LANES : (block + 1) * chunks * LANES] = 0
        for step in range(tail):
            B_tail[step] = B[entry + whole + step]
            C_tail[step] = C[entry + whole + step]
        for row in range(first_row, last_row + 1, STATES):
            # The last row again where four are not left.
            row_1, row_2, row_3 = min(row + 1, last_row), min(row + 2, last_row), min(row + 3, last_row)
            at = (image * channels + row) * length
            at_1 = (image * channels + row_1) * length
            at_2 = (image * channels + row_2) * length
            at_3 = (image * channels + row_3) * length
            own = image * A_image
            A_rows = splat_row(LOG2_E) * broadcast_rows(A, own + row, own + row_1, own + row_2, own + row_3)
            own = image * D_image
            D_rows = broadcast_rows(D, own + row, own + row_1, own + row_2, own + row_3)
            bias_rows = broadcast_rows(bias, row, row_1, row_2, row_3)
            carry = splat_row(np.float32(0))
            now = 0
            for piece in range(chunks + (tail > 0)):
                # The chunks without the tail, and then the tail: one piece of code for both.
                if piece < chunks:
                    now = piece * CHUNK
                    steps = min(CHUNK, whole - now)
                    u_now, d_now, y_now, B_now, C_now = u, delta, y, B, C
                    first, second, third, fourth = at + now, at_1 + now, at_2 + now, at_3 + now
                    entry_now = entry + now
                    if keep_starts:
                        store_quarter(starts, (block * chunks + piece) * LANES + row - first_row, carry)
                else:
                    steps = WIDTH
                    u_now, d_now, y_now, B_now, C_now = u_tail, d_tail, y_tail, B_tail, C_tail
                    first, second, third, fourth = 0, WIDTH, 2 * WIDTH, 3 * WIDTH
                    entry_now = 0
                    for step in range(tail):
                        for source, target in ((u, u_tail), (delta, d_tail)):
                            target[first + step] = source[at + whole + step]
                            target[second + step] = source[at_1 + whole + step]
                            target[third + step] = source[at_2 + whole + step]
                            target[fourth + step] = source[at_3 + whole + step]
                growth = _prepare_rows(
                    u_now, d_now, first, second, third, fourth, B_now, entry_now,
                    A_rows, bias_rows, use_softplus, decay_tile, drive_tile, steps, growth,
                )  # fmt: skip
                if piece == chunks:
                    # Which leaves the state as it is behind the tail, where drive is zero.
                    for step in range(tail, WIDTH):
                        for number in range(STATES):
                            decay_tile[number * CHUNK + step] = 1
                carry = _scan_rows(
                    u_now, d_now, y_now, first, second, third, fourth, C_now, entry_now,
                    D_rows, decay_tile, drive_tile, steps, carry,
                    CHUNK if piece + 1 < chunks else STATES * length - now,  # or that of the next rows
                )  # fmt: skip
            for step in range(tail):
                y[at + whole + step] = y_tail[step]
                y[at_1 + whole + step] = y_tail[WIDTH + step]
                y[at_2 + whole + step] = y_tail[2 * WIDTH + step]
                y[at_3 + whole + step] = y_tail[3 * WIDTH + step]
            store_quarter(drive_tile, 0, carry)
            for number in range(min(STATES, last_row + 1 - row)):
                last[image * channels + row + number] = drive_tile[number]
        store(drive_tile, 0, growth)
        most[block - begin] = drive_tile[:WIDTH].max()
        all_blocks = max(all_blocks, most[block - begin])
    return all_blocks


@kernel
def _scan_backward(  # type: ignore
    grad_y, grad_last, u, delta, A, B, C, D, bias, use_softplus, starts,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
    channels, groups, length, state, splits, A_image, D_image, first, end, scratch,
):  # fmt: skip
    """Tasks first..end-1, each one run of a group's blocks, each of them over all steps, last tile first.

    grad_A, grad_D and grad_bias are per image; grad_B and grad_C are (task, length, state), to be summed over
    the tasks of a group; they come as zeros, everything else is written. For every four states a tile is
    computed forwards from its stored start, then backwards.
    """
    grad_y, grad_last, u, delta = floats(grad_y), floats(grad_last), floats(u), floats(delta)
    A, B, C, D, bias = floats(A), floats(B), floats(C), floats(D), floats(bias)
    grad_u, grad_delta, grad_A = floats(grad_u), floats(grad_delta), floats(grad_A)
    grad_B, grad_C, grad_D = floats(grad_B), floats(grad_C), floats(grad_D)
    grad_bias, starts, scratch = floats(grad_bias), floats(starts), floats(scratch)
    group = channels // groups
    blocks = (group + LANES - 1) // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    size = CHUNK * LANES
    block_size = state * LANES
    u_tile = scratch[0:size]
    d_tile = scratch[size : 2 * size]
    du_tile = scratch[2 * size : 3 * size]
    slope_tile = scratch[3 * size : 4 * size]  # d d_t / d delta_t, becomes grad_delta
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
    A_lanes = scratch[used : used + block_size]
    used += block_size
    gA_lanes = scratch[used : used + block_size]
    used += block_size
    parameter = scratch[used : used + 2 * LANES]  # bias and D
    used += 2 * LANES
    sums = scratch[used : used + 2 * LANES]  # their gradients
    used += 2 * LANES
    entry_sums = scratch[used : used + CHUNK * state]
    used += CHUNK * state
    gh_lanes = scratch[used : used + block_size]  # what later tiles say about the state
    ahead = np.empty(12, np.int64)
    plan(ahead, 5, address(scratch), 0)
    for task in range(first, end):
        image_group = task // splits
        image = image_group // groups
        first_block = blocks * (task % splits) // splits
        end_block = blocks * (task % splits + 1) // splits
        for block in range(first_block, end_block):
            channel = image_group % groups * group + block * LANES
            rows = min(LANES, group - block * LANES)
            row = image * channels + channel
            for n in range(state):
                A_start = (image * A_image + channel) * state + n
                _load_lanes(A, A_start, state, A_lanes, n * LANES, LOG2_E, rows)
                _load_lanes(grad_last, row * state + n, state, gh_lanes, n * LANES, np.float32(1), rows)
            _load_lanes(bias, channel, 1, parameter, 0, np.float32(1), rows)
            _load_lanes(D, image * D_image + channel, 1, parameter, LANES, np.float32(1), rows)
            clear(gA_lanes, block_size)
            clear(sums, 2 * LANES)
            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                steps = min(CHUNK, length - start)
                data = row * length + start
                _load_tile(u, data, length, u_tile, steps, rows)
                _load_tile(delta, data, length, d_tile, steps, rows)
                _load_tile(grad_y, data, length, gy_tile, steps, rows)
                # The tile before this one, or the next block's last.
                following = data - CHUNK if chunk else (row + LANES) * length + (chunks - 1) * CHUNK
                plan(ahead, 0, address(u) + following * 4, length * 4)
                plan(ahead, 1, address(delta) + following * 4, length * 4)
                plan(ahead, 2, address(grad_y) + following * 4, length * 4)
                plan(ahead, 3, address(grad_u) + following * 4, length * 4)
                plan(ahead, 4, address(grad_delta) + following * 4, length * 4)
                h_start = ((image_group * blocks + block) * chunks + chunk) * block_size
                now = (image_group * length + start) * state
                scan_tile_back(
                    A_lanes, 0, parameter, 0, parameter, LANES, starts, h_start, B, C, now,
                    gh_lanes, 0, gA_lanes, 0, sums, 0, gB_tile, gC_tile,
                    u_tile, d_tile, du_tile, slope_tile, gy_tile, drive_tile, exponent_tile,
                    decay_tile, kept_tile, ahead, use_softplus, state, steps, False,
                )  # fmt: skip
                _store_tile(gy_tile, grad_u, data, length, steps, rows)
                _store_tile(slope_tile, grad_delta, data, length, steps, rows)
                first_entry = (task * length + start) * state
                for tile, gradient in ((gB_tile, grad_B), (gC_tile, grad_C)):
                    sum_lanes(tile, entry_sums, steps, state)
                    add(entry_sums, gradient, first_entry, steps * state)
            for lane in range(rows):
                for n in range(state):
                    grad_A[(row + lane) * state + n] = gA_lanes[n * LANES + lane]
                grad_bias[row + lane] = sums[lane]
                grad_D[row + lane] = sums[LANES + lane]


# ------------------------------------------------------------------------------------------------------------
# The ops that PyTorch sees. Every buffer is torch's, so that its switch to fill fresh memory with NaN reaches
# them all.


def _state_steps(u: Tensor, state: int) -> int:
    """The work of a scan; a step costs as much as six states beside its own (softplus, transposes)."""
    return u.numel() * (state + 6)


def _per_channel(x: Tensor | None, u: Tensor) -> Tensor:
    return u.new_zeros(u.shape[1]) if x is None else x


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors as kernels read them; B and C are given with the states of a step side by side."""
    return [x.contiguous() for x in tensors]


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where they lie, as long as somebody holds them."""
    return [x.data_ptr() for x in tensors]


def _blocks(channels: int, groups: int) -> int:
    return groups * -(-(channels // groups) // LANES)


@custom_op("mambastyle::selective_scan", "cpu")
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
    """The scan of float32 tensors; see `operator.py`."""
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    y, last, starts = _empty_outputs(u, A, B, keep_starts)
    inputs = _readable(u, delta, A, B.mT, C.mT, _per_channel(D, u), _per_channel(delta_bias, u))
    sizes = (channels, groups, length, state, _image_step(A, 3, channels), _image_step(D, 2, channels))
    given = (*_addresses(inputs), delta_softplus, *_addresses((y, last, starts)), keep_starts, *sizes)
    scratch = (3 * CHUNK + SPAN * STATES + 2 * state + 2) * LANES

    def work(first: int, end: int) -> None:
        room = u.new_empty(scratch)
        if state > 1:
            _scan_forward(*given, first, end, room.data_ptr())
            return
        most = u.new_empty(end - first)
        if _scan_one_state(*given, first, end, room.data_ptr(), most.data_ptr()) > MOST_GROWTH:
            for block in torch.nonzero(most > float(MOST_GROWTH)).flatten().tolist():
                _scan_forward(*given, first + block, first + block + 1, room.data_ptr())

    run_ranges(work, batch * _blocks(channels, groups), parallel=_state_steps(u, state) > SERIAL_STATE_STEPS)
    return y, last, starts


def _image_step(x: Tensor | None, per_image: int, channels: int) -> int:
    """How far apart the parameters of two images lie: 0 if the images share them."""
    return channels if x is not None and x.ndim == per_image else 0


def _empty_outputs(u: Tensor, A: Tensor, B: Tensor, keep_starts: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    state = A.shape[-1]
    chunks = -(-length // CHUNK) if keep_starts else 0
    return (
        u.new_empty(batch, channels, length),
        u.new_empty(batch, channels, state),
        u.new_empty(batch * _blocks(channels, B.shape[1]), chunks, state, LANES),
    )


@custom_op("mambastyle::selective_scan_backward", "cpu")
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
    blocks = _blocks(channels, groups) // groups
    splits = max(1, min(blocks, SPLITS // (batch * groups)))
    tasks = batch * groups * splits
    inputs = _readable(
        grad_y, grad_last, u, delta, A, B.mT, C.mT, _per_channel(D, u), _per_channel(delta_bias, u)
    )
    starts = starts.contiguous()
    grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
    grad_A = u.new_empty(batch, channels, state)
    grad_B, grad_C = (u.new_zeros(batch, groups, splits, length, state) for _ in range(2))
    grad_D, grad_bias = u.new_empty(batch, channels), u.new_empty(batch, channels)
    outputs = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
    sizes = (channels, groups, length, state, splits)
    sizes += (_image_step(A, 3, channels), _image_step(D, 2, channels))
    tiles = 7 + 2 * STATES + 2 * slots.py_func(state)
    scratch = (tiles * CHUNK + 3 * state + 4) * LANES + CHUNK * state
    given = (*_addresses(inputs), delta_softplus, starts.data_ptr(), *_addresses(outputs), *sizes)

    def work(first: int, end: int) -> None:
        room = u.new_empty(scratch)
        _scan_backward(*given, first, end, room.data_ptr())

    run_ranges(work, tasks, parallel=4 * _state_steps(u, state) > SERIAL_STATE_STEPS)
    return (
        grad_u,
        grad_delta,
        operator.as_given(grad_A, A),
        grad_B.sum(2).transpose(-1, -2).contiguous(),
        grad_C.sum(2).transpose(-1, -2).contiguous(),
        operator.as_given(grad_D, D),
        operator.as_given(grad_bias, delta_bias),
    )


operator.register("selective_scan", "numba", _empty_outputs)
