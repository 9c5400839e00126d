"""recipes/faces256.yaml itself, with a small model and generator: it trains, and a crash changes nothing."""

import dataclasses
import json

import pytest
import torch
from tests import published_files
from tests.training.test_inversion import CPU, RECIPES

from mambastyle import checkpoints
from mambastyle.latents.directions import Direction, Directions
from mambastyle.published.convert import convert
from mambastyle.training.config import read_run_file
from mambastyle.training.inversion import InversionConfig, InversionTask
from mambastyle.training.loop import train
from mambastyle.training.random import StepRandom


class Crash(Exception):
    """As a process that dies: nothing is saved on the way out."""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Reads the recipe with the files that it names in place, and with what makes it small."""
    monkeypatch.chdir(tmp_path)
    published_files.write_lpips(tmp_path / "weights")
    published_files.write_generator_pickle(tmp_path / "ffhq.pkl")
    convert("ffhq.pkl", "weights/generator.safetensors")
    vectors = torch.eye(24)[:2]
    known = [
        Direction.from_w(name, vector, 8) for name, vector in zip(("age", "smile"), vectors, strict=True)
    ]
    Directions(known).save("weights/directions.safetensors")

    def read(**changes) -> InversionConfig:
        small = {"model": dataclasses.asdict(published_files.MODEL), "steps": 10, "batch": 4}
        # The recipe's rate grows from 0: ten steps say little. ArcFace and face parsing take seconds a step.
        small |= {"learning_rate": 2e-3, "warm_up": 0, "weights.identity": 0, "weights.structure": 0}
        small |= {"checkpoint_every": 5, "log_every": 1}
        return read_run_file(RECIPES / "faces256.yaml", InversionConfig, small | changes)

    return read


def loss(task: InversionTask) -> float:
    """Of pictures that no step draws; the step's own batch differs from step to step."""
    task.model.eval()
    with torch.no_grad():
        terms = task.terms(StepRandom(7, 0, 16))
    return float(sum(task.weights[name] * term for name, term in terms.items()))


def test_ten_steps_lower_the_loss_and_a_crash_changes_no_number(recipe):
    tasks = []

    class Whole(InversionTask):
        def __init__(self, config, device):
            super().__init__(config, device)
            tasks.append(self)

    class Dies(InversionTask):
        def terms(self, random):
            if random.step == 7:
                raise Crash
            return super().terms(random)

    config = recipe(name="whole")
    assert (config.precision, config.clip_gradient, set(config.judges)) == (
        "auto",
        1.0,
        {"perceptual", "identity", "structure"},
    )
    torch.manual_seed(config.seed)
    before = loss(InversionTask(config, CPU))
    whole = train(config, lambda device: Whole(config, device))
    assert loss(tasks[0]) < 0.9 * before

    config = recipe(name="crashed")
    with pytest.raises(Crash):
        train(config, lambda device: Dies(config, device))
    # From step 5, its last checkpoint.
    crashed = train(config, lambda device: InversionTask(config, device))
    expected, found = (checkpoints.load(run / "inversion.safetensors").tensors for run in (whole, crashed))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    logs = []
    for run in (whole, crashed):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k != "pictures_per_second"} for line in lines])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 10
