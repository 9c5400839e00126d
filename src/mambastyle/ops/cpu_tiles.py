"""What the Numba kernels of both scans share: a tile of steps by 16 channels, forwards and backwards.

A tile is [step, lane] in a flat float32 array; B and C are flat too, `entry` is where those of the tile's
first step begin, and those of a step lie side by side, state by state. A carries log2(e), so that exp is
exp2. Arrays that a kernel keeps for many tiles come with the index where their part for this one begins.
The module imports numba and is itself imported only by the kernels.
"""

import numpy as np

from mambastyle.ops.cpu_vectors import (
    LANES,
    LN_2,
    STATES,
    broadcast,
    broadcast_states,
    dot_states,
    exp2,
    fma,
    fold_states,
    inlined,
    instruction_set,
    load,
    load_states,
    logistic,
    prefetch,
    softplus,
    splat,
    store,
    sum_folded,
    sum_rows,
)

LINE_BYTES = 64  # what memory brings at once: sixteen floats
# Where registers are shorter than vectors, A, h and the polynomial of exp2 do not fit into them together: the
# decays of so many steps are computed ahead, which leaves them in the nearest cache.
DECAYS_FIRST = instruction_set()[1] < LANES
SPAN = 32

# ------------------------------------------------------------------------------------------------------------
# Memory. Tiles come in bursts with much computing between them, and the processor does not see the next one
# coming: while a tile is computed, its loops ask for the lines of the next, one a step.


@inlined
def plan(ahead, number, address, pitch):  # type: ignore
    """Says where tensor `number` has its next tile: sixteen rows, `pitch` bytes apart. The last number is for
    what needs no fetching: any address of the program's, pitch 0.
    """
    ahead[2 * number] = address
    ahead[2 * number + 1] = pitch


