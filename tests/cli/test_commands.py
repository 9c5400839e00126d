"""info, doctor, directions, train and demo."""

import json
import sys
from pathlib import Path

import pytest

import mambastyle as ms
from mambastyle import images
from mambastyle.cli import main
from mambastyle.cli.batch import one_line
from mambastyle.cli.demo import style_sheet
from mambastyle.cli.train import parse_overrides
from mambastyle.files import stems


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


@pytest.mark.no_shape_checks
def test_info_counts_a_config_and_prints_the_papers_table(run, monkeypatch):
    from mambastyle.evaluation import cost

    code, out, _ = run("info", "--config", "kaokore64", "--variant", "no-fuser", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["variant"] == "no-fuser"
    assert report["total"]["parameters"] == sum(row["parameters"] for row in report["modules"].values())
    # Counting takes seconds, and tests/evaluation/test_cost.py looks at the numbers.
    counted = cost.cost("kaokore64", "no-fuser")
    monkeypatch.setattr(cost, "cost", lambda name, variant: counted)
    code, out, _ = run("info", "--config", "kaokore64")
    assert code == 0
    assert "encoder.mixers" in out
    assert out.splitlines()[-2].startswith("total")
    code, out, _ = run("info", "--table")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(cost.TABLE)
    assert "157.82" in out
    assert len(json.loads(run("info", "--table", "--json")[1])) == len(cost.TABLE)
    assert run("info", "--table", "kaokore64")[2] == "error: give one of a model, --config and --table\n"
    assert run("info", "--json")[2].startswith("error: --json prints --config or --table")


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


def test_the_demo_stylizes_the_example_scenes(tiny_stylizer_folder, tmp_path):
    stylizer = ms.load(tiny_stylizer_folder, device="cpu")
    examples = Path(__file__).parents[2] / "examples"
    contents, styles = (
        {path.stem: images.resize(images.read(path), 32, 44) for path in images.find(examples / kind)}
        for kind in ("contents", "styles")
    )
    assert (len(contents), len(styles)) == (2, 3)
    sheet = style_sheet({"one": stylizer, "two": stylizer}, contents, styles, tmp_path)
    assert len(list(tmp_path.glob("*.one.png"))) == len(list(tmp_path.glob("*.two.png"))) == 6
    # Styles above, then two rows for each content, on 32 px a row.
    assert sheet.shape[1] >= 5 * 32


def test_a_demo_without_examples_says_what_to_do(run, tmp_path, monkeypatch):
    from mambastyle.cli import demo

    assert len(list(demo.examples_folder().glob("*.webp"))) == 8
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "mambastyle" / "cli" / "demo.py"))
    code, _, err = run("demo")
    assert code == 1
    assert err == "error: this installation has no example faces: name pictures, or install it again\n"


def test_evaluate_prints_and_writes_numbers(run, tiny_model_folder, faces, tmp_path, monkeypatch):
    import json

    from mambastyle.evaluation.judges import Judges

    monkeypatch.setattr(Judges, "found", classmethod(lambda cls, *_: cls()))
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
