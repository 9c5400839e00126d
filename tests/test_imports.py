"""Imports point downwards, have no effects, and never reach torchvision."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mambastyle

ROOT = Path(mambastyle.__file__).parent
LEVELS = {
    **dict.fromkeys(["ops", "allocator", "compute", "images", "video", "checkpoints", "files"], 0),
    **dict.fromkeys(["nn"], 1),
    **dict.fromkeys(["models", "features", "latents", "losses"], 2),
    **dict.fromkeys(["data", "training", "published", "presets"], 3),
    **dict.fromkeys(["evaluation", "api", "doctor", "export", "hub", "jobs"], 4),
    **dict.fromkeys(["cli", "ui", "__main__"], 5),
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported_parts(path: Path) -> set[str]:
    """The parts of mambastyle that a module imports, wherever in it the import stands."""
    package = ("mambastyle", *path.relative_to(ROOT).parts[:-1])
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names = [f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("mambastyle.")}
    return parts & LEVELS.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_the_same_or_a_lower_level(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = {"api", "ui"} if part == "ui" else {name for name in LEVELS if LEVELS[name] <= LEVELS[part]}
    assert imported_parts(path) <= allowed


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


EFFECTS = """
import importlib, os, pathlib, sys
root = pathlib.Path(sys.argv[1])
import mambastyle
assert "torch" not in sys.modules, "importing the package alone imports torch"
mambastyle.cli = importlib.import_module("mambastyle.cli")
assert "torch" not in sys.modules, "the command line imports torch before a command runs"
import torch
before = (torch.random.get_rng_state().sum().item(), torch.get_num_threads(), torch.get_default_dtype())
environment, folder = dict(os.environ), sorted(os.listdir("."))
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root.parent).with_suffix("").parts
    if not {"__main__", "gpu_triton", "gpu_tiles"} & set(parts):
        importlib.import_module(".".join(part for part in parts if part != "__init__"))
after = (torch.random.get_rng_state().sum().item(), torch.get_num_threads(), torch.get_default_dtype())
assert before == after, (before, after)
assert (environment, folder) == (dict(os.environ), sorted(os.listdir("."))), "environment or folder changed"
assert "torchvision" not in sys.modules
from mambastyle.ops import selective_scan
x, one = torch.ones(1, 4, 3, requires_grad=True), torch.ones(1, 1, 3)
selective_scan(x, x, -torch.ones(4, 1), one, one).sum().backward()
assert "torch._dynamo" not in sys.modules, "PyTorch's compiler takes as long to import as all the rest"
"""


def test_importing_every_module_has_no_effects_and_no_torchvision():
    assert run(EFFECTS, str(ROOT)) == ""


def test_help_does_not_import_torch():
    code = """
import sys
from mambastyle.cli import main
sys.argv = ["mambastyle", *sys.argv[1:]]
try:
    main()
finally:
    assert not {"torch", "numpy", "PIL"} & sys.modules.keys()
"""
    for arguments in (["--help"], ["edit", "--help"], ["train", "gan", "--help"]):
        assert "Usage: mambastyle" in run(code, *arguments)


def test_public_names_are_there():
    for name in mambastyle.__all__:
        assert getattr(mambastyle, name) is not None
    assert set(mambastyle.__all__) <= set(dir(mambastyle))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = mambastyle.laod
