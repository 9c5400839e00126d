"""Big jobs: nothing lost, nothing done twice, a bad picture costs itself alone, and both engines agree."""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mambastyle as ms
from mambastyle import images
from mambastyle.files import WriteError
from mambastyle.jobs import pipeline
from mambastyle.jobs.engines import Target, run_here, run_on_ray
from mambastyle.jobs.items import Item, Shard, find_items
from mambastyle.jobs.manifest import JobError, Line, Manifest
from mambastyle.jobs.sinks import FolderSink, TarSink
from mambastyle.jobs.work import EditJob, StylizeJob

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tiny_model_folder):
    return EditJob(str(tiny_model_folder), ("gender=1",), batch_size=2, device="cpu")


@pytest.fixture
def photos(tmp_path):
    """Seven pictures, of which one is none."""
    return make_photos(tmp_path / "photos", 7, bad=3)


def make_photos(folder: Path, count: int, bad: int | None = None) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"photo{index:03d}.png"
        Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
        if index == bad:
            path.write_bytes(b"no picture")
    return folder


def items_of(*sources: Path) -> list[Item]:
    return find_items([str(source) for source in sources], lambda _: contextlib.nullcontext())


def lines(folder: Path) -> list[dict]:
    """The lines about items of all manifests of a folder."""
    found = [line for path in folder.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    return [line for line in map(json.loads, found) if "job" not in line]


def test_a_job_makes_what_the_model_makes_and_lists_the_bad_picture(job, photos, tmp_path, tiny_model_folder):
    report = run_here(job, items_of(photos), Target(tmp_path / "out"))
    assert (report.done, report.before, list(report.failed)) == (6, 0, [str(photos / "photo003.png")])
    assert "not a picture" in report.failed[str(photos / "photo003.png")]
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == [f"photo{index:03d}.gender+1.png" for index in range(7) if index != 3]
    inverter = ms.load(tiny_model_folder, device="cpu")
    for name in names:
        picture = inverter.render(inverter.edit(photos / f"{name[:8]}.png", {"gender": 1.0}), output="numpy")
        with Image.open(tmp_path / "out" / name) as written:
            assert np.abs(np.asarray(written).astype(int) - picture.astype(int)).max() <= 1


def test_the_same_job_again_does_what_is_left_alone(job, photos, tmp_path):
    target = Target(tmp_path / "out")
    first = run_here(job, items_of(photos), target)
    times = {path: path.stat().st_mtime_ns for path in target.folder.glob("*.png")}
    # A picture that was mended, and one that is new.
    (photos / "photo000.png").rename(photos / "new.png")
    (photos / "photo001.png").replace(photos / "photo003.png")
    again = run_here(job, items_of(photos), target)
    assert (first.done, again.done, again.before, again.failed) == (6, 2, 4, {})
    for path, when in times.items():
        assert path.stat().st_mtime_ns == when
    assert run_here(job, items_of(photos), target).done == 0


def test_what_is_wrong_about_a_job_leaves_its_folder_to_the_next(job, photos, tmp_path, tiny_stylizer_folder):
    mistyped = dataclasses.replace(job, edits=("gendr=1",))
    with pytest.raises(ValueError, match="did you mean 'gender'"):
        run_here(mistyped, items_of(photos), Target(tmp_path / "out"))
    (tmp_path / "style.png").write_bytes(b"no picture")
    stylizing = StylizeJob(str(tiny_stylizer_folder), (str(tmp_path / "style.png"),))
    with pytest.raises(images.ImageError, match=r"style\.png"):
        run_here(stylizing, items_of(photos), Target(tmp_path / "out"))
    assert run_here(job, items_of(photos), Target(tmp_path / "out")).done > 0


def test_shards_divide_a_job_and_any_number_resumes_it(job, photos, tmp_path):
    target = Target(tmp_path / "out")
    items = items_of(photos)
    parts = [run_here(job, items, target, shard=Shard.parse(f"{index}/3")) for index in (0, 2)]
    assert [part.done + len(part.failed) for part in parts] == [3, 2]
    rest = run_here(job, items, target)
    assert (rest.before, rest.done) == (4, 2)
    assert max(Counter(line["key"] for line in lines(target.folder) if "error" not in line).values()) == 1
    for text in ("3/3", "1", "-1/2", "0/0", "a/b"):
        with pytest.raises(ValueError, match="shard"):
            Shard.parse(text)


def make_tar(path: Path, photos: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for photo in sorted(photos.iterdir()):
            archive.add(photo, photo.name)
            label = path.with_name("label")
            label.write_text(photo.stem[-1])
            archive.add(label, f"{photo.stem}.cls")
    return path


# webdataset leaves the last file of a list open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_in_and_tars_out_that_webdataset_reads(job, photos, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    tar = make_tar(tmp_path / "photos.tar", photos)
    target = Target(tmp_path / "out", per_tar=4)
    report = run_here(job, items_of(tar), target)
    assert (report.done, len(report.failed)) == (6, 1)
    assert sorted(path.name for path in target.folder.glob("*.tar")) == ["part-000000.tar", "part-000001.tar"]
    run_here(job, items_of(photos), Target(tmp_path / "files"))
    urls = [f"file:{path}" for path in sorted(target.folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [
        f"photo{index:03d}" for index in range(7) if index != 3
    ]
    for sample in samples:
        assert sample["cls"].decode() == sample["__key__"][-1]
        assert sample["png"] == (tmp_path / "files" / f"{sample['__key__']}.gender+1.png").read_bytes()
    # A tar that got its name just before a crash, and one that was open.
    noted = (target.folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (target.folder / "manifest.jsonl").write_text("".join(line for line in noted if "000001.tar" not in line))
    (target.folder / ".part-000002.tar.part").write_bytes(b"half")
    again = run_here(job, items_of(tar), target)
    assert (again.before, again.done, len(again.failed)) == (6, 0, 1)
    assert not list(target.folder.glob(".*.part"))


def test_stylizing_is_a_job_too(photos, tmp_path, tiny_stylizer_folder):
    job = StylizeJob(str(tiny_stylizer_folder), (str(photos / "photo000.png"),), device="cpu")
    report = run_here(job, items_of(photos)[:2], Target(tmp_path / "out"))
    assert report.done == 2
    expected = ms.load(tiny_stylizer_folder, device="cpu").stylize(
        photos / "photo001.png", photos / "photo000.png"
    )
    with Image.open(tmp_path / "out" / "photo001.stylized.png") as written:
        assert written.size == (36, 40)
        assert np.array_equal(np.asarray(written), np.asarray(expected))


@pytest.mark.thorough
@pytest.mark.parametrize(("per_tar", "stop_after"), [(0, 3), (4, 8)])
def test_a_job_killed_in_the_middle_goes_on_and_does_nothing_twice(
    job, tmp_path, tiny_model_folder, per_tar, stop_after
):
    photos = make_photos(tmp_path / "photos", 40)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.jobs.slow", tiny_model_folder, photos, out, str(per_tar)]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT)
    wait_for(lambda: len(lines(out)) >= stop_after, 120)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # As a crash of the machine may leave it: a line cut off.
    with open(out / "manifest.jsonl", "a") as file:
        file.write('{"key": "half of a li')
    done = {line["key"]: [(out / name).stat().st_mtime_ns for name in line["outputs"]] for line in whole(out)}
    assert 0 < len(done) < 40
    report = run_here(job, items_of(photos), Target(out, per_tar or None))
    assert report.before + report.done == 40
    assert report.before >= len(done)
    assert Counter(line["key"] for line in lines(out)) == Counter(str(path) for path in photos.iterdir())
    for line in lines(out):
        if line["key"] in done:
            assert [(out / name).stat().st_mtime_ns for name in line["outputs"]] == done[line["key"]]
    if per_tar:
        members = []
        for path in out.glob("*.tar"):
            with tarfile.open(path) as archive:
                members += archive.getnames()
    else:
        members = [path.name for path in out.glob("*.png")]
    assert len(members) == len(set(members)) == 40


def whole(folder: Path) -> list[dict]:
    text = (folder / "manifest.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n")].splitlines()[1:]]


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            if condition():
                return
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_a_folder_belongs_to_one_job_and_a_part_to_one_process(job, photos, tmp_path, tiny_model_folder):
    target = Target(tmp_path / "out")
    run_here(job, items_of(photos)[:1], target)
    other = EditJob(str(tiny_model_folder), ("gender=2",), batch_size=2, device="cpu")
    with pytest.raises(JobError, match=r"holds another job \(by edits\): choose another --out"):
        run_here(other, items_of(photos), target)
    other = dataclasses.replace(job, precision="bf16")
    with pytest.raises(JobError, match=r"holds another job \(by precision\): choose another --out"):
        run_here(other, items_of(photos), target)
    identity = job.identity() | target.identity()
    with Manifest(target.folder, identity), pytest.raises(JobError, match="another process works on"):
        run_here(job, items_of(photos), target)
    with pytest.raises(JobError, match="would overwrite what was made from"):
        run_here(job, items_of(make_photos(tmp_path / "others", 1)), target)
    (target.folder / "manifest-9-of-9.jsonl").write_text("[1]\n")
    with pytest.raises(JobError, match="is no manifest of a job"):
        run_here(job, items_of(photos), target)


def test_what_is_noted_is_read_by_others_and_a_cut_line_is_not(tmp_path):
    with Manifest(tmp_path, {"a": 1}) as ours, Manifest(tmp_path, {"a": 1}, "other") as theirs:
        ours.add([Line("x", ("x.png",)), Line("y", error="bad")])
        with open(ours.path, "ab") as file:
            file.write(b'{"key": "z"')
        theirs.refresh()
        assert (theirs.done, theirs.failed) == ({"x": ("x.png",)}, {"y": "bad"})
        theirs.add([Line("y", ("y.png",))])
    with Manifest(tmp_path, {"a": 1}) as again:
        assert (set(again.done), again.failed) == ({"x", "y"}, {})
        assert again.path.read_bytes().endswith(b"}\n")


class Counting:
    """Work that counts what waits between the steps."""

    batch_size = 4

    def __init__(self, fail_at: int | None = None) -> None:
        self.prepared = self.computed = self.most_ahead = 0
        self.fail_at, self.lock = fail_at, threading.Lock()

    def prepare(self, data):
        with self.lock:
            self.prepared += 1
            self.most_ahead = max(self.most_ahead, self.prepared - self.computed)
        return data

    def compute(self, pictures):
        time.sleep(0.001)
        self.computed += len(pictures)
        if self.fail_at is not None and self.computed >= self.fail_at:
            raise RuntimeError("a mistake of ours")
        return pictures

    def encode(self, result):
        return {".txt": result}


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text").write_text("text")
    return [Item(str(index), f"item{index}", tmp_path / "text") for index in range(100)]


def test_what_waits_between_the_steps_is_bounded(texts, tmp_path):
    work, noted = Counting(), []
    pipeline.run(texts, work, FolderSink(tmp_path / "out", "x"), noted.extend, threads=3)
    assert [line.key for line in noted] == [item.key for item in texts]
    assert work.most_ahead <= 2 * work.batch_size + 3 + work.batch_size
    assert len(os.listdir(tmp_path / "out")) == 100


def test_a_mistake_of_ours_ends_the_job_and_keeps_what_is_done(texts, tmp_path):
    noted = []
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        pipeline.run(texts, Counting(fail_at=20), FolderSink(tmp_path / "out", "x"), noted.extend)
    assert [line.key for line in noted] == [str(index) for index in range(16)]

    def full(_):
        raise WriteError("cannot write the manifest: No space left on device; free some space")

    with pytest.raises(WriteError, match="No space left"):
        pipeline.run(texts, Counting(), FolderSink(tmp_path / "out", "x"), full)


def test_samples_of_a_tar_that_cannot_be_finished_have_failed(texts, tmp_path, monkeypatch):
    add, added, noted = tarfile.TarFile.addfile, [], []

    def full_at_the_sixth(self, info, file):
        added.append(info.name)
        if len(added) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, info, file)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full_at_the_sixth)
    pipeline.run(texts[:12], Counting(), TarSink(tmp_path / "out", "part", 0, 8), noted.extend)
    failed = {line.key for line in noted if line.error}
    assert failed == {str(index) for index in range(6)}
    assert all("No space left" in line.error for line in noted if line.error)
    kept = {line.key for line in noted if not line.error}
    assert kept == {str(index) for index in range(6, 12)}
    with tarfile.open(tmp_path / "out" / "part-000000.tar") as archive:
        assert archive.getnames() == [f"item{index}.txt" for index in range(6, 12)]


def test_a_tar_that_is_none_costs_itself_alone(tmp_path, photos):
    from mambastyle.cli.batch import Batch

    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    tar = make_tar(tmp_path / "good.tar", photos)
    batch = Batch()
    assert len(find_items([str(tmp_path / "bad.tar"), str(tar), "nowhere"], batch.attempt)) == 7
    assert ["bad.tar is no tar" in batch.failures[0][1], len(batch.failures)] == [True, 2]
    cut = tmp_path / "cut.tar"
    items = items_of(tar)
    cut.write_bytes(tar.read_bytes()[: items[-1].span[0] + 10])
    with pytest.raises(OSError, match="ends too early"):
        Item("key", "name", cut, items[-1].span).read()


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_ray_survives_the_death_of_a_worker(tmp_path, tiny_model_folder, monkeypatch):
    ray = pytest.importorskip("ray")
    from tests.jobs.slow import SlowEditJob

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(ms.__file__).parents[1])]))
    photos = make_photos(tmp_path / "photos", 64, bad=5)
    target = Target(tmp_path / "out")
    job = SlowEditJob(str(tiny_model_folder), ("gender=1",), batch_size=1, device="cpu", seconds=0.2)
    killed = []

    def kill_one() -> None:
        wait_for(lambda: len(lines(target.folder)) >= 3, 200)
        killed.append(int(lines(target.folder)[0]["writer"].split(":")[1]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        report = run_on_ray(job, items_of(photos), target, workers=2, group=8)
    finally:
        ray.shutdown()
        killer.join()
    assert (report.done, report.before, list(report.failed)) == (63, 0, [str(photos / "photo005.png")])
    assert set(Counter(line["key"] for line in lines(target.folder)).values()) == {1}
    assert len(list(target.folder.glob("*.png"))) == 63
    writers = {int(line["writer"].split(":")[1]) for line in lines(target.folder)}
    assert len(writers) >= 3
    assert killed[0] in writers
    # The other engine takes it up, and finds nothing to do.
    again = run_here(
        EditJob(str(tiny_model_folder), ("gender=1",), batch_size=1, device="cpu"), items_of(photos), target
    )
    assert (again.before, again.done, len(again.failed)) == (63, 0, 1)
    assert images.read(target.folder / "photo000.gender+1.png").shape == (3, 16, 16)
