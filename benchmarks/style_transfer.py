"""Times SaMam in its published size: the fast scan against a plain one, and the cost of a pixel.

    python benchmarks/style_transfer.py                          # 256 px: against the scan in plain PyTorch
    python benchmarks/style_transfer.py --sizes 256 512 1024 2048   # ms, cost per pixel and peak memory
    python benchmarks/style_transfer.py --model mamba-st --sizes 256 512

The style is encoded once, before; a run is one content. Contestants take turns within each repeat; figures
are medians. On one thread CPU time counts, which other programs on the machine disturb least; with more, wall
time. Set OMP_NUM_THREADS to the threads that you ask for. Freed memory is kept, as by the command line; with
--fresh-memory it goes back to the system.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambastyle.allocator import keep_freed_memory
from mambastyle.api import Stylizer, load_stylizer
from mambastyle.evaluation.memory import peak_memory
from mambastyle.models.mamba_st import MambaST, MambaSTConfig
from mambastyle.models.samam import SAMAM_PATCH4, SaMam, SaMamConfig
from mambastyle.ops import ss2d_scan
from peers import swapped

MODELS: dict[str, Callable[[], SaMam | MambaST]] = {
    "samam": lambda: SaMam(SaMamConfig()),
    "samam-patch4": lambda: SaMam(SAMAM_PATCH4),
    "mamba-st": lambda: MambaST(MambaSTConfig()),
}
# In plain PyTorch, a step at a time.
plain_scan = functools.partial(ss2d_scan, backend="reference")


def timed(run: Callable[[], Any], threads: int) -> float:
    """Seconds of one run: of the CPU on one thread, else on the wall."""
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    run()
    return clock() - started


def pictures(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(3, size, size, generator=generator) * 2 - 1 for _ in range(2))  # type: ignore


def against_plain(stylizer: Stylizer, size: int, repeats: int, threads: int) -> dict[str, float]:
    content, style = pictures(size)

    def run() -> Tensor:
        return stylizer.stylize(content, style, output="tensor")

    fast = run()  # compiles, and encodes the style
    with swapped(plain_scan):
        difference = float((run() - fast).abs().max())
    seconds: dict[str, list[float]] = {"fast": [], "plain": []}
    for _ in range(repeats):
        seconds["fast"].append(timed(run, threads))
        with swapped(plain_scan):
            seconds["plain"].append(timed(run, threads))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "fast_ms": 1e3 * medians["fast"],
        "plain_ms": 1e3 * medians["plain"],
        "ratio": medians["plain"] / medians["fast"],
        "largest_difference": difference,
    }


def cost(stylizer: Stylizer, size: int, repeats: int, threads: int) -> dict[str, float]:
    content, style = pictures(size)
    stylizer.style_code(style)

    def run() -> Tensor:
        return stylizer.stylize(content, style, output="tensor")

    with peak_memory(stylizer.device) as peak:
        run()
    seconds = statistics.median([timed(run, threads) for _ in range(repeats)])
    figures = {"ms": 1e3 * seconds, "ns_per_pixel": 1e9 * seconds / size**2}
    if peak.bytes is not None:
        figures |= {"peak_MB": peak.bytes / 1e6, "bytes_per_pixel": peak.bytes / size**2}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="samam", help=f"{', '.join(MODELS)} (random weights), or a preset")
    parser.add_argument("--sizes", type=int, nargs="+", help="cost by size, instead of the comparison")
    parser.add_argument("--size", type=int, default=256, help="of the comparison")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh-memory", action="store_true", help="do not keep freed memory")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    kept = not arguments.fresh_memory and keep_freed_memory()
    if arguments.model in MODELS:
        stylizer = Stylizer(MODELS[arguments.model](), name=arguments.model, device="cpu")
    else:
        stylizer = load_stylizer(arguments.model, device="cpu")
    report: dict[str, Any] = {"model": stylizer.name, "threads": arguments.threads}
    report["kept_memory"] = kept
    report["load_average"] = os.getloadavg()[0]
    stylizer.stylize(*pictures(64))
    if arguments.sizes:
        for size in arguments.sizes:
            report[str(size)] = cost(stylizer, size, arguments.repeats, arguments.threads)
    else:
        report[f"{arguments.size} px"] = against_plain(
            stylizer, arguments.size, arguments.repeats, arguments.threads
        )
    for name, value in report.items():
        figures = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{name:14}", *(f"{key} {figure:.4g}" if key else figure for key, figure in figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
