"""Times the fused scan of a grid, and a training step of the model that is built on it.

    python benchmarks/ss2d.py                      # ss2d_scan against the scan of four reordered copies
    python benchmarks/ss2d.py --only fused published    # against PyTorch alone, forward
    python benchmarks/ss2d.py --step               # encoder and fuser of KAOKORE64, forward and backward
    python benchmarks/ss2d.py --device cuda        # the scan on a GPU

Contestants take turns within each repeat, in one process with one thread count; figures are medians. Set
OMP_NUM_THREADS to the threads that you ask for. On one thread CPU time counts, which other programs on the
machine disturb least; with more, wall time.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambastyle.models.mambastyle import KAOKORE64, Encoder, Fuser
from mambastyle.ops import cross_paths, selective_scan, ss2d_scan
from peers import published_ss2d
from scan import seconds


class Shape(NamedTuple):
    batch: int
    height: int
    width: int
    channels: int
    rank: int
    state: int


SHAPES = {
    "kaokore64": Shape(16, 32, 32, 64, 4, 8),  # the finest map of the small model's training
    "paper": Shape(1, 64, 64, 1024, 32, 16),  # the finest map of the paper's encoder
    "one-state": Shape(1, 64, 64, 256, 8, 1),
    "large": Shape(1, 256, 256, 128, 4, 16),
}


def cross_copies(x: Tensor, height: int, width: int) -> Tensor:
    """The four orders of (batch, entries, length): (batch, 4, entries, length)."""
    columns = x.unflatten(-1, (height, width)).transpose(-1, -2).flatten(-2)
    forward = torch.stack((x, columns), 1)
    return torch.cat((forward, forward.flip(-1)), 1)


def unfused(u, dt_low, dt_weight, A, B, C, D, dt_bias, height, width) -> Tensor:  # type: ignore
    """Four reordered copies, step sizes for all of them, `selective_scan`, and the merge."""

    def ordered(x: Tensor) -> Tensor:  # (batch, length, 4, entries) -> (batch, 4, entries, length)
        x = x.permute(0, 2, 3, 1)
        columns = x[:, 1::2].unflatten(-1, (height, width)).transpose(-1, -2).flatten(-2)
        return torch.stack((x[:, 0], columns[:, 0], x[:, 2].flip(-1), columns[:, 1].flip(-1)), 1)

    steps = torch.matmul(dt_weight, ordered(dt_low)).flatten(1, 2)
    y = selective_scan(
        cross_copies(u.transpose(1, 2), height, width).flatten(1, 2),
        steps,
        A.flatten(0, 1),
        ordered(B),
        ordered(C),
        D.flatten(),
        delta_bias=dt_bias.flatten(),
        delta_softplus=True,
    )
    assert isinstance(y, Tensor)
    y = y.unflatten(1, (4, -1))
    y = y[:, :2] + y[:, 2:].flip(-1)
    merged = y[:, 0] + y[:, 1].unflatten(-1, (width, height)).transpose(-1, -2).flatten(-2)
    return merged.transpose(1, 2).contiguous()


def fused(*inputs: Any) -> Tensor:
    *tensors, height, width = inputs
    return ss2d_scan(*tensors, cross_paths(height, width, device=tensors[0].device))  # type: ignore


def published(*inputs: Any) -> Tensor:
    """VMamba's PyTorch route; its backward pass costs O(length^2), so that only its forward pass is timed."""
    *tensors, height, width = inputs
    return published_ss2d(*tensors, cross_paths(height, width))


def make_inputs(shape: Shape, device: str) -> list[Tensor]:
    """Steps of about 0.05 and decays like Mamba's at the start of training."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width, channels, rank, state = shape
    length = height * width

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    tensors = [normal(batch, length, channels), normal(batch, length, 4, rank)]
    tensors += [0.5 * rank**-0.5 * normal(4, channels, rank)]
    tensors += [-torch.arange(1.0, state + 1).repeat(4, channels, 1)]
    tensors += [normal(batch, length, 4, state), normal(batch, length, 4, state)]
    tensors += [torch.ones(4, channels), torch.full((4, channels), -3.0)]
    return [x.to(device).requires_grad_() for x in tensors]


SCANS: dict[str, Callable[..., Tensor]] = {"fused": fused, "unfused": unfused, "published": published}


def passes(scan: Callable[..., Tensor], shape: Shape, inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].device)
    grid = shape.height, shape.width

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(*inputs, *grid)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scan(*inputs, *grid), inputs, weights)

    return {"forward": forward, "forward+backward": both}


def training_step(batch: int) -> Callable[[], None]:
    """Encoder and fuser of KAOKORE64 forwards and backwards under bfloat16 autocast."""
    torch.manual_seed(0)
    encoder, fuser = Encoder(KAOKORE64), Fuser(KAOKORE64)
    image = torch.randn(batch, 3, KAOKORE64.image_size, KAOKORE64.image_size)
    direction = 0.3 * torch.randn(batch, KAOKORE64.num_ws, KAOKORE64.w_dim)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            ws, feature = encoder(image)
            fused = fuser(feature, direction)
        (ws.float().square().mean() + fused.float().square().mean()).backward()

    return step


def measure(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    for run in runs.values():
        run()  # compiles, and fills caches
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            for times, taken in zip((wall, cpu), seconds(run, device), strict=True):
                times[name].append(1e3 * taken)
    return {
        name: {
            "cpu_ms": statistics.median(cpu[name]),
            "cpu_ms_min": min(cpu[name]),
            "wall_ms": statistics.median(wall[name]),
        }
        for name in runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", action="store_true", help="the training step instead of the scan")
    parser.add_argument("--batch", type=int, default=16, help="of the training step")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--only", nargs="+", choices=list(SCANS), default=["fused", "unfused"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the scan")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"threads": arguments.threads, "load_average": os.getloadavg()[0]}

    def note(label: str, figures: dict[str, dict[str, float]]) -> None:
        report[label] = figures
        for name, figure in figures.items():
            print(f"{label:28} {name:8}", *(f"{key} {value:.4g}" for key, value in figure.items()))

    if arguments.step:
        note("kaokore64 step", measure({"step": training_step(arguments.batch)}, arguments.repeats, "cpu"))
    else:
        for name in arguments.shapes:
            inputs = make_inputs(SHAPES[name], arguments.device)
            kinds = {scan: passes(SCANS[scan], SHAPES[name], inputs) for scan in arguments.only}
            for kind in ("forward", "forward+backward"):
                timed = [scan for scan in arguments.only if kind == "forward" or scan != "published"]
                runs = {scan: kinds[scan][kind] for scan in timed}
                note(f"{name} {kind}", measure(runs, arguments.repeats, arguments.device))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
