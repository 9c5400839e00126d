"""Times whole models: milliseconds, where they go, and the same model with the scan as published.

    python benchmarks/models.py                       # the four cases, one picture each
    python benchmarks/models.py --cases kaokore64 --no-published
    python benchmarks/models.py --compile             # torch.compile beside it: a minute to compile, and g++
    python benchmarks/models.py --train               # training steps, pictures per second

"contiguous" is ours with weights laid out channel by channel, as PyTorch makes them; "bf16" ours with
precision="bf16", and "levels" how far its picture lies from float32's in the mean, of 255.
"published": the four orders copied, exp(delta A) made for all steps, a loop in PyTorch (`peers.py`); training
compares with our plain PyTorch backend instead, since the published loop's backward pass is quadratic.
Contestants take turns within each repeat; figures are medians of wall time, so let nothing else run. Weights
are random but for kaokore64's. Freed memory is kept, as by the command line, for all contestants. Shares are
the operators' own times by PyTorch's profiler, of the median of runs without it (it adds some 3 us to each
operator's call, but little to its own time); what they leave (Python, and waiting) counts as rest.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mambastyle.allocator import keep_freed_memory
from mambastyle.api import Inverter, Stylizer, load_inverter
from mambastyle.compute import Precision
from mambastyle.evaluation.cost import GENERATORS
from mambastyle.latents.directions import Direction, Directions
from mambastyle.models.mamba_st import MambaST, MambaSTConfig
from mambastyle.models.mambastyle import CONFIGS, MambaStyle
from mambastyle.models.samam import SaMam, SaMamConfig
from mambastyle.models.stylegan2 import Generator
from mambastyle.ops import ss2d_scan
from mambastyle.training.config import read_run_file
from mambastyle.training.inversion import InversionConfig, InversionTask
from mambastyle.training.random import StepRandom
from mambastyle.training.style_transfer import StyleTransferConfig, StyleTransferTask
from peers import published_ss2d, swapped

ROOT = Path(__file__).parents[1]
Run = Callable[[], Any]


class Setting(NamedTuple):
    """How a model computes."""

    precision: Precision = "fp32"
    layout: torch.memory_format = torch.channels_last
    compiled: bool = False


def random_picture(size: int, seed: int = 0) -> Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def editing(inverter: Inverter, direction: str, setting: Setting) -> Run:
    """One picture inverted, edited and rendered."""
    picture = random_picture(inverter.resolution)
    inverter.model.to(memory_format=setting.layout)  # type: ignore[call-overload]
    inverter.generator.to(memory_format=setting.layout)  # type: ignore[call-overload]
    if setting.compiled:
        for network in (inverter.model.encoder, inverter.model.fuser, inverter.generator.synthesis):
            if network is not None:
                network.compile()

    def run() -> Tensor:
        edited = inverter.edit(inverter.invert(picture), {direction: 1.0})
        return inverter.render(edited, output="tensor")

    return run


def kaokore64(setting: Setting) -> Run:
    inverter = load_inverter("kaokore64", device="cpu", precision=setting.precision)
    return editing(inverter, next(iter(inverter.directions)), setting)


def faces1024(setting: Setting) -> Run:
    torch.manual_seed(0)
    generator = Generator(GENERATORS["faces1024"])
    size, count = generator.config.w_dim, generator.config.num_ws
    directions = Directions([Direction.from_w("smile", torch.randn(size) / size**0.5, count)])
    model = MambaStyle(CONFIGS["faces1024"])
    inverter = Inverter(model, generator, directions, device="cpu", precision=setting.precision)
    return editing(inverter, "smile", setting)


def stylizing(make: Callable[[], SaMam | MambaST], size: int, setting: Setting) -> Run:
    """One content in a style that is known already."""
    torch.manual_seed(0)
    stylizer = Stylizer(make(), device="cpu", precision=setting.precision)
    network: Any = stylizer.network.to(memory_format=setting.layout)  # type: ignore[call-overload]
    if setting.compiled:
        network.transfer, network.paint = torch.compile(network.transfer), torch.compile(network.paint)
    content, style = random_picture(size), random_picture(size, seed=1)

    def run() -> Tensor:
        return stylizer.stylize(content, style, output="tensor")

    return run


CASES: dict[str, tuple[str, Callable[[Setting], Run]]] = {
    "kaokore64": ("invert and edit, 64 px", kaokore64),
    "samam": ("512 px, patch 8", lambda setting: stylizing(lambda: SaMam(SaMamConfig()), 512, setting)),
    "mamba-st": ("256 px", lambda setting: stylizing(lambda: MambaST(MambaSTConfig()), 256, setting)),
    "faces1024": ("invert and edit, 1024 px", faces1024),
}
TRAININGS = {
    "inversion-kaokore64": (InversionConfig, InversionTask, {}),
    "samam-small": (StyleTransferConfig, StyleTransferTask, {"start": None}),
}


def training(name: str) -> tuple[Run, int]:
    """A step of a preset's recipe, and its batch."""
    config_type, task_type, changes = TRAININGS[name]
    os.chdir(ROOT)
    config: Any = read_run_file(ROOT / "recipes" / f"{name}.yaml", config_type, changes)
    task: Any = task_type(config, torch.device("cpu"))
    steps = iter(range(10**6))

    def run() -> None:
        random = StepRandom(0, next(steps), config.batch)
        for player in task.players:
            player.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                terms = player.terms(random)
            torch.stack([player.weights[key] * term.float() for key, term in terms.items()]).sum().backward()
            player.optimizer.step()

    return run, config.batch


def seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(contestants: dict[str, Run], repeats: int) -> dict[str, float]:
    """Medians of seconds, by contestant; after a warm-up each, and a slow one does not run often."""
    times: dict[str, list[float]] = {}
    for name, run in contestants.items():
        warm = seconds(run)
        times[name] = [warm] if warm > 20 else []
    for _ in range(repeats):
        for name, run in contestants.items():
            if len(times[name]) * max(times[name], default=0) < 20:
                times[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in times.items()}


def with_scan(scan: Callable[..., Tensor], run: Run) -> Run:
    """The same with another scan of grids."""

    def swapped_run() -> Any:
        with swapped(scan):
            return run()

    return swapped_run


def shares(run: Run, whole: float) -> dict[str, Any]:
    """Where the `whole` seconds of a run go: products, the scan, the rest and its largest."""
    run()
    whole *= 1e6
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    products = ("mm", "conv", "linear", "onednn", "mkldnn")
    sums, rest = {"products": 0.0, "scan": 0.0}, {}
    for event in profiler.key_averages():
        if event.key.startswith("mambastyle::"):
            sums["scan"] += event.self_cpu_time_total
        elif event.key.startswith("aten::") and any(word in event.key for word in products):
            sums["products"] += event.self_cpu_time_total
        elif event.key.startswith("aten::"):
            rest[event.key.removeprefix("aten::")] = event.self_cpu_time_total / whole
    found: dict[str, Any] = {name: value / whole for name, value in sums.items()}
    found["rest"] = 1 - sum(found.values())
    largest = sorted(rest, key=lambda name: -rest[name])[:4]
    return found | {"of the rest": ", ".join(f"{name} {rest[name]:.3f}" for name in largest)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="training steps instead")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *TRAININGS], help="default: all of the kind")
    parser.add_argument("--no-published", action="store_true", help="time and shares of ours alone")
    parser.add_argument("--compile", action="store_true", help="torch.compile with frozen weights as well")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.compile:
        torch._inductor.config.freezing = True
    report: dict[str, Any] = {"threads": arguments.threads, "load_average": os.getloadavg()[0]}
    for name in arguments.cases or (TRAININGS if arguments.train else CASES):
        figures: dict[str, Any] = {}
        if name in TRAININGS:
            what = "training step"
            run, batch = training(name)
            contestants = {"ours": run}
            others = {"plain": with_scan(functools.partial(ss2d_scan, backend="reference"), run)}
        else:
            (what, make), batch = CASES[name], 1
            run = make(Setting())
            contestants = {"ours": run, "bf16": make(Setting(precision="bf16"))}
            if arguments.compile:
                contestants["compiled"] = make(Setting(compiled=True))
                contestants["compiled"]()  # compiles, which is no part of a run
            contestants["contiguous"] = make(Setting(layout=torch.contiguous_format))
            others = {"published": with_scan(published_ss2d, run)}
            apart = (run() - contestants["bf16"]()).abs().mean().item()
            figures["levels"] = apart * 255 / 2  # pictures are in [-1, 1]
        if not arguments.no_published:
            contestants |= others
        times = in_turns(contestants, arguments.repeats)
        for contestant, taken in times.items():
            figures[f"{contestant}_ms"] = 1e3 * taken
            figures[f"{contestant}_pictures_per_second"] = batch / taken
            if contestant != "ours":
                figures[f"{contestant}_over_ours"] = taken / times["ours"]
        figures |= shares(run, times["ours"])
        report[name] = {"what": what, **figures}
        print(name, what, *(f"{k} {v:.4g}" if isinstance(v, float) else f"({v})" for k, v in figures.items()))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