@inlined
def fetch(ahead, number, step):  # type: ignore
    """Asks for one line of a tensor's next tile: of all rows, then of all rows sixteen columns on."""
    prefetch(ahead[2 * number] + step % LANES * ahead[2 * number + 1] + step // LANES * LINE_BYTES)


@inlined
def left_over(number, loops, nothing):  # type: ignore
    """The tensor, or `nothing` if a loop over states fetches it: to ask again costs less than a branch."""
    return nothing if number < loops else number


# ------------------------------------------------------------------------------------------------------------
# The gradients of B, C and dt are sums over channels. A tile of them holds, for every step, the states in
# fours as `fold_states` leaves them, and behind all steps' the states that make no four, a vector each.


@inlined
def slots(entries):  # type: ignore
    """The vectors that such a tile needs for a step."""
    return entries // STATES + entries % STATES


@inlined
def put(tile, at, value, accumulate):  # type: ignore
    """tile[at : at + 16] becomes the vector, or more by it."""
    if accumulate:
        value = load(tile, at) + value
    store(tile, at, value)


@inlined
def sum_lanes(tile, sums, steps, entries):  # type: ignore
    """sums[step, entry] = the sum over the lanes. Both arrays have room for whole vectors."""
    quads = entries // STATES
    singles = entries % STATES
    if singles == 0:
        for index in range(0, steps * quads, STATES):
            store(sums, index * STATES, sum_folded(tile, index * LANES))
    elif quads == 0:
        for index in range(0, steps * singles, LANES):
            store(sums, index, sum_rows(tile, index * LANES))
    else:
        for step in range(steps):
            for entry in range(entries):
                first, lanes = (step * quads * STATES + entry) * STATES, STATES
                if entry >= quads * STATES:
                    single = step * singles + entry - quads * STATES
                    first, lanes = (steps * quads + single) * LANES, LANES
                total = np.float32(0)
                for lane in range(lanes):
                    total += tile[first + lane]
                sums[step * entries + entry] = total


@inlined
def add(source, target, start, size):  # type: ignore
    """target[start + i] += source[i]."""
    whole = size // LANES * LANES
    for index in range(0, whole, LANES):
        store(target, start + index, load(target, start + index) + load(source, index))
    for index in range(whole, size):
        target[start + index] += source[index]


# ------------------------------------------------------------------------------------------------------------
# Tiles.


@inlined
def clear(array, size):  # type: ignore
    zero = splat(np.float32(0))
    for index in range(0, size, LANES):
        store(array, index, zero)


@inlined
def span(steps):  # type: ignore
    """How many steps a loop over states takes at once."""
    return SPAN if DECAYS_FIRST else max(steps, 1)


@inlined
def compute_decays(A, A_at, d_tile, decay_tile, begin, end, origin):  # type: ignore
    """decay_tile[step - origin, state] = exp2(d A), four states from A_at on."""
    for number in range(STATES):
        A_1 = load(A, A_at + number * LANES)
        for step in range(begin, end):
            at = ((step - origin) * STATES + number) * LANES
            store(decay_tile, at, exp2(load(d_tile, step * LANES) * A_1))


@inlined
def scan_tile(  # type: ignore
    A, A_at, bias, bias_at, D, D_at, h, h_at, B, C, entry, u_tile, d_tile, du_tile, decay_tile,
    ahead, use_softplus, state, steps,
):  # fmt: skip
    """Runs all states from h, which becomes the state behind the tile; u_tile becomes y.

    d_tile comes in without its bias and softplus; decay_tile is room for SPAN steps of four states. `ahead`
    has the plan of three tensors and of nothing, or is None.
    """
    bias_lanes = load(bias, bias_at)
    D_lanes = load(D, D_at)
    quads = state // STATES
    for step in range(steps):
        if ahead is not None:
            fetch(ahead, left_over(0, quads, 3), step)
            fetch(ahead, left_over(1, quads, 3), step)
            fetch(ahead, left_over(2, quads, 3), step)
        at = step * LANES
        d = load(d_tile, at) + bias_lanes
        if use_softplus:
            d = softplus(d)
        u_t = load(u_tile, at)
        store(d_tile, at, d)
        store(du_tile, at, d * u_t)
        store(u_tile, at, D_lanes * u_t)
    # States outside, steps inside: A and h stay in registers, and exp2 of many steps overlap.
    for quad in range(quads):
        n = quad * STATES
        A_n = load_states(A, A_at + n * LANES)
        h_n = load_states(h, h_at + n * LANES)
        tensor = min(quad, 3)
        for begin in range(0, steps, span(steps)):
            end = min(begin + span(steps), steps)
            if DECAYS_FIRST:
                compute_decays(A, A_at + n * LANES, d_tile, decay_tile, begin, end, begin)
            for step in range(begin, end):
                if ahead is not None:
                    fetch(ahead, tensor, step)
                at = step * LANES
                here = entry + step * state + n
                drive = load(du_tile, at) * broadcast_states(B, here)
                if DECAYS_FIRST:
                    decay = load_states(decay_tile, (step - begin) * STATES * LANES)
                else:
                    decay = exp2(load(d_tile, at) * A_n)
                h_n = fma(decay, h_n, drive)
                store(u_tile, at, dot_states(h_n, broadcast_states(C, here), load(u_tile, at)))
        store(h, h_at + n * LANES, h_n)
    for n in range(quads * STATES, state):
        A_1 = load(A, A_at + n * LANES)
        h_1 = load(h, h_at + n * LANES)
        for step in range(steps):
            at = step * LANES
            here = entry + step * state + n
            h_1 = fma(exp2(load(d_tile, at) * A_1), h_1, load(du_tile, at) * broadcast(B, here))
            store(u_tile, at, fma(h_1, broadcast(C, here), load(u_tile, at)))
        store(h, h_at + n * LANES, h_1)


@inlined
def scan_tile_back(  # type: ignore
    A, A_at, bias, bias_at, D, D_at, starts, h_at, B, C, entry,
    gh, gh_at, gA, gA_at, sums, sums_at, gB_tile, gC_tile,
    u_tile, d_tile, du_tile, slope_tile, gy_tile, drive_tile, exponent_tile, decay_tile, kept_tile,
    ahead, use_softplus, state, steps, accumulate,
):  # fmt: skip
    """The gradients of a tile, from the state before it (starts) and the gradient of the one behind it (gh).

    gh becomes the gradient of the state before the tile, slope_tile that of delta, and gy_tile that of u.
    Added to are gA, without ln(2), and sums, with the gradients of the bias and, a vector on, of D; gB_tile
    and gC_tile are written, or added to with `accumulate`. `ahead` has the plan of five tensors and of
    nothing, or is None.
    """
    zero = splat(np.float32(0))
    one = splat(np.float32(1))
    bias_lanes = load(bias, bias_at)
    quads = state // STATES
    singles = state % STATES
    for step in range(steps):
        if ahead is not None:
            fetch(ahead, left_over(0, 2 * quads, 5), step)
            fetch(ahead, left_over(1, 2 * quads, 5), step)
            fetch(ahead, left_over(2, 2 * quads, 5), step)
            fetch(ahead, left_over(3, 2 * quads, 5), step)
            fetch(ahead, left_over(4, 2 * quads, 5), step)
        at = step * LANES
        d = load(d_tile, at) + bias_lanes
        slope = one
        if use_softplus:
            slope = logistic(d)
            d = softplus(d)
        store(d_tile, at, d)
        store(slope_tile, at, slope)
        store(du_tile, at, d * load(u_tile, at))
        store(drive_tile, at, zero)
        store(exponent_tile, at, zero)

    for quad in range(quads):
        n = quad * STATES
        A_n = load_states(A, A_at + n * LANES)
        h = load_states(starts, h_at + n * LANES)
        tensor = min(2 * quad, 5)
        for begin in range(0, steps, span(steps)):
            end = min(begin + span(steps), steps)
            if DECAYS_FIRST:
                compute_decays(A, A_at + n * LANES, d_tile, decay_tile, begin, end, 0)
            for step in range(begin, end):
                if ahead is not None:
                    fetch(ahead, tensor, step)
                at = step * LANES
                here = step * state + n
                if DECAYS_FIRST:
                    decay = load_states(decay_tile, at * STATES)
                else:
                    decay = exp2(load(d_tile, at) * A_n)
                    store(decay_tile, at * STATES, decay)
                kept = decay * h
                h = fma(load(du_tile, at), broadcast_states(B, entry + here), kept)
                store(kept_tile, at * STATES, kept)
                put(gC_tile, (step * quads + quad) * LANES, fold_states(load(gy_tile, at) * h), accumulate)
        gh_n = load_states(gh, gh_at + n * LANES)
        gA_n = load_states(gA, gA_at + n * LANES)
        tensor = min(2 * quad + 1, 5)
        for step in range(steps - 1, -1, -1):
            if ahead is not None:
                fetch(ahead, tensor, step)
            at = step * LANES
            here = step * state + n
            gh_n = fma(load(gy_tile, at), broadcast_states(C, entry + here), gh_n)
            gexponent = gh_n * load_states(kept_tile, at * STATES)
            gA_n = fma(gexponent, load(d_tile, at), gA_n)
            store(exponent_tile, at, dot_states(gexponent, A_n, load(exponent_tile, at)))
            drive = dot_states(gh_n, broadcast_states(B, entry + here), load(drive_tile, at))
            store(drive_tile, at, drive)
            put(gB_tile, (step * quads + quad) * LANES, fold_states(gh_n * load(du_tile, at)), accumulate)
            gh_n = gh_n * load_states(decay_tile, at * STATES)
        store(gh, gh_at + n * LANES, gh_n)
        store(gA, gA_at + n * LANES, gA_n)

    for n in range(quads * STATES, state):
        single = steps * quads + n - quads * STATES
        A_1 = load(A, A_at + n * LANES)
        h_1 = load(starts, h_at + n * LANES)
        for step in range(steps):
            at = step * LANES
            here = step * state + n
            decay_1 = exp2(load(d_tile, at) * A_1)
            kept_1 = decay_1 * h_1
            h_1 = fma(load(du_tile, at), broadcast(B, entry + here), kept_1)
            store(decay_tile, at, decay_1)
            store(kept_tile, at, kept_1)
            put(gC_tile, (single + step * singles) * LANES, load(gy_tile, at) * h_1, accumulate)
        gh_1 = load(gh, gh_at + n * LANES)
        gA_1 = load(gA, gA_at + n * LANES)
        for step in range(steps - 1, -1, -1):
            at = step * LANES
            here = step * state + n
            gh_1 = fma(load(gy_tile, at), broadcast(C, entry + here), gh_1)
            gexponent_1 = gh_1 * load(kept_tile, at)
            gA_1 = fma(gexponent_1, load(d_tile, at), gA_1)
            store(exponent_tile, at, fma(gexponent_1, A_1, load(exponent_tile, at)))
            store(drive_tile, at, fma(gh_1, broadcast(B, entry + here), load(drive_tile, at)))
            put(gB_tile, (single + step * singles) * LANES, gh_1 * load(du_tile, at), accumulate)
            gh_1 = gh_1 * load(decay_tile, at)
        store(gh, gh_at + n * LANES, gh_1)
        store(gA, gA_at + n * LANES, gA_1)

    ln_2 = splat(LN_2)
    D_lanes = load(D, D_at)
    gbias = load(sums, sums_at)
    gD = load(sums, sums_at + LANES)
    for step in range(steps):
        at = step * LANES
        u_t = load(u_tile, at)
        gy = load(gy_tile, at)
        drive_t = load(drive_tile, at)
        # A carries log2(e), which ln(2) takes out again.
        gdelta = fma(drive_t, u_t, load(exponent_tile, at) * ln_2) * load(slope_tile, at)
        store(slope_tile, at, gdelta)
        store(gy_tile, at, fma(drive_t, load(d_tile, at), gy * D_lanes))
        gbias = gbias + gdelta
        gD = fma(gy, u_t, gD)
    store(sums, sums_at, gbias)
    store(sums, sums_at + LANES, gD)
