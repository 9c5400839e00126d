"""One real training step, and one real inversion and edit, of a full-size model with random weights.

    python benchmarks/full_size.py --config faces1024 cars512 --json out.json
    python benchmarks/full_size.py --config faces256 --steps 10       # ten steps, killed in the middle, go on

No published weights are here: generator, encoder, fuser and judges are random, which changes no time and no
memory. Each part runs in a process of its own, so that its peak is its own; times are of the wall and of the
processor. `--steps N` trains N steps, kills such a run without warning, lets it go on, and compares.
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", default=["faces1024", "cars512"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="train so many steps, kill, go on, compare")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--no-judges", action="store_true", help="leave LPIPS, ArcFace and face parsing out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", nargs=3, metavar=("PART", "FOLDER", "CONFIG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        print(json.dumps(PARTS[arguments.part[0]](Path(arguments.part[1]), arguments.part[2], arguments)))
        return 0
    results = {}
    for name in arguments.config:
        with tempfile.TemporaryDirectory() as folder:
            parts = ["weights", "train"] if arguments.steps else ["weights", "step", "edit"]
            for part in parts:
                found = run(part, folder, name)
                results[f"{name} {part}"] = found
                print(name, part, json.dumps(found), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def run(part: str, folder: str, name: str) -> dict[str, Any]:
    """A part in a process of its own; what it found, with its peak of memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, folder, name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measured(work: Any) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_GiB": round(peak, 2),
    }


