"""Runs as the Train tab reads them, and what cannot be started."""

import json
import sys
import time

import pytest

pytest.importorskip("gradio", reason='needs the page: pip install "mambastyle[ui]"')
import itertools

from mambastyle.ui import runs as module
from mambastyle.ui.runs import POINTS, Runs
from mambastyle.ui.train import curve, report, task_of


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "gan-tiny.yaml"
    path.write_text("name: tiny\nunknown_key: 1\n")
    return path


def leave(runs, name="one", lines=3):
    """A folder as a training leaves it, its last line cut off by a kill."""
    folder = runs.folder / name
    (folder / "samples").mkdir(parents=True)
    (folder / "run.yaml").write_text("name: one\n")
    log = [
        {"l2": 1 / step, "step": step, "pictures": 8 * step, "pictures_per_second": 5.0}
        for step in range(1, lines + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"l2": 0.1, "st')
    for step in (1, 2):
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(b"")
    (folder / module.OUTPUT).write_bytes("step 1\rstep 2\rstep 3\ndone é\n".encode())
    return folder


def test_a_run_is_read_from_its_folder(runs):
    assert runs.names() == []
    leave(runs)
    (runs.folder / "no run").mkdir()
    assert runs.names() == ["one"]
    run = runs.look("one")
    assert (run.state, run.step, run.pictures_per_second) == ("not started from this page", 3, 5.0)
    assert run.curves == {"l2": [(1, 1.0), (2, 0.5), (3, 1 / 3)]}
    assert [path.stem for path in run.samples] == ["step-00000002", "step-00000001"]
    assert run.output == "step 3\ndone é"


def test_a_long_run_is_thinned_and_keeps_its_last_point(runs):
    leave(runs, lines=5 * POINTS + 3)
    points = runs.look("one").curves["l2"]
    assert POINTS / 2 < len(points) <= POINTS
    assert points[-1][0] == 5 * POINTS + 3
    assert len({b[0] - a[0] for a, b in itertools.pairwise(points)}) == 1


def test_a_curve_has_its_value_in_words_and_no_markup_from_outside(runs):
    leave(runs)
    drawn = report(runs.look("one"))
    assert 'aria-label="l2: 0.3333 at step 3"' in drawn
    assert "<b>&lt;script&gt;</b>" in curve("<script>", [(1, 2.0), (2, float("nan")), (3, 1.0)])
    assert curve("nan", [(1, float("nan"))]) == ""


def test_what_cannot_be_started_is_told(runs, recipe, tmp_path):
    for name in ("", "../elsewhere", "a/b", ".hidden", "x" * 80):
        with pytest.raises(ValueError, match="cannot be that of a folder"):
            runs.start("gan", recipe, name)
    with pytest.raises(ValueError, match="there is no recipe"):
        runs.start("gan", tmp_path / "none.yaml", "one")
    with pytest.raises(ValueError, match="there is no task 'rm'"):
        runs.start("rm", recipe, "one")
    with pytest.raises(ValueError, match="one is not running from this page"):
        runs.stop("one")
    assert not runs.folder.exists()


def test_one_name_runs_once_and_stops_gently(runs, recipe, monkeypatch, tmp_path):
    """With a process that stands for the training: it writes what SIGTERM lets it write."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "print('ready', sys.argv[3:], flush=True)\ntime.sleep(60)\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(stand_in))
    runs.start("gan", recipe, "one", ["steps=3"])
    with pytest.raises(ValueError, match="one is running: stop it first"):
        runs.start("gan", recipe, "one")
    for _ in range(600):
        if "ready" in runs.look("one").output:
            break
        time.sleep(0.05)
    assert runs.look("one").state == "running"
    assert "'train', 'gan'" in runs.look("one").output
    assert "'steps=3'" in runs.look("one").output
    runs.stop_all()
    run = runs.look("one")
    assert (run.state, run.output.splitlines()[-1]) == ("ended", "saved")


def test_the_name_of_a_recipe_tells_its_task():
    names = {"samam-small.yaml": "style-transfer", "gan-kaokore64.yaml": "gan", "mine.yaml": None}
    assert {name: task_of(name) for name in names} == names
