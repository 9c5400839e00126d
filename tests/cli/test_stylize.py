"""`mambastyle stylize`: contents by styles, mixtures, regions, sheets, videos; failures one by one."""

import os
import sys

import numpy as np
import pytest
from PIL import Image
from tests.conftest import save_tiny_stylizer

import mambastyle as ms
from mambastyle.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_stylizer(tmp_path_factory.mktemp("stylizer"), "mamba-st")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, model):
    """Runs the command in an empty folder; gives (exit code, stdout, stderr)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments):
        words = ["stylize", *(str(argument) for argument in arguments), "-m", str(model), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["mambastyle", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


@pytest.fixture
def styles(tmp_path):
    folder = tmp_path / "styles"
    folder.mkdir()
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        Image.new("RGB", (20, 16), colour).save(folder / f"{name}.png")
    return folder


def names(folder="out"):
    return sorted(os.listdir(folder))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_folders_times_folders_equal_the_python_call(run, faces, styles, model):
    options = ["--strength", 0.7, "--keep-color", "--seed", 3, "--average", 2]
    code, out, err = run(faces[0].parent, "-s", styles, *options)
    assert (code, err) == (0, "")
    assert "6 done, written to out" in out
    assert names() == sorted(f"face{i}.{style}.png" for i in range(3) for style in ("red", "blue"))
    stylizer = ms.load(model, device="cpu")
    same = {"strength": 0.7, "keep_color": True, "seed": 3, "average": 2, "output": "numpy"}
    expected = stylizer.stylize(faces[1], styles / "red.png", **same)
    assert np.array_equal(pixels("out/face1.red.png"), expected)


def test_a_broken_file_costs_itself_alone(run, faces, styles):
    faces[1].write_bytes(b"")
    (styles / "red.png").write_bytes(b"no picture")
    code, _, err = run(*faces, "nowhere.png", "-s", styles)
    assert code == 1
    assert "2 of 5 done, written to out; 3 failed:" in err
    assert "face1.png is empty" in err
    assert "red.png is not a picture" in err
    assert "no such file: nowhere.png" in err
    assert names() == ["face0.blue.png", "face2.blue.png"]


def test_mixtures_and_regions_make_one_picture(run, faces, styles, tmp_path):
    both = ("-s", styles / "red.png", "-s", styles / "blue.png")
    code, _, err = run(faces[0], *both, "--weights", "3,1", "-o", "a")
    assert code == 0
    assert "note: the weights sum to 4: normalised to 0.75, 0.25" in err
    assert run(faces[0], *both, "--mix", "-o", "b")[0] == 0
    left, right = tmp_path / "left.png", tmp_path / "right.png"
    Image.fromarray(np.repeat([[255, 0]], 2, 0).astype(np.uint8)).save(left)
    Image.fromarray(np.repeat([[0, 255]], 2, 0).astype(np.uint8)).save(right)
    assert run(faces[0], *both, "--mask", left, "--mask", right, "-o", "c")[0] == 0
    assert names("a") == names("b") == names("c") == ["face0.mix.png"]
    assert run(faces[0], "-s", styles / "red.png", "--mask", left, "-o", "d")[0] == 0
    photo, masked = pixels(faces[0]), pixels("d/face0.red.png")
    assert np.array_equal(masked[:, 32:], photo[:, 32:])
    assert not np.array_equal(masked[:, :8], photo[:, :8])
    assert np.array_equal(pixels("c/face0.mix.png")[:, :8], masked[:, :8])


def test_size_and_format(run, faces, styles):
    assert run(faces[0], "-s", styles / "red.png", "--size", 24, "--format", "webp")[0] == 0
    with Image.open("out/face0.red.webp") as picture:
        assert picture.size == (20, 24)


def test_the_sheet_has_contents_below_and_styles_beside(run, faces, styles):
    faces[2].write_bytes(b"")
    code, _, err = run(faces[0].parent, "-s", styles, "--grid")
    assert code == 1
    assert "2 of 3 done" in err
    assert names() == ["grid.png"]
    sheet = pixels("out/grid.png")
    assert sheet.shape[0] > 3 * 256
    assert sheet.shape[1] > 3 * 256


def test_a_still_video_does_not_flicker(run, styles):
    pytest.importorskip("av")
    from tests.test_video import contents, save_clip

    from mambastyle import video

    source = save_clip("clip.mp4", [(180, 120, 60)] * 3)
    code, out, _ = run("--video", source, "-s", styles / "red.png", "-o", "made.mp4")
    assert code == 0
    assert "3 frames at 12 a second" in out
    assert video.inspect("made.mp4") == video.inspect(source)
    colours, times, sound = contents("made.mp4")
    assert np.ptp(colours, axis=0).max() < 0.5
    assert (times, sound) == contents(source)[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FACE"], "no style: name a painting with --style"),
        (["-s", "STYLE"], "nothing to stylize: name photographs, or one video"),
        (["FACE", "-s", "STYLE", "--strength", "2"], "strength is 2.0, expected 0 (the photo)"),
        (["FACE", "-s", "STYLE", "--weights", "a"], "--weights 'a': expected numbers"),
        (["FACE", "-s", "STYLE", "--weights", "1,1"], "2 weights for 1 styles"),
        (["FACE", "-s", "STYLE", "--weights", "-1"], "must not be negative"),
        (["FACE", "-s", "STYLE", "--mask", "FACE", "--mask", "FACE"], "2 masks for 1 styles"),
        (["FACE", "-s", "STYLE", "--mask", "none.png"], "no such file: none.png"),
        (["FACE", "-s", "STYLE", "--grid", "--mix"], "--grid shows each style by itself"),
        (["--video", "none.mp4", "-s", "STYLE", "-o", "x.mp4"], "no such file: none.mp4"),
        (["--video", "FACE", "-s", "STYLE"], "cannot write the video out: its suffix is missing"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run, faces, styles, arguments, message):
    words = {"FACE": faces[0], "STYLE": styles / "red.png"}
    code, out, err = run(*[words.get(word, word) for word in arguments])
    assert code == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not os.path.exists("out")