def make_weights(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The files that the recipe names, with random numbers in them."""
    import torch

    from mambastyle import checkpoints
    from mambastyle.evaluation.cost import GENERATORS
    from mambastyle.features.face_parsing import FaceParsingUNet
    from mambastyle.features.identity import ArcFace
    from mambastyle.features.lpips import LPIPS
    from mambastyle.latents.directions import Direction, Directions
    from mambastyle.models.stylegan2 import Generator

    torch.manual_seed(0)
    weights = folder / "weights"
    weights.mkdir()
    generator = Generator(GENERATORS[name])
    tensors = {f"generator.{key}": value for key, value in generator.state_dict().items()}
    config = generator.config
    sha = checkpoints.save(weights / "generator.safetensors", tensors, kind="stylegan2", config=config)
    direction = Direction.from_w("smile", torch.randn(config.w_dim) / config.w_dim**0.5, config.num_ws)
    Directions([direction], generator=sha).save(weights / "directions.safetensors")
    lpips = {re.sub(r"^linear\.(\d)", r"lin\1.model.1", k): v for k, v in LPIPS("alex").state_dict().items()}
    torch.save({k: v.abs() for k, v in lpips.items() if k[:3] == "lin"}, weights / "lpips_alex.pth")
    torch.save({k: v for k, v in lpips.items() if k[:3] != "lin"}, weights / "alexnet-owt-7be5be79.pth")
    torch.save(FaceParsingUNet().state_dict(), weights / "face_parsing_unet.pth")
    arcface = {
        re.sub(
            r"^(body\.\d+)\.shortcut\.", r"\1.shortcut_layer.", re.sub(r"\.residual\.", ".res_layer.", k)
        ): v
        for k, v in ArcFace().state_dict().items()
    }
    torch.save(arcface, weights / "model_ir_se50.pth")
    return {"files": sorted(path.name for path in weights.iterdir())}


def read(folder: Path, name: str, arguments: argparse.Namespace, /, **changes: Any) -> Any:
    """The recipe as it is, but for batch, length and precision."""
    from mambastyle.training.config import read_run_file
    from mambastyle.training.inversion import InversionConfig

    os.chdir(folder)
    values = {"batch": arguments.batch, "accumulate": 1, "steps": 1, "precision": arguments.precision}
    values |= {"output": str(folder / "runs"), "gradient_checkpointing": True}
    if arguments.no_judges:
        values |= {"weights.perceptual": 0, "weights.identity": 0, "weights.structure": 0}
    return read_run_file(ROOT / "recipes" / f"{name}.yaml", InversionConfig, values | changes)


def step(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All terms of the published loss, backward, the optimiser."""
    import torch

    from mambastyle.training.inversion import InversionTask
    from mambastyle.training.random import StepRandom

    torch.set_num_threads(arguments.threads)
    config = read(folder, name, arguments)
    task = InversionTask(config, torch.zeros(0).device)
    (player,) = task.players
    terms: dict[str, Any] = {}

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            terms.update(player.terms(StepRandom(0, 0, config.batch)))
        torch.stack([player.weights[key] * term.float() for key, term in terms.items()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(player.parameters, 1.0)
        player.optimizer.step()

    found = measured(work)
    values = {key: round(float(term.detach()), 4) for key, term in terms.items()}
    return found | {"batch": config.batch, "terms": values}


def edit(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """From a picture to an edited one, through the facade."""
    import torch

    import mambastyle as ms
    from mambastyle import checkpoints
    from mambastyle.models.mambastyle import CONFIGS, MambaStyle

    torch.set_num_threads(arguments.threads)
    config = CONFIGS[name]
    torch.manual_seed(1)
    weights = folder / "weights"
    model = MambaStyle(config)
    checkpoints.save(weights / "inversion.safetensors", model.state_dict(), kind="mambastyle", config=config)
    del model
    inverter = ms.load(weights, device="cpu")
    height, width = config.frame or (inverter.resolution, inverter.resolution)
    picture = torch.rand(3, height, width) * 2 - 1
    shapes: list[Any] = []

    def work() -> None:
        edited = inverter.edit(inverter.invert(picture), {"smile": 1.0})
        shapes.append(list(inverter.render(edited, output="tensor").shape))

    first = measured(work)
    again = measured(work)
    # The first call also compiles the scan's kernels, or reads them from the disk.
    return again | {"first_seconds": first["seconds"], "picture": shapes[-1]}


def train(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Some steps: do they lower the loss; and does a run that was killed end where a whole one does?

    Every step has another picture, so the loss is also that of the same pictures before and after: four that
    steps draw, and four that none does.
    """
    import torch

    from mambastyle.training import inversion
    from mambastyle.training.loop import find_checkpoints

    torch.set_num_threads(arguments.threads)
    steps, middle = arguments.steps, max(arguments.steps // 2, 1)
    if os.environ.get("FULL_SIZE_RUN"):
        changes = {"steps": steps, "checkpoint_every": middle, "log_every": 1, "sample_every": steps + 1}
        changes |= {"name": os.environ["FULL_SIZE_RUN"]}
        inversion.run(read(folder, name, arguments, **changes))
        return {}
    runs = {}
    for title in ("whole", "killed"):
        command = [sys.executable, __file__, *sys.argv[1:]]
        process = subprocess.Popen(command, env=os.environ | {"FULL_SIZE_RUN": title})
        if title == "killed":
            while not find_checkpoints(folder / "runs" / title) and process.poll() is None:
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = subprocess.Popen(command, env=os.environ | {"FULL_SIZE_RUN": title})
        process.wait()
        state = torch.load(find_checkpoints(folder / "runs" / title)[-1] / "state.pt", weights_only=True)
        runs[title] = state["modules"]["model"]
        if title == "whole":
            lines = (folder / "runs" / title / "log.jsonl").read_text().splitlines()
    config = read(folder, name, arguments)
    losses = [total(json.loads(line), config.weights.model_dump()) for line in lines]
    same = all(torch.equal(value, runs["killed"][key]) for key, value in runs["whole"].items())
    torch.manual_seed(config.seed)  # as the run does before it makes its model
    task = inversion.InversionTask(config, torch.zeros(0).device)
    before = mean_loss(task, config.seed), mean_loss(task, 7)
    task.model.load_state_dict(runs["killed"])
    after = mean_loss(task, config.seed), mean_loss(task, 7)
    return {
        "losses": [round(loss, 4) for loss in losses],
        "trained_on": [round(before[0], 4), round(after[0], 4)],
        "held_out": [round(before[1], 4), round(after[1], 4)],
        "killed_run_ends_with_the_same_weights": same,
    }


def mean_loss(task: Any, seed: int) -> float:
    """The loss of four pictures, as in training: running statistics mean nothing after ten steps."""
    import torch

    from mambastyle.training.random import StepRandom

    task.model.train()
    with torch.no_grad():
        terms = [task.terms(StepRandom(seed, number, 1)) for number in range(4)]
    return sum(total({key: float(v) for key, v in each.items()}, task.weights) for each in terms) / 4


def total(line: dict[str, float], weights: dict[str, float]) -> float:
    return sum(weights[name] * value for name, value in line.items() if name in weights)


PARTS = {"weights": make_weights, "step": step, "edit": edit, "train": train}

if __name__ == "__main__":
    sys.exit(main())
