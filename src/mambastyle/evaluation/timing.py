"""What ways to invert cost on a machine: time and peak memory, each in a process of its own."""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mambastyle.api import load_inverter
from mambastyle.api.inputs import find_device
from mambastyle.api.methods import MethodName
from mambastyle.compute import Precision, check_precision
from mambastyle.evaluation.inversion import TITLES, Method
from mambastyle.evaluation.memory import peak_memory
from mambastyle.evaluation.table import Table

COLUMNS = {
    "method": "method",
    "steps": "steps",
    "parameters": "M parameters",
    "gmacs": "GMACs",
    "milliseconds": "ms, one picture",
    "milliseconds_batch": "ms per picture, batch",
    "memory": "peak memory, MiB",
}


def run(
    model: str | Path,
    ways: Sequence[tuple[MethodName, int | None]],
    *,
    batch: int = 16,
    repeats: int = 5,
    device: str | None = None,
    precision: Precision = "fp32",
) -> Table:
    """A row per way to invert with one model.

    Times are medians over `repeats` after a warm-up (an optimiser: one run); memory is what inverting a batch
    adds to the process, weights included.
    """
    precision = check_precision(precision, find_device(device))
    table = Table(
        f"Cost of inverting and rendering with {Path(model).name}, batch {batch}, "
        f"{torch.get_num_threads()} threads, {precision}",
        COLUMNS,
        notes=[
            "M parameters, GMACs (the paper's rule): with the generator; of a method without an encoder the"
            " generator's, one pass.",
            f"times: medians of {repeats} after a warm-up (methods that optimise: of one run).",
            "peak memory: of a fresh process, less what it held before the model was loaded (on CPUs: Linux"
            " alone).",
        ],
    )
    for how, steps in ways:
        # A fresh process each: the peak of a process never falls.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            row = pool.submit(measure, str(model), how, steps, batch, repeats, device, precision).result()
        table.rows.append({"method": TITLES[how], "steps": steps, **row})
    return table


def measure(
    model: str,
    how: MethodName,
    steps: int | None,
    batch: int,
    repeats: int,
    device: str | None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """One row, in this process."""
    times = []
    with peak_memory(find_device(device)) as peak:
        inverter = load_inverter(model, device=device, precision=precision, batch_size=batch)
        method = Method(TITLES[how], inverter, how, steps)
        side = inverter.resolution
        pictures = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        if not method.optimises:
            method.render(method.invert(pictures))
        for part in (pictures, pictures[:1]):
            times.append(_median(method, part, 1 if method.optimises else repeats))
    cost = method.cost()
    return {
        "parameters": cost.parameters / 1e6,
        "gmacs": cost.paper_macs / 1e9,
        "milliseconds": times[1],
        "milliseconds_batch": times[0] / batch,
        "memory": None if peak.bytes is None else peak.bytes / 2**20,
    }


def _median(method: Method, pictures: torch.Tensor, repeats: int) -> float:
    """Milliseconds; rendering ends on the CPU, so the device is done."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        method.render(method.invert(pictures))
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]
