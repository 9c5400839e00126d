"""Every door, with what nobody meant to hand in: it is refused in one line, or what comes of it is right."""

import contextlib
import io
import string
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mambastyle import checkpoints, images
from mambastyle.checkpoints import CheckpointError
from mambastyle.jobs.items import Shard, find_items
from mambastyle.jobs.manifest import JobError, Line, Manifest
from mambastyle.latents.directions import Direction, DirectionError, Directions, parse_edit
from mambastyle.training.config import RunConfig, read_run_file

# More at length: pytest tests/test_fuzz.py --hypothesis-profile=long
settings.register_profile("long", max_examples=2000, deadline=None)
QUICK = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
HURTS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["set", "cut", "add", "zero"])),
    min_size=1,
    max_size=6,
)


def hurt(data: bytes, hurts: list[tuple[int, int, str]]) -> bytes:
    """A file with some bytes changed, cut off, put in or zeroed."""
    damaged = bytearray(data)
    for where, value, how in hurts:
        place = where % max(len(damaged), 1)
        if how == "cut":
            del damaged[max(place, 1) :]
        elif how == "add":
            damaged[place:place] = bytes([value]) * (where % 50)
        elif how == "zero":
            damaged[place : place + 40] = bytes(len(damaged[place : place + 40]))
        elif damaged:
            damaged[place] = value
    return bytes(damaged)


def one_line(error: Exception) -> None:
    assert "\n" not in str(error).strip()
    assert str(error)


def encoded(form: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


KINDS = [
    ("PNG", "RGB"),
    ("PNG", "P"),
    ("JPEG", "CMYK"),
    ("WEBP", "RGB"),
    ("TIFF", "RGB"),
    ("GIF", "P"),
    ("BMP", "RGB"),
]
PICTURES = {kind: encoded(*kind) for kind in KINDS}


@QUICK
@given(st.sampled_from(KINDS), HURTS)
def test_a_damaged_picture_is_refused_or_is_a_picture(kind, hurts):
    check_picture(hurt(PICTURES[kind], hurts))


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_are_a_picture(data):
    check_picture(data)


def check_picture(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", images.ImageWarning)
        try:
            picture = images.read(data)
        except images.ImageError as error:
            return one_line(error)
    assert picture.shape[0] == 3
    assert picture.dtype == torch.float32
    assert -1 <= float(picture.min()) <= float(picture.max()) <= 1


@pytest.fixture(scope="module")
def directions_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("directions") / "directions.safetensors"
    Directions([Direction("age", torch.ones(4, 3)), Direction("pose", torch.ones(4, 3), layers=(0, 2))]).save(
        path
    )
    return path


@QUICK
@given(HURTS)
def test_damaged_directions_are_refused_or_whole(directions_file, tmp_path, hurts):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(hurt(directions_file.read_bytes(), hurts))
    try:
        loaded = Directions.load(path)
    except (CheckpointError, DirectionError) as error:
        return one_line(error)
    assert torch.equal(loaded["age"].vector, torch.ones(4, 3))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("age") | JSON,
        "space": st.sampled_from(["w", "w+"]) | JSON,
        "layers": st.just([0, 2]) | JSON,
        "scale": st.floats() | JSON,
        "description": st.text(max_size=5) | JSON,
    },
)


@QUICK
@given(
    st.fixed_dictionaries({}, optional={"directions": st.lists(ENTRY, max_size=2) | JSON, "generator": JSON})
)
@example({"directions": [{"name": "age", "space": "w", "layers": [0, 9], "scale": 1, "description": ""}]})
def test_directions_with_any_config_are_refused_or_whole(tmp_path, config):
    path = tmp_path / "directions.safetensors"
    checkpoints.save(path, {"age": torch.ones(4, 3)}, kind="directions", config=config)
    with contextlib.suppress(CheckpointError, DirectionError):
        for direction in Directions.load(path).values():
            assert direction.offset(1.0).shape == (4, 3)


YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@QUICK
@given(st.dictionaries(st.sampled_from([*RunConfig.model_fields, "stepss"]), YAML))
def test_a_run_file_with_any_values_is_refused_or_fits(tmp_path, values):
    check_run_file(
        tmp_path / "run.yaml", yaml.safe_dump({"name": "x", "steps": 1, "batch": 1} | values).encode()
    )


@QUICK
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), HURTS)
@example(b"\xff\xfe", [(0, 0, "set")])
@example(b"a: !!python/object/apply:os.system [exit]", [(999, 32, "set")])
@example(b"a: &a [*a, *a]", [(999, 32, "set")])
def test_any_run_file_is_refused_or_fits(tmp_path, data, hurts):
    check_run_file(tmp_path / "run.yaml", hurt(b"name: x\nsteps: 1\nbatch: 1\n" + data, hurts))


def check_run_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        config = read_run_file(path, RunConfig)
    except ValueError as error:
        return one_line(error)
    assert isinstance(config.steps, int)


@QUICK
@given(st.dictionaries(st.text(string.ascii_letters + ".", max_size=12), YAML, max_size=3))
@example({"name.x": 1})
def test_any_override_is_refused_or_fits(tmp_path, overrides):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nsteps: 1\nbatch: 1\n")
    with contextlib.suppress(ValueError):
        read_run_file(path, RunConfig, overrides)


@QUICK
@given(
    st.text(max_size=12) | st.tuples(st.just("age"), st.text("@:=.-+e0123456789", max_size=9)).map("".join)
)
def test_any_edit_is_refused_or_a_direction(text):
    known = Directions([Direction("age", torch.ones(4, 3))])
    with contextlib.suppress(DirectionError):
        name, strength = parse_edit(text)
        offset = known.at(name).offset(strength or 0.0)
        assert torch.isfinite(offset).all()
    with contextlib.suppress(ValueError):
        assert Shard.parse(text).index < Shard.parse(text).count


VERBS = [
    "edit",
    "invert",
    "render",
    "batch",
    "stylize",
    "info",
    "export",
    "train",
    "gan",
    "directions",
    "list",
]
WORDS = [
    *VERBS,
    "-e",
    "-o",
    "--model",
    "--shard",
    "--tar",
    "--grid",
    "gender=1",
    "0/2",
    "nowhere",
    "-1",
    "--",
]
WORDS += ["--batch", "-h", "", "\x00"]


@QUICK
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=6))
def test_any_command_line_ends_in_a_line_and_a_code(tmp_path, monkeypatch, capsys, words):
    import sys

    from mambastyle.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mambastyle", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code in (0, 1, 2)
    assert "Traceback" not in err
    # Without a word to go by, a command shows its help.
    assert stopped.value.code == 0 or err or "Usage" in out


@QUICK
@given(st.binary(max_size=100) | st.lists(JSON, max_size=3).map(lambda values: repr(values).encode()), HURTS)
def test_any_manifest_is_refused_or_read(tmp_path, data, hurts):
    for path in tmp_path.glob("manifest*"):
        path.unlink()
    with Manifest(tmp_path, {"a": 1}) as manifest:
        manifest.add([Line("x", ("x.png",)), Line("y", error="bad")])
    manifest.path.write_bytes(hurt(manifest.path.read_bytes() + data, hurts))
    with contextlib.suppress(JobError), Manifest(tmp_path, {"a": 1}) as again:
        assert all(isinstance(key, str) for key in again.done)


@QUICK
@given(st.binary(max_size=3000), HURTS)
def test_any_tar_is_refused_or_read(tmp_path, data, hurts):
    import tarfile

    path = tmp_path / "samples.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    path.write_bytes(hurt(path.read_bytes(), hurts))
    failures = []

    @contextlib.contextmanager
    def attempt(_):
        try:
            yield
        except (ValueError, OSError) as error:
            failures.append(error)

    items = find_items([str(path)], attempt)
    assert bool(items) != bool(failures)
