"""The wheel and the sdist hold what is needed: in a fresh environment the demo runs from the wheel alone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


@pytest.mark.thorough
def test_the_demo_runs_from_the_wheel_in_a_fresh_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", str(wheel)], check=True, timeout=300)
    # The dependencies, torch above all, from the environment of this test; behind the wheel's own folder.
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(str(python), "-c", "import mambastyle; print(mambastyle.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    text = run(str(python.with_name("mambastyle")), "demo", "--out", "demo")
    assert "8 faces: L2 " in text
    assert (work / "demo" / "contact_sheet.png").is_file()


@pytest.mark.thorough
def test_what_is_in_the_wheel_and_the_sdist(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("examples/README.md", "weights/kaokore64/generator.safetensors", "api/inverter.py"):
        assert f"mambastyle/{name}" in names
    assert not [name for name in names if name.startswith("tests/")]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("README.md", "LICENSE", "pyproject.toml", "src/mambastyle/__init__.py", "tests/conftest.py"):
        assert name in inside
