"""The commands write what they say, whole; a bad file costs itself alone and is listed at the end."""

import errno
import os
import sys
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

import mambastyle as ms
from mambastyle.cli import main


@pytest.fixture
def run(monkeypatch, capsys, tiny_model_folder, tmp_path):
    """Runs the command line in an empty folder; gives (exit code, stdout, stderr)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments, model=True):
        words = [str(argument) for argument in arguments]
        if model:
            words += ["--model", str(tiny_model_folder), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["mambastyle", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


def names(folder="out"):
    return sorted(os.listdir(folder))


def test_invert_writes_pictures_beside_saved_inversions(run, faces):
    code, out, err = run("invert", faces[0].parent, "--batch", 2)
    assert (code, err) == (0, "")
    assert "3 done, written to out" in out
    kinds = ("png", "safetensors")
    assert names() == [f"face{index}.inversion.{kind}" for index in range(3) for kind in kinds]
    with Image.open("out/face0.inversion.png") as picture:
        assert picture.size == (16, 16)


def test_invert_into_its_own_folder_takes_its_outputs_for_none_of_its_inputs(run, faces):
    folder = faces[0].parent
    assert run("invert", folder, "--out", folder)[0] == 0
    before = names(folder)
    code, out, err = run("invert", folder, "--out", folder)
    assert (code, names(folder)) == (0, before)
    assert "3 done" in out
    assert "3 left out that lie beside a saved inversion" in err
    # One that is named is meant.
    assert "1 done" in run("invert", folder / "face0.inversion.png")[1]


@pytest.mark.no_shape_checks
def test_invert_by_another_method_is_edited_like_any_other(run, faces, monkeypatch):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    code, _, err = run("invert", faces[0], "--method", "pti", "--steps", 2)
    assert (code, err) == (0, "")
    assert run("edit", "out/face0.inversion.safetensors", "-e", "gender=1.5")[0] == 0
    assert "face0.gender+1.5.png" in names()
    code, _, err = run("invert", faces[0], "--method", "pit")
    assert code == 1
    assert "did you mean 'pti'" in err


def test_edit_of_a_picture_equals_edit_of_its_saved_inversion(run, faces):
    assert run("invert", faces[0])[0] == 0
    assert run("edit", faces[0], "-e", "gender=1.5", "-o", "a", "--no-save")[0] == 0
    assert run("edit", "out/face0.inversion.safetensors", "-e", "gender=1.5", "-o", "b")[0] == 0
    assert names("a") == ["face0.gender+1.5.png"]
    assert names("b") == ["face0.gender+1.5.png", "face0.gender+1.5.safetensors"]
    with Image.open("a/face0.gender+1.5.png") as a, Image.open("b/face0.gender+1.5.png") as b:
        assert a.tobytes() == b.tobytes()
    # And the edited one, edited back and rendered, is the inversion.
    assert run("edit", "b/face0.gender+1.5.safetensors", "-e", "gender=-1.5", "-o", "c")[0] == 0
    assert run("render", "out", "-o", "d")[0] == 0
    assert names("d") == ["face0.inversion.png"]
    with Image.open("c/face0.gender+1.5.gender-1.5.png") as c, Image.open("d/face0.inversion.png") as d:
        worst = max(abs(x - y) for x, y in zip(c.tobytes(), d.tobytes(), strict=True))
    assert worst <= 1


def test_jpeg_and_layers(run, faces):
    assert run("edit", faces[0], "-e", "gender@0:2=2", "-f", "jpg", "--no-save")[0] == 0
    assert names() == ["face0.gender_0-2+2.jpg"]


def test_bfloat16_changes_a_picture_a_little(run, faces):
    pictures = []
    for precision in ("fp32", "bf16"):
        code, _, err = run("edit", faces[0], "-e", "gender=1", "--precision", precision, "--out", precision)
        assert (code, err) == (0, "")
        with Image.open(f"{precision}/face0.gender+1.png") as picture:
            pictures.append(np.asarray(picture).astype(int))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 3


def test_a_grid_is_one_picture_of_many_strengths(run, faces):
    arguments = ("-e", "gender", "-e", "noble=1", "--grid", "--strengths", "-2,0,2")
    code, out, _ = run("edit", faces[0].parent, *arguments)
    assert code == 0
    assert "grid.png" in out
    assert names() == ["grid.png"]
    with Image.open("out/grid.png") as sheet:
        # original, inversion and three strengths, enlarged to 128 px, beside the names of the rows
        assert sheet.width > 5 * 128
        assert sheet.height > 3 * 128


def test_the_others_of_a_batch_are_done_and_the_failures_listed(run, faces):
    folder = faces[0].parent
    (folder / "bad.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(faces[0].read_bytes()[:500])
    code, _, err = run("invert", folder, "nowhere.png")
    assert code == 1
    lines = err.splitlines()
    assert lines[0] == "3 of 7 done, written to out; 4 failed:"
    assert len(lines) == 5
    for text in (
        "bad.png is not a picture",
        "empty.png is empty",
        "cut.png is truncated",
        "no such file: nowhere",
    ):
        assert any(text in line for line in lines)
    assert len(names()) == 6


def test_a_full_disk_fails_each_file_and_leaves_nothing_half_written(run, faces, monkeypatch):
    written = []

    def full_after_two_files(descriptor, data):
        if len(written) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(descriptor)
        return real_write(descriptor, data)

    real_write = os.write
    monkeypatch.setattr("mambastyle.files.os.write", full_after_two_files)
    code, _, err = run("invert", faces[0].parent)
    monkeypatch.undo()
    assert code == 1
    assert "No space left on device; free some space" in err
    assert "1 of 3 done" in err
    out = faces[0].parent.parent / "work" / "out"
    assert names(out) == ["face0.inversion.png", "face0.inversion.safetensors"]


def test_pictures_of_one_name_do_not_overwrite_each_other(run, faces):
    other = faces[0].parent / "face0.jpg"
    with Image.open(faces[0]) as picture:
        picture.save(other)
    assert run("invert", faces[0], other, "--format", "webp")[0] == 0
    assert sum(name.endswith(".webp") for name in names()) == 2


def test_transparency_is_noted(run, faces):
    Image.new("RGBA", (32, 32), (9, 9, 9, 9)).save(faces[0])
    code, _, err = run("invert", faces[0])
    assert code == 0
    assert "composited on white" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "FACE", "-e", "gendr=1"], "error: no direction named 'gendr': did you mean 'gender'?"),
        (["edit", "FACE", "-e", "gender=big"], "error: the strength of gender is 'big', expected a number"),
        (
            ["edit", "FACE", "-e", "gender=nan"],
            "error: the strength of gender is nan, expected a finite number",
        ),
        (["edit", "FACE", "-e", "gender=inf"], "error: the strength of gender is inf"),
        (["edit", "FACE", "-e", "gender="], "error: the strength of gender is ''"),
        (["edit", "FACE", "-e", "=1"], "error: the edit '=1' names no direction"),
        (["edit", "FACE", "-e", "gender"], "error: the edit 'gender' has no strength: write gender=1.5"),
        (["edit", "FACE", "-e", "gender=1", "--grid"], "error: --grid needs a direction without a strength"),
        (
            ["edit", "FACE", "-e", "gender@9=1"],
            "error: the layers of 'gender@9' are '9', expected FIRST:STOP",
        ),
        (["edit", "FACE", "-e", "gender@0:9=1"], "error: layers 0:9 of 'gender' are out of range"),
        (
            ["edit", "FACE", "-e", "gender", "--grid", "--strengths", "1,x"],
            "error: the strength of --strengths is",
        ),
        (["invert", "nowhere"], "no such file: nowhere"),
        (["invert", "."], "no pictures in the folder"),
        (["render", "FACE"], "face0.png is no readable safetensors file"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy_and_writes_nothing(run, faces, arguments, message):
    code, out, err = run(*[faces[0] if word == "FACE" else word for word in arguments])
    assert code == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not os.path.exists("out")


def test_a_model_that_is_none_is_refused(run, faces, other_model_folder):
    code, _, err = run("invert", faces[0], "-m", "kaokore", model=False)
    assert (code, err) == (1, "error: no preset or folder named 'kaokore': did you mean 'kaokore64'?\n")
    assert run("invert", faces[0], "-m", other_model_folder, model=False)[0] == 0
    code, _, err = run("render", "out")
    assert code == 1
    assert "was made by another model" in err


def test_paste_back_gives_whole_pictures(run, faces, tmp_path):
    code, _, err = run("edit", faces[0].parent, "-e", "gender=2", "--paste-back")
    assert (code, err) == (0, "")
    assert names() == [f"face{index}.gender+2.png" for index in range(3)]
    with Image.open("out/face0.gender+2.png") as edited, Image.open(faces[0]) as original:
        assert edited.size == original.size
        # The rows above the middle square are as they were.
        above = (0, 0, original.width, 4)
        assert edited.crop(above).tobytes() == original.crop(above).tobytes()
        assert edited.tobytes() != original.tobytes()


def test_landmarks_come_from_a_json_file(run, faces, tmp_path):
    points = tmp_path / "points.json"
    points.write_text("[[15, 20], [25, 20], [20, 25], [16, 30], [24, 30]]")
    assert run("edit", faces[0], "-e", "gender=2", "--landmarks", points)[0] == 0
    assert names() == ["face0.gender+2.png"]
    points.write_text("[[15, 20]]")
    code, _, err = run("edit", faces[0], "-e", "gender=2", "--landmarks", points)
    assert code == 1
    assert "give 5 or 68 pairs of x and y" in err
    points.write_text("15, 20")
    code, _, err = run("edit", faces[0], "-e", "gender=2", "--landmarks", points)
    assert code == 1
    assert "points.json is not JSON" in err


def test_equal_names_in_a_saved_inversion_and_of_files_overwrite_nothing(run, faces, tiny_model_folder):
    inverter = ms.load(tiny_model_folder, device="cpu")
    several = inverter.invert([str(face) for face in faces[:2]], names=["n", "n"])
    for folder in ("a", "b"):
        inverter.save_inversion(f"{folder}/x.inversion.safetensors", several)
    files = ("a/x.inversion.safetensors", "b/x.inversion.safetensors")
    assert run("render", *files)[0] == 0
    numbered = [f"{stem}.inversion.{name}.png" for stem in ("x", "x_safetensors") for name in ("n", "n-2")]
    assert names() == sorted(numbered)
    assert run("edit", files[0], "-e", "gender=1", "-o", "edited", "--no-save")[0] == 0
    assert names("edited") == ["x.gender+1.n-2.png", "x.gender+1.n.png"]


def test_names_in_a_saved_inversion_lead_nowhere(run, faces, tiny_model_folder):
    inverter = ms.load(tiny_model_folder, device="cpu")
    bad = inverter.invert([str(face) for face in faces[:2]], names=["/../../escaped_a", "/../../escaped_b"])
    inverter.save_inversion("bad/h.safetensors", bad)
    for command in (["render"], ["edit", "-e", "gender=1"]):
        assert run(*command, "bad/h.safetensors", "-o", f"deep/{command[0]}")[0] == 0
        assert len(names(f"deep/{command[0]}")) == (2 if command[0] == "render" else 4)
    assert sorted(os.listdir(".")) == ["bad", "deep"]
    assert sorted(os.listdir("deep")) == ["edit", "render"]


def test_edit_takes_a_folder_of_saved_inversions_and_not_what_was_rendered_of_them(run, faces):
    assert run("invert", *faces[:2], "-o", "saved")[0] == 0
    for source in ("saved", "saved/*"):
        code, out, err = run("edit", source, "-e", "gender=1", "-o", f"out{len(source)}", "--no-save")
        assert (code, err) == (0, "")
        assert "2 done" in out
        assert names(f"out{len(source)}") == ["face0.gender+1.png", "face1.gender+1.png"]


def test_out_is_no_picture(run, faces):
    for command in (["invert"], ["edit", "-e", "gender=1"]):
        code, _, err = run(*command, faces[0], "-o", "face.png")
        assert code == 1
        assert "expected a folder" in err
    assert not os.path.exists("face.png")


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mambastyle", "--version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mambastyle {metadata.version('mambastyle')}\n"
