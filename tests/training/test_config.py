"""Run files: typed, with overrides, and errors that name the nearest key."""

import pytest

from mambastyle.training.config import RunConfig, Section, read_run_file


class Inner(Section):
    rate: float = 0.1


class Outer(RunConfig):
    inner: Inner = Inner()


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nsteps: 3\nbatch: 2\n")
    return path


def test_values_defaults_and_overrides(run_file):
    config = read_run_file(run_file, Outer, {"inner.rate": 0.5, "steps": 9})
    assert (config.name, config.steps, config.inner.rate) == ("a", 9, 0.5)
    assert config.folder.as_posix() == "runs/a"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"name.first": 1}, "cannot set name.first, since name is 'a' there"),
        ({"stpes": 4}, "unknown key stpes: did you mean steps?"),
        ({"inner.rat": 4}, "unknown key inner.rat: did you mean rate?"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
    ],
)
def test_mistakes_are_one_line(run_file, override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        read_run_file(run_file, Outer, override)
    assert "\n" not in str(error.value)


def test_files_that_are_no_run_files(tmp_path):
    with pytest.raises(ValueError, match="no run file"):
        read_run_file(tmp_path / "none.yaml", Outer)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a mapping"):
        read_run_file(tmp_path / "list.yaml", Outer)
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_run_file(tmp_path / "bad.yaml", Outer)


def test_a_run_file_over_another_states_what_differs(tmp_path):
    (tmp_path / "base.yaml").write_text("name: a\nsteps: 3\nbatch: 2\ninner: {rate: 0.5}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "run.yaml").write_text("extends: ../base.yaml\nname: b\n")
    config = read_run_file(tmp_path / "deep" / "run.yaml", Outer, {"steps": 4})
    assert (config.name, config.steps, config.batch, config.inner.rate) == ("b", 4, 2, 0.5)
    (tmp_path / "base.yaml").write_text("extends: deep/run.yaml\n")
    with pytest.raises(ValueError, match="extends itself"):
        read_run_file(tmp_path / "base.yaml", Outer)
    (tmp_path / "deep" / "run.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(ValueError, match=r"no run file at .*none\.yaml \(which .*run\.yaml extends\)"):
        read_run_file(tmp_path / "deep" / "run.yaml", Outer)
