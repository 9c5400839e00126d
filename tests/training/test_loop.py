"""The loop: exact resume, two processes, logs, checkpoints, interruption."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mambastyle.training.config import RunConfig
from mambastyle.training.loop import Player, find_checkpoints, train


class Regression:
    """The smallest real task: fit a noisy linear map, with dropout-like randomness from the step."""

    def __init__(self, device: torch.device, stop_at: int | None = None) -> None:
        self.net = nn.Linear(3, 1).to(device)
        self.modules = {"net": self.net}
        self.averaged = {"net": self.net}
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.players = [Player("fit", list(self.net.parameters()), optimizer, self.terms, {"l2": 1.0})]
        self.seen, self.stop_at, self.exported = 0, stop_at, {}

    def terms(self, random):
        self.seen += 1
        if self.stop_at == random.step:
            os.kill(os.getpid(), signal.SIGTERM)
        x = random.normal("x", 3)
        return {"l2": (self.net(x) - x.sum(1, keepdim=True)).square().mean()}

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]

    def samples(self, averages):
        return torch.zeros(4, 3, 8, 8)

    def export(self, averages, folder, card):
        torch.save(averages["net"].state_dict(), folder / "net.pt")


def config(tmp_path: Path, **changes) -> RunConfig:
    values = {"name": "run", "output": str(tmp_path), "steps": 12, "batch": 4, "log_every": 5}
    return RunConfig(**(values | {"sample_every": 6, "checkpoint_every": 4} | changes))


def weights(folder: Path) -> dict:
    return torch.load(folder / "net.pt", weights_only=True)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    whole = train(config(tmp_path / "a"), Regression)
    tasks = []

    def make(device, stop_at=None):
        tasks.append(Regression(device, stop_at))
        return tasks[-1]

    train(config(tmp_path / "b"), lambda device: make(device, stop_at=5))
    assert [path.name for path in find_checkpoints(tmp_path / "b" / "run")] == [
        "step-00000004",
        "step-00000006",
    ]
    resumed = train(config(tmp_path / "b"), make)
    assert tasks[1].seen == 12
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])


def test_what_a_run_leaves(tmp_path):
    folder = train(config(tmp_path), Regression)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert lines[-1]["pictures"] == 48
    assert {"l2", "pictures_per_second"} <= set(lines[0])
    assert [path.name for path in find_checkpoints(folder)] == ["step-00000008", "step-00000012"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "step-00000006.png",
        "step-00000012.png",
    ]
    assert "steps: 12" in (folder / "run.yaml").read_text()


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path):
    folder = train(config(tmp_path, steps=4), Regression)
    (folder / "checkpoints" / "step-00000099.partial").mkdir()
    (folder / "checkpoints" / "step-00000098").mkdir()
    assert [path.name for path in find_checkpoints(folder)] == ["step-00000004"]


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tmp_path):
    whole = train(config(tmp_path / "a", steps=3), Regression)
    parts = train(config(tmp_path / "b", steps=3, accumulate=2), Regression)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(Regression):
        def terms(self, random):
            return {"l2": super().terms(random)["l2"] * float("nan")}

    with pytest.raises(FloatingPointError, match="step 0 is not finite"):
        train(config(tmp_path), Broken)


def test_a_process_may_train_at_one_precision_after_another(tmp_path):
    for precision in ("bf16", "fp32", "bf16"):
        folder = train(config(tmp_path, name=precision, precision=precision, steps=2), Regression)
        assert weights(folder)["weight"].shape == (1, 3)


@pytest.mark.parametrize(("there", "taken"), [(True, "bf16"), (False, "fp32")])
def test_the_run_file_says_which_precision_auto_was(tmp_path, monkeypatch, there, taken):
    monkeypatch.setattr("mambastyle.compute.has_bfloat16", lambda device: there)
    folder = train(config(tmp_path, precision="auto", steps=1), Regression)
    assert yaml.safe_load((folder / "run.yaml").read_text())["precision"] == taken
