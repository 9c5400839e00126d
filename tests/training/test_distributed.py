"""Two processes, started as a user does, do what one with twice the batch does."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tests.training.test_inversion import files, run_config
from tests.training.test_loop import Regression, config, weights

from mambastyle.training.inversion import InversionTask
from mambastyle.training.loop import find_checkpoints, train

__all__ = ["files"]  # a fixture


def run_both(folder: Path, generator: Path) -> None:
    """The small task for five steps, and the gradients of one step of the inversion, written to `folder`.

    Not its weights: some gradients are zero but for rounding, and Adam takes their signs.
    """
    train(config(folder, steps=5), Regression)
    # A signal that reaches one process alone ends them all, and what they did is kept.
    first = int(os.environ.get("RANK", 0)) == 0
    train(config(folder, name="stopped"), lambda device: Regression(device, stop_at=5 if first else None))
    tasks = []

    def make(device):
        tasks.append(InversionTask(run_config(generator, folder / "inversion", steps=1), device))
        return tasks[-1]

    train(run_config(generator, folder / "inversion", steps=1), make)
    found = {name: p.grad for name, p in tasks[0].model.named_parameters()}
    found |= {name: value for name, value in tasks[0].model.named_buffers()}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(found, folder / "gradients.pt")


def test_two_processes_equal_one(tmp_path, files):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.training.test_distributed import run_both\n"
        "run_both(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    run_both(tmp_path / "one", files)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    subprocess.run(
        [*command, str(script), str(tmp_path / "two"), str(files)], check=True, env=environment, timeout=300
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert len((two / "run" / "log.jsonl").read_text().splitlines()) == 1
    for name, value in weights(one / "run").items():
        torch.testing.assert_close(value, weights(two / "run")[name])
    assert [path.name for path in find_checkpoints(two / "stopped")][-1] == "step-00000006"
    expected, found = (torch.load(folder / "gradients.pt", weights_only=True) for folder in (one, two))
    # Sums of the batch in another order, amplified where gradients cancel in front of a batch norm: 2e-4 of
    # the largest gradient at worst, 1e-7 for most. With norms of their own it is 0.5 and 0.01.
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        error = float((found[name] - value).abs().max()) / largest
        assert error < 1e-3, (name, error)
