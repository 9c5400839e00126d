"""What a core can do at most, and how much of it the scan of 16 states does.

    OMP_NUM_THREADS=1 python benchmarks/bound.py

Chains of fma and of exp2 that stay in registers give operations a second. A state and step needs at least one
exp2 and, forwards, 4 operations as dear as an fma (exponent, drive, state, output); backwards with what is
computed again 12 more and another exp2 (kept state and state 2, gradients of state, C, B, A, step and drive).
Loads, stores, transposes and the step sizes are what lies between that bound and the scan. CPU time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mambastyle.ops.cpu_vectors import (
    LANES,
    STATES,
    exp2,
    fma,
    instruction_set,
    kernel,
    load_states,
    splat,
    store,
)
from scan import CONTESTANTS, SHAPES, make_inputs, passes

CHAINS = 3 * STATES * LANES  # numbers that go on at once: enough to hide every latency
# Where registers have 8 floats, twelve vectors of 16 do not fit into the sixteen there are: with four of them
# 28 G fma/s became 50. exp2 has so much to do with a number that it does not mind (and four are too few).
FIT = instruction_set()[1] == LANES
FMA_CHAINS = CHAINS if FIT else STATES * LANES
FORWARD, BACKWARD = (1, 4), (1, 12)  # exp2 and fma for a state and step


@kernel
def fma_chains(values, rounds):  # type: ignore
    half = splat(np.float32(0.5))
    a, b = load_states(values, 0), load_states(values, STATES * LANES)
    c = load_states(values, 2 * STATES * LANES)
    for _ in range(rounds):
        a = fma(half, a, a)
        if FIT:
            b, c = fma(half, b, b), fma(half, c, c)
    store(values, 0, a)
    store(values, STATES * LANES, b)
    store(values, 2 * STATES * LANES, c)


@kernel
def exp2_chains(values, rounds):  # type: ignore
    a, b = load_states(values, 0), load_states(values, STATES * LANES)
    c = load_states(values, 2 * STATES * LANES)
    for _ in range(rounds):
        a, b, c = exp2(a), exp2(b), exp2(c)
    store(values, 0, a)
    store(values, STATES * LANES, b)
    store(values, 2 * STATES * LANES, c)


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """The median of one call's CPU time."""
    run()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 1_000_000

    def per_second(chains: Callable[..., object], numbers: int) -> float:
        values = np.zeros(CHAINS, np.float32)
        return numbers * rounds / cpu_seconds(lambda: chains(values, rounds), arguments.repeats)

    fmas, exps = per_second(fma_chains, FMA_CHAINS), per_second(exp2_chains, CHAINS)

    def bound(*parts: tuple[int, int]) -> float:
        return 1 / sum(exp / exps + fma / fmas for exp, fma in parts)

    bounds = {"forward": bound(FORWARD), "forward+backward": bound(FORWARD, BACKWARD)}
    report: dict[str, object] = {
        "instructions": instruction_set()[0],
        "G fma/s": fmas / 1e9,
        "G exp2/s": exps / 1e9,
    }
    print(*(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in report.items()))
    for name in ("S2", "S3"):
        shape = SHAPES[name]
        runs = passes(CONTESTANTS["numba"], make_inputs(shape, "cpu"))
        work = shape.batch * shape.groups * shape.group * shape.length * shape.state
        for kind, most in bounds.items():
            rate = work / cpu_seconds(runs[kind], arguments.repeats)
            figures = {"G state-steps/s": rate / 1e9, "bound": most / 1e9, "share": rate / most}
            report[f"{name} {kind}"] = figures
            print(f"{name} {kind:17}", *(f"{key} {value:.3g}" for key, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
