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
    inlined,
    load,
    load_states,
    logistic,
    softplus,
    splat,
    store,
    sum_rows,
)


@inlined
def clear(array, size):  # type: ignore
    zero = splat(np.float32(0))
    for index in range(0, size, LANES):
        store(array, index, zero)


@inlined
def scan_tile(  # type: ignore
    A, A_at, bias, bias_at, D, D_at, h, h_at, B, C, entry, u_tile, d_tile, du_tile, use_softplus, state, steps
):
    """Runs all states from h, which becomes the state behind the tile; u_tile becomes y.

    d_tile comes in without its bias and softplus.
    """
    bias_lanes = load(bias, bias_at)
    D_lanes = load(D, D_at)
    for step in range(steps):
        at = step * LANES
        d = load(d_tile, at) + bias_lanes
        if use_softplus:
            d = softplus(d)
        u_t = load(u_tile, at)
        store(d_tile, at, d)
        store(du_tile, at, d * u_t)
        store(u_tile, at, D_lanes * u_t)
    # States outside, steps inside: A and h stay in registers, and exp2 of many steps overlap.
    quads_end = state // STATES * STATES
    for n in range(0, quads_end, STATES):
        A_n = load_states(A, A_at + n * LANES)
        h_n = load_states(h, h_at + n * LANES)
        for step in range(steps):
            at = step * LANES
            here = entry + step * state + n
            drive = load(du_tile, at) * broadcast_states(B, here)
            h_n = fma(exp2(load(d_tile, at) * A_n), h_n, drive)
            store(u_tile, at, dot_states(h_n, broadcast_states(C, here), load(u_tile, at)))
        store(h, h_at + n * LANES, h_n)
    for n in range(quads_end, state):
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
    use_softplus, state, steps,
):  # fmt: skip
    """The gradients of a tile, from the state before it (starts) and the gradient of the one behind it (gh).

    gh becomes the gradient of the state before the tile, slope_tile that of delta, and gy_tile that of u.
    Added to are gA, without ln(2); sums, with the gradients of the bias and, a vector on, of D; and gB_tile
    and gC_tile [step, state, lane].
    """
    zero = splat(np.float32(0))
    one = splat(np.float32(1))
    bias_lanes = load(bias, bias_at)
    for step in range(steps):
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

    quads_end = state // STATES * STATES
    for n in range(0, quads_end, STATES):
        A_n = load_states(A, A_at + n * LANES)
        h = load_states(starts, h_at + n * LANES)
        for step in range(steps):
            at = step * LANES
            here = step * state + n
            decay = exp2(load(d_tile, at) * A_n)
            kept = decay * h
            h = fma(load(du_tile, at), broadcast_states(B, entry + here), kept)
            store(decay_tile, at * STATES, decay)
            store(kept_tile, at * STATES, kept)
            store(gC_tile, here * LANES, fma(load(gy_tile, at), h, load_states(gC_tile, here * LANES)))
        gh_n = load_states(gh, gh_at + n * LANES)
        gA_n = load_states(gA, gA_at + n * LANES)
        for step in range(steps - 1, -1, -1):
            at = step * LANES
            here = step * state + n
            gh_n = fma(load(gy_tile, at), broadcast_states(C, entry + here), gh_n)
            gexponent = gh_n * load_states(kept_tile, at * STATES)
            gA_n = fma(gexponent, load(d_tile, at), gA_n)
            store(exponent_tile, at, dot_states(gexponent, A_n, load(exponent_tile, at)))
            drive = dot_states(gh_n, broadcast_states(B, entry + here), load(drive_tile, at))
            store(drive_tile, at, drive)
            store(gB_tile, here * LANES, fma(gh_n, load(du_tile, at), load_states(gB_tile, here * LANES)))
            gh_n = gh_n * load_states(decay_tile, at * STATES)
        store(gh, gh_at + n * LANES, gh_n)
        store(gA, gA_at + n * LANES, gA_n)

    for n in range(quads_end, state):
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
            store(gC_tile, here * LANES, fma(load(gy_tile, at), h_1, load(gC_tile, here * LANES)))
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
            store(gB_tile, here * LANES, fma(gh_1, load(du_tile, at), load(gB_tile, here * LANES)))
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


@inlined
def sum_lanes_of_entries(tile, sums, entries):  # type: ignore
    """sums[entry] = the sum of the lanes of tile[entry]; both have room for whole vectors."""
    for index in range(0, entries, LANES):
        store(sums, index, sum_rows(tile, index * LANES))
