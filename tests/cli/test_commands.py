"""info, doctor, directions, train and demo."""

import sys

import pytest

from mambastyle.cli import main
from mambastyle.cli.batch import one_line, stems
from mambastyle.cli.train import parse_overrides


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mambastyle", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return call


def test_info_lists_presets_and_verifies_a_folder(run, tiny_model_folder):
    code, out, _ = run("info")
    assert code == 0
    assert "kaokore64" in out
    code, out, _ = run("info", tiny_model_folder)
    assert code == 0
    assert out.count("(verified)") == 3
    assert "stylegan2" in out


def test_info_of_a_broken_checkpoint_fails(run, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    code, _, err = run("info", path)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_doctor_finds_this_installation_sound(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "reference" in out
    assert "broken" not in out


def test_directions_are_listed(run, tiny_model_folder):
    for source in (tiny_model_folder, tiny_model_folder / "directions.safetensors"):
        code, out, _ = run("directions", "list", "-m", source)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == ["name", "gender", "noble", "pc0"]


def test_the_demo_writes_pictures_and_a_contact_sheet(run, tiny_model_folder, faces, tmp_path):
    out = tmp_path / "demo"
    code, text, _ = run("demo", faces[0].parent, "-m", tiny_model_folder, "-o", out, "--device", "cpu")
    assert code == 0
    assert "3 faces: L2" in text
    assert (out / "contact_sheet.png").is_file()
    # An inversion and four strengths of three directions for each face, and the saved inversions.
    assert len(list(out.glob("face*.png"))) == 3 * 13
    assert len(list(out.glob("*.safetensors"))) == 3


def test_a_demo_without_examples_says_what_to_do(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("demo")
    assert (code, err) == (1, "error: no folder examples here: run it in the repository, or name pictures\n")


def test_evaluate_prints_and_writes_numbers(run, tiny_model_folder, faces, tmp_path, monkeypatch):
    import json

    from mambastyle.evaluation.inversion import Judges

    monkeypatch.setattr(Judges, "found", classmethod(lambda cls: cls()))
    faces[1].write_bytes(b"")
    out = tmp_path / "numbers.json"
    arguments = ("-m", tiny_model_folder, "-o", out, "--device", "cpu")
    code, text, err = run("evaluate", "inversion", faces[0].parent, *arguments)
    assert code == 1
    assert "2 of 3 done" in err
    assert "l2" in text
    assert json.loads(out.read_text())["count"] == 2


def test_train_names_a_missing_recipe_and_a_wrong_override(run, tmp_path):
    code, _, err = run("train", "gan", tmp_path / "none.yaml")
    assert code == 1
    assert "no run file at" in err
    code, _, err = run("train", "gan", tmp_path / "none.yaml", "-s", "steps")
    assert (code, err) == (
        1,
        "error: the override 'steps' is not KEY=VALUE: write for example -s steps=1000\n",
    )


def test_overrides_are_yaml():
    parsed = parse_overrides(["a.b=1e-3", "c=[1, 2]", "d=text", "e=null", "f=a=b"])
    assert parsed == {"a.b": 1e-3, "c": [1, 2], "d": "text", "e": None, "f": "a=b"}
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_overrides(["a=[1"])


def test_names_of_outputs_differ_even_by_case(tmp_path):
    paths = [
        tmp_path / name for name in ("a/x.png", "b/x.png", "x.jpg", "X.png", "c/x.png", "x.inversion.png")
    ]
    assert len({name.casefold() for name in stems(paths).values()}) == len(paths)


def test_an_error_is_one_line_with_a_remedy():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    missing = ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    assert one_line(missing) == 'accelerate is not installed: pip install "mambastyle[train]"'
    assert "smaller --batch" in one_line(MemoryError())
