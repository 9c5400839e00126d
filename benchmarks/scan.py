"""Times the selective scan against `mambapy` and the published reference, and writes the figures as JSON.

    python benchmarks/scan.py --json scan.json          # S1-S5, a few minutes
    python benchmarks/scan.py --quick                   # S1 and S2, under a minute
    python benchmarks/scan.py --device cuda             # Triton, and mamba-ssm where it is installed
    python benchmarks/scan.py --scaling 2               # ours on two threads against one, in turns

On a GPU times are those between two events on the device, and memory is PyTorch's peak of allocations.

Contestants take turns within each repeat, in one process with one thread count, and medians are compared. A
turn is two calls: the first finds caches full of what the contestant before left there, for the second they
hold its own data and code, as they do when calls follow each other. Ratios are given for both; short scans
differ much. On one thread they are of CPU time, which other programs on the machine disturb least; with more,
of wall time.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mambastyle.allocator import keep_freed_memory
from mambastyle.evaluation.memory import peak_memory
from mambastyle.ops import selective_scan
from peers import published


class Shape(NamedTuple):
    batch: int
    groups: int
    group: int
    length: int
    state: int


SHAPES = {
    "S1": Shape(1, 4, 192, 1024, 1),
    "S2": Shape(1, 4, 512, 1024, 16),
    "S3": Shape(1, 4, 256, 4096, 16),
    "S4": Shape(4, 4, 96, 4096, 16),
    "S5": Shape(1, 4, 192, 65536, 16),
}
# Peers hold (batch, channels, length, state) tensors, some ten of them with gradients; above this they are
# left out.
PEER_ELEMENTS = 80_000_000
PACKAGES = ("torch", "numba", "numpy", "triton", "mambapy", "mamba_ssm")
OURS = {"cpu": "numba", "cuda": "triton"}  # what the others are compared with

Scan = Callable[..., Tensor]


def mambapy(u, delta, A, B, C, D, delta_bias) -> Tensor:  # type: ignore
    """mambapy's parallel scan on the steps of its `MambaBlock.selective_scan`, groups in the place of
    images.
    """
    from mambapy.pscan import pscan

    batch, groups, state, length = B.shape

    def tokens_first(x: Tensor) -> Tensor:  # (batch * groups, length, group)
        return x.reshape(batch * groups, -1, length).transpose(1, 2)

    delta = F.softplus(delta + delta_bias[:, None])
    delta, x = tokens_first(delta), tokens_first(u)
    A = A.view(1, groups, 1, -1, state).expand(batch, -1, -1, -1, -1).reshape(batch * groups, 1, -1, state)
    B, C = (y.reshape(batch * groups, state, length).transpose(1, 2) for y in (B, C))
    h = pscan(torch.exp(delta.unsqueeze(-1) * A), delta.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1))
    y = (h @ C.unsqueeze(-1)).squeeze(3)
    return y.transpose(1, 2).reshape(u.shape) + D[:, None] * u


def by_backend(backend: str) -> Scan:
    def scan(u, delta, A, B, C, D, delta_bias):  # type: ignore
        return selective_scan(u, delta, A, B, C, D, None, delta_bias, True, backend=backend)

    return scan


def mamba_ssm(u, delta, A, B, C, D, delta_bias) -> Tensor:  # type: ignore
    """The published CUDA kernel, where somebody has built it."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore

    return selective_scan_fn(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


CONTESTANTS: dict[str, Scan] = {
    "numba": by_backend("numba"),
    "triton": by_backend("triton"),
    "mamba-ssm": mamba_ssm,
    "reference": by_backend("reference"),
    "mambapy": mambapy,
    "published": published,
}


def make_inputs(shape: Shape, device: str) -> list[Tensor]:
    """Steps of about 0.05 and decays like Mamba's at the start of training."""
    generator = torch.Generator().manual_seed(0)
    batch, groups, group, length, state = shape
    channels = groups * group

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    A = -torch.arange(1.0, state + 1).repeat(channels, 1)
    tensors = [normal(batch, channels, length), 0.5 * normal(batch, channels, length), A]
    tensors += [normal(batch, groups, state, length), normal(batch, groups, state, length)]
    tensors += [torch.ones(channels), torch.full((channels,), -3.0)]
    return [x.to(device).requires_grad_() for x in tensors]


def passes(scan: Scan, inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].device)

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scan(*inputs), inputs, weights)

    return {"forward": forward, "forward+backward": both}


def contestants(name: str, kind: str, device: str, only: list[str] | None) -> list[str]:
    shape = SHAPES[name]
    elements = shape.batch * shape.groups * shape.group * shape.length * shape.state
    names = [OURS[device]]
    if device == "cuda" and importlib.util.find_spec("mamba_ssm") is not None:
        names.append("mamba-ssm")
    if elements <= 10 * PEER_ELEMENTS and name != "S5":
        names.append("reference")
    if elements <= PEER_ELEMENTS or (kind == "forward" and name == "S4"):
        names.append("mambapy")
    if elements <= PEER_ELEMENTS and kind == "forward":
        names.append("published")
    return [name for name in names if only is None or name in only]


