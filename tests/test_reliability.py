"""What goes wrong in the world, made to happen: killed runs, full disks, no home, odd names, many threads.

docs/reliability.md says what each of these tests did and what was lost. Jobs that are killed are in
tests/jobs, damaged pictures and files in tests/test_fuzz.py, hostile published files in tests/published.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import mambastyle as ms

ROOT = Path(__file__).parents[1]
# A run of the smallest task that kills itself: in step KILL_STEP, or while it writes its second checkpoint.
TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
from mambastyle.training import loop
from tests.training.test_loop import Regression, config

where, folder = sys.argv[1], Path(sys.argv[2])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class Task(Regression):
    def terms(self, random):
        if where == "step" and random.step == 6:
            die()
        return super().terms(random)

    def export(self, averages, folder, card):
        if where == "export" and card["step"] == 12:
            die()
        super().export(averages, folder, card)

if where == "checkpoint":
    save = torch.save
    def half(state, file):
        if state.get("step") == 8:
            file.write(b"half of it")
            file.flush()
            die()
        save(state, file)
    torch.save = half
elif where == "full disk":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
loop.train(config(folder), Task)
"""


def python(*arguments: object, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """This Python in another process, with other environment variables; None takes one away."""
    environment = os.environ | {"PYTHONPATH": f"{Path(ms.__file__).parents[1]}{os.pathsep}{ROOT}"} | changes
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.thorough
@pytest.mark.parametrize("where", ["step", "checkpoint", "export"])
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(where, tmp_path):
    from tests.training.test_loop import Regression, config, train

    whole = train(config(tmp_path / "whole"), Regression)
    killed = python("-c", TRAIN, where, tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train(config(tmp_path / "killed"), Regression)
    for name, value in torch.load(whole / "net.pt").items():
        assert torch.equal(value, torch.load(resumed / "net.pt")[name])
    # Each step that the log tells of, once.
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [5, 10, 12]


@pytest.mark.thorough
def test_a_full_disk_stops_a_training_with_one_line_and_the_last_checkpoint_stays(tmp_path):
    from tests.training.test_loop import Regression, config, train

    train(config(tmp_path, steps=4), Regression)
    before = {path: path.read_bytes() for path in tmp_path.rglob("state.pt")}
    stopped = python("-c", TRAIN, "full disk", tmp_path)
    assert stopped.returncode == 1
    assert "WriteError: cannot write" in stopped.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("state.pt")} == before
    assert (train(config(tmp_path), Regression) / "checkpoints" / "step-00000012").is_dir()


@pytest.mark.thorough
def test_without_home_or_a_writable_cache_everything_works(tiny_model_folder, faces, tmp_path):
    # A path below a device can be made by nobody, root included.
    nowhere = "/dev/null/cache"
    for changes in ({"HOME": None, "XDG_CACHE_HOME": None}, {"HOME": nowhere, "XDG_CACHE_HOME": nowhere}):
        words = [
            "edit",
            faces[0],
            "-e",
            "gender=1",
            "-m",
            tiny_model_folder,
            "-o",
            tmp_path / "out",
            "--no-save",
        ]
        done = python("-m", "mambastyle", *words, NUMBA_CACHE_DIR=None, **changes)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "out" / "face0.gender+1.png").is_file()


def test_a_path_that_is_not_utf8_is_read_written_and_named(tiny_model_folder, faces, tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    good, bad = folder + b"/n\xe4me.png", folder + b"/b\xe4d.png"
    os.rename(faces[0], good)
    Path(os.fsdecode(bad)).write_bytes(b"no picture")
    from mambastyle.cli.batch import Batch
    from mambastyle.jobs.engines import Target, run_here
    from mambastyle.jobs.items import find_items
    from mambastyle.jobs.work import EditJob

    job = EditJob(str(tiny_model_folder), ("gender=1",), device="cpu")
    for per_tar in (None, 10):
        target = Target(Path(os.fsdecode(folder)) / f"out{per_tar}", per_tar)
        for done, before in ((1, 0), (0, 1)):
            items = find_items([os.fsdecode(folder)], Batch().attempt)
            report = run_here(job, items, target)
            assert (report.done, report.before, list(report.failed)) == (done, before, [os.fsdecode(bad)])
    assert os.listdir(folder + b"/outNone").count(b"n\xe4me.gender+1.png") == 1


@pytest.mark.thorough
def test_the_command_line_names_a_path_that_is_not_utf8(tiny_model_folder, tmp_path):
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xe4d.png"))
    bad.write_bytes(b"no picture")
    done = python("-m", "mambastyle", "invert", bad, "-m", tiny_model_folder, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "is not a picture that can be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_64_threads_share_one_model(tiny_model_folder, faces):
    inverter = ms.load(tiny_model_folder, device="cpu")
    inverted = inverter.invert(faces[:1])
    # More directions than are kept, so that threads throw out what others are about to use.
    strengths = [0.1 * number for number in range(64)]
    expected = [inverter.render(inverter.edit(inverted, {"gender": s}), output="tensor") for s in strengths]
    cases = list(zip(strengths, expected, strict=True))
    start = threading.Barrier(64)

    def work(number: int) -> None:
        start.wait()
        # Each thread from another direction on, so that all are asked for at once.
        for strength, picture in (cases * 2)[number : number + 6]:
            edited = inverter.edit(
                faces[0] if strength == strengths[number] else inverted, {"gender": strength}
            )
            torch.testing.assert_close(
                inverter.render(edited, output="tensor"), picture, rtol=1e-4, atol=1e-5
            )

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(work, range(64)))


@pytest.mark.thorough
def test_memory_stays_flat_over_a_thousand_edits(tiny_model_folder, faces):
    psutil = pytest.importorskip("psutil")
    inverter = ms.load(tiny_model_folder, device="cpu")

    def edits(count: int) -> int:
        for number in range(count):
            inverter.render(inverter.edit(faces[number % 3], {"gender": number / 100, "noble": -1.0}))
        gc.collect()
        return psutil.Process().memory_info().rss

    before = edits(200)
    # A leak of one tensor of the feature for each edit would be 10 MiB.
    assert edits(1000) - before < 4 * 2**20
