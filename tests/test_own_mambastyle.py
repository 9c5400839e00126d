"""The guide "your own MambaStyle" from its first command to its last, in order, with small stand-ins.

Files that others publish are made here in their layouts (tests/published_files.py), and TABLE says what else
the test runs instead of what stands in the guide. All the rest is run as it stands there.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mambastyle as ms
from mambastyle import checkpoints
from mambastyle.cli import main
from mambastyle.training import judges
from tests import published_files
from tests.training.test_inversion import PUBLISHED_WEIGHTS

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "your-own-mambastyle.md"
TINY = shlex.quote(f"model={json.dumps(dataclasses.asdict(published_files.MODEL))}")
SHORT = f"-s batch=2 -s accumulate=1 -s {TINY}"
DETECTOR = importlib.util.find_spec("yuface") is not None

TABLE = {
    # The generator of the test draws 32 px and takes 8 latents, and its MambaStyle is as small.
    "--num-ws 18": "--num-ws 8",
    '-s "model={base: faces256, feature_channels: 256}"': f"-s steps=1 {SHORT} -s weights.identity=0",
    # Two steps of the 510,000, and two more on several processes; ten hours end after the first step.
    "my-faces.yaml -s max_minutes=600": f"my-faces.yaml -s steps=2 -s max_minutes=0 {SHORT}",
    "train inversion my-faces.yaml\n": f"train inversion my-faces.yaml -s steps=2 {SHORT}\n",
    "my-faces.yaml -s accumulate=1": f"my-faces.yaml -s steps=4 {SHORT} -s weights.identity=0",
    # Counting the full sizes takes seconds; tests/evaluation/test_cost.py does it.
    "--config faces1024": "--config kaokore64",
    # Only the middle of the photograph where this installation lacks the detector of faces.
    "--faces": "--faces" if DETECTOR else "--paste-back",
}
"""What stands in the guide, and what the test runs instead."""

IN_ONE_PROCESS = {"torchrun --nproc-per-node 4 -m mambastyle": "mambastyle"}
IN_TWO_PROCESSES = {
    "torchrun --nproc-per-node 4 -m mambastyle": "torchrun --standalone --nproc-per-node 2 -m mambastyle"
}


def pieces(replaced: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(language, text) of each piece of the guide, in order, with what is replaced."""
    text = GUIDE.read_text(encoding="utf-8")
    for theirs, ours in replaced.items():
        assert theirs in text, f"{theirs!r} is in the table of the test and no longer in the guide"
        text = text.replace(theirs, ours)
    yield from re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)


def follow(replaced: dict[str, str], run: Callable[[list[str]], None]) -> int:
    """Do what the guide says, in this folder; the number of commands."""
    count = 0
    for language, text in pieces(replaced):
        if language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", text)
            assert name is not None, "a run file begins with its name"
            Path(name[1]).write_text(text)
        elif language == "python":
            exec(compile(text, str(GUIDE), "exec"), {})
        else:
            assert language == "sh"
            for line in text.splitlines():
                if words := shlex.split(line, comments=True):
                    run(words)
                    count += 1
    return count


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What the reader of the guide has fetched, small, and the recipes of the repository."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("weights"))
    published_files.write_generator_pickle(tmp_path / "stylegan2-ffhq-1024x1024.pkl")
    published_files.write_generator_pickle(tmp_path / "stylegan2-ffhq-256x256.pkl", seed=1)
    published_files.write_judges(tmp_path / "weights")
    for name in ("age", "smile"):
        torch.save(torch.nn.functional.normalize(torch.randn(1, 24)), tmp_path / f"{name}.pt")
    (tmp_path / "aligned").mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "aligned" / f"face{index}.png")
    with Image.open(ROOT / "tests" / "data" / "astronaut.webp") as portrait:
        portrait.convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path


def check_what_the_guide_left(folder: Path) -> None:
    log = (folder / "runs/my-faces/log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    # With all three judges the loss is the published one.
    assert set(PUBLISHED_WEIGHTS) <= set(lines[0])
    assert set(PUBLISHED_WEIGHTS) <= set(lines[1])
    card = checkpoints.read_header(folder / "weights/generator.safetensors").card
    assert card["published_kind"] == "stylegan2-nvidia"
    inverter = ms.Inverter.from_pretrained(folder / "my-mambastyle")
    assert list(inverter.directions) == ["age", "smile", *(f"pc{i}" for i in range(6))]
    for name in ("face0.inversion.png", "face0.age+2.smile+1.png", "photo.age+2.png"):
        assert (folder / "out" / name).is_file()
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["count"] == 3
    assert {"l2", "lpips", "identity"} <= set(numbers)
    assert (folder / "older.png").is_file()
    assert (folder / "runs/faces256/inversion.safetensors").is_file()


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    "several",
    [IN_ONE_PROCESS, pytest.param(IN_TWO_PROCESSES, marks=pytest.mark.thorough)],
    ids=["one", "two"],
)
def test_every_command_of_the_guide_runs_in_order(several, folder, monkeypatch):
    def run(words: list[str]) -> None:
        if words[0] == "torchrun":
            # The command of that name, found without a PATH.
            command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            paths = [str(Path(ms.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            subprocess.run(command, check=True, env=os.environ | changes, timeout=300)
            return
        assert words[0] == "mambastyle", words
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, shlex.join(words)

    # Face parsing at 512 px takes seconds a step; tests/training/test_judges.py is about what it computes.
    monkeypatch.setattr(judges, "_PARSING_SIZE", 64)
    lines = re.findall(r"^(?:mambastyle|torchrun) ", GUIDE.read_text(encoding="utf-8"), re.M)
    assert follow(TABLE | several, run) == len(lines) > 0
    check_what_the_guide_left(folder)