def peak_extra_bytes(run: Callable[[], Any], device: str) -> int | None:
    """How far memory rises above where it stood before the call."""
    gc.collect()
    with peak_memory(torch.device(device)) as peak:
        run()
    return peak.bytes


def seconds(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall and CPU time of one call; on a GPU the time between two events on it, for both."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return (start.elapsed_time(end) / 1e3,) * 2
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall_start, time.process_time() - cpu_start


def measure(
    name: str, kind: str, repeats: int, device: str, only: list[str] | None
) -> dict[str, dict[str, float | None]]:
    inputs = make_inputs(SHAPES[name], device)
    runs = {peer: passes(CONTESTANTS[peer], inputs)[kind] for peer in contestants(name, kind, device, only)}
    firsts: dict[str, list[tuple[float, float]]] = {peer: [] for peer in runs}
    times: dict[str, list[tuple[float, float]]] = {peer: [] for peer in runs}
    memory = {}
    for peer, run in runs.items():
        run()  # compiles, and fills caches
        memory[peer] = peak_extra_bytes(run, device)
    for repeat in range(repeats):
        for peer, run in runs.items():
            if repeat >= 3 and min(times[peer])[0] > 3:  # a slow peer does not need many
                continue
            firsts[peer].append(seconds(run, device))
            times[peer].append(seconds(run, device))
    figures = {}
    for peer in runs:
        wall, cpu = zip(*times[peer], strict=True)
        first_wall, first_cpu = zip(*firsts[peer], strict=True)
        figures[peer] = {
            "wall_ms": 1e3 * statistics.median(wall),
            "cpu_ms": 1e3 * statistics.median(cpu),
            "cpu_ms_min": 1e3 * min(cpu),
            "first_wall_ms": 1e3 * statistics.median(first_wall),
            "first_cpu_ms": 1e3 * statistics.median(first_cpu),
            "repeats": len(wall),
            "peak_extra_mb": None if memory[peer] is None else memory[peer] / 1e6,
        }
    return figures


def scaling(name: str, kind: str, repeats: int, threads: int) -> dict[str, float]:
    """Wall time of our scan on one thread and on several, which take turns as contestants do."""
    run = passes(CONTESTANTS[OURS["cpu"]], make_inputs(SHAPES[name], "cpu"))[kind]
    times: dict[int, list[float]] = {1: [], threads: []}
    for _ in range(repeats):
        for count, found in times.items():
            torch.set_num_threads(count)
            run()
            found.append(seconds(run, "cpu")[0])
    one, several = (statistics.median(found) for found in times.values())
    ratios = [alone / together for alone, together in zip(*times.values(), strict=True)]
    return {
        "one_ms": 1e3 * one,
        "several_ms": 1e3 * several,
        "ratio": one / several,
        "median_of_ratios": statistics.median(ratios),
        "ratio_of_the_least": min(times[1]) / min(times[threads]),
    }


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "processor": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES if importlib.util.find_spec(package)},
        "commit": git.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="S1 and S2, three repeats")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: all")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="default: all that fit")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--scaling", type=int, metavar="THREADS", help="nothing but our scan, on THREADS against one"
    )
    parser.add_argument("--device", choices=list(OURS), default="cpu")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="all contestants: ms.keep_freed_memory(), as the command line",
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    if arguments.scaling is not None and (arguments.scaling < 2 or arguments.device != "cpu"):
        parser.error("--scaling takes 2 threads or more, and the CPU")
    torch.set_num_threads(arguments.threads)
    kept = arguments.keep_memory and keep_freed_memory()
    repeats = 3 if arguments.quick else arguments.repeats
    clock = "cpu_ms" if arguments.threads == 1 else "wall_ms"
    first = f"first_{clock}"
    ours = OURS[arguments.device]
    report = {
        "command": " ".join(sys.argv),
        "threads": arguments.threads,
        "ratios_of": clock,
        "kept_memory": kept,
        "machine": machine(),
    }
    results: dict[str, Any] = {}
    report["results"] = results
    for name in ["S1", "S2"] if arguments.quick else arguments.shapes or list(SHAPES):
        results[name] = {"shape": SHAPES[name]._asdict()}
        for kind in ("forward", "forward+backward"):
            if arguments.scaling:
                results[name][kind] = scaling(name, kind, repeats, arguments.scaling)
                print(f"{name} {kind:17}", *(f"{k} {v:.4g}" for k, v in results[name][kind].items()))
                continue
            figures: dict[str, Any] = measure(name, kind, repeats, arguments.device, arguments.only)
            for peer, figure in figures.items():
                if ours in figures:
                    figure[f"times_{ours}"] = figure[clock] / figures[ours][clock]
                    figure[f"first_times_{ours}"] = figure[first] / figures[ours][first]
                print(
                    f"{name} {kind:17} {peer:10}",
                    *(f"{k} {v:.4g}" for k, v in figure.items() if v is not None),
                )
            results[name][kind] = figures
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
