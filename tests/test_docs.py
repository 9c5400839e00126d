"""README and guides: each document's snippets run as they stand, in order, in a folder of small pictures.

What runs otherwise, or cannot run here, stands in the tables below with the reason. Every command of every
document is parsed at least, so that its options exist.
"""

import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

import mambastyle
from mambastyle import images
from mambastyle.cli import app, main
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.presets import PRESETS
from mambastyle.published import stylegan2
from tests import api_reference
from tests.training.test_features import random_squeezenet

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RUN = [
    ROOT / "README.md",
    ROOT / "docs" / "big_jobs.md",
    ROOT / "docs" / "export.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
PARSED = list(dict.fromkeys([*RUN, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]))
# Documents whose snippets take longer than ten seconds together.
LONG = {"train", "big_jobs", "export"}
# Documents that export, which the shape checker cannot see through.
UNCHECKED = {"export"}
# Run by a test of its own, which makes the published files that it reads: tests/test_own_mambastyle.py.
ELSEWHERE = {"your-own-mambastyle"}

# command -> (what runs in its place, why)
SUBSTITUTED = {
    "mambastyle invert examples/ --method encoder+optimise": (
        "mambastyle invert examples/kaokore_00007421.webp --method encoder+optimise --steps 2",
        "eight faces take seconds each",
    ),
    "mambastyle invert face.png --method encoder+optimise": (
        "mambastyle invert face.png --method encoder+optimise --steps 2",
        "a hundred steps take seconds",
    ),
    "mambastyle invert face.png --method pti": (
        "mambastyle invert face.png --method pti --steps 2",
        "hundreds of steps take a minute",
    ),
    "mambastyle edit photo.jpg -e age=2 --faces --model ffhq/": (
        "mambastyle edit photo.jpg -e gender=2 --landmarks landmarks.json",
        "no model of aligned faces comes with the package, and no face is in the test's photo",
    ),
    "mambastyle directions discover my-model/directions.safetensors --model my-model --method pca": (
        "mambastyle directions discover my-model/directions.safetensors --model my-model --method pca"
        " --samples 100",
        "10,000 latents take longer",
    ),
    "mambastyle train gan my-gan.yaml": (
        "mambastyle train gan my-gan.yaml -s steps=1 -s batch=4 -s precision=fp32",
        "a run takes hours",
    ),
    "mambastyle train inversion my-inversion.yaml": (
        "mambastyle train inversion my-inversion.yaml -s steps=1 -s batch=4 -s precision=fp32",
        "a run takes hours",
    ),
    "mambastyle train style-transfer my-style.yaml": (
        "mambastyle train style-transfer my-style.yaml -s steps=1 -s batch=2 -s precision=fp32",
        "a run takes an hour",
    ),
    "mambastyle batch edit faces/ -e gender=1.5 --out edited --engine ray --workers 8": (
        "mambastyle batch edit faces/ -e gender=1.5 --out edited --engine ray --workers 1",
        "eight workers take longer to start",
    ),
    "mambastyle evaluate inversion --pack my-pictures -m my-model --report out/table": (
        "mambastyle evaluate inversion --pack my-pictures -m my-model --count 2 --report out/table",
        "the held-out pictures of a real pack take longer",
    ),
}

# command -> why it does not run here
NOT_RUN = {
    "mambastyle serve --open": "it serves until it is stopped; tests/ui runs it in a browser",
    "mambastyle train gan recipes/gan-kaokore64-1.yaml": "its pictures are not in the repository",
    "mambastyle train inversion recipes/faces1024.yaml": "published weights, a GPU; read by tests/training",
    "mambastyle convert samam.pth -o samam.safetensors": "published weights; converted by tests/parity",
    "mambastyle stylize photo.jpg -s painting.jpg -m samam.safetensors": "published weights; as above",
    'mambastyle directions text "a person with glasses" glasses.safetensors --clip clip-vit-base-patch32': (
        "a CLIP; run with a small one by tests/training/test_text_directions.py"
    ),
    "mambastyle evaluate style-transfer --pack pairs.zip -m samam-small --also mamba-st=mamba-st-small"
    " --report table": "minutes; run by tests/evaluation",
}
# Programs that do not run here, and what is looked at instead.
OTHERS = {
    "pip": "extras and files exist",
    "make": "the target exists",
    "torchrun": "the command it starts is parsed",
}
# Programs that run here as in a shell.
SHELL = {"mkdir", "cp"}


def pieces(document: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a document, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)
    return [(language, text) for language, text in found if language in languages]


def commands(text: str) -> list[str]:
    """The command lines of a block, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in lines) if line]


def all_commands(documents: list[Path]) -> list[tuple[str, str]]:
    return [
        (document.name, line)
        for document in documents
        for _, text in pieces(document, "sh")
        for line in commands(text)
    ]


def parse(words: list[str]) -> None:
    """Find a subcommand of mambastyle and parse its options; SystemExit or an error where one is unknown."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"there is no {command.name} {name}"
        command = command.commands[name]
    command.make_context(command.name, words)


@pytest.mark.parametrize(("document", "line"), all_commands(PARSED))
def test_a_command_of_a_document_exists(document, line):
    program, *words = shlex.split(line)
    if "=" in program or program in ("export", *SHELL):
        return
    if program == "mambastyle":
        return parse(words)
    assert program in (*OTHERS, "python"), f"say in OTHERS what becomes of {line}"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words if "=" not in word} <= {*targets}
    elif program == "torchrun":
        parse(words[words.index("mambastyle") + 1 :])
    elif program == "python":
        file = words[words.index("-m") + 1].replace(".", "/") if "-m" in words else words[0]
        assert (ROOT / file).exists() or file == "build"
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[0] == "install"
        for word in words[1:]:
            named = re.fullmatch(r"(?:mambastyle|\.)\[([\w,]+)\]", word)
            assert named is None or set(named[1].split(",")) <= set(extras)
            if word.endswith(".txt"):
                assert (ROOT / word).is_file()


def test_the_tables_name_what_the_documents_say():
    said = {line for _, line in all_commands(RUN)}
    assert {*SUBSTITUTED, *NOT_RUN} <= said
    for line in [*SUBSTITUTED, *NOT_RUN]:
        if line in SUBSTITUTED:
            parse(shlex.split(SUBSTITUTED[line][0])[1:])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the documents call photos, paintings, faces, masks, weights and a video, small."""
    folder = tmp_path / "here"
    folder.mkdir()
    scenes = {name: images.fit(images.read(EXAMPLES / f"{name}.webp"), 64) for name in (
        "contents/mountains", "contents/still_life", "styles/strokes", "styles/waves", "styles/mosaic"
    )}  # fmt: skip
    for name, scene in {
        "photo.jpg": "contents/mountains",
        "painting.jpg": "styles/strokes",
        "waves.jpg": "styles/waves",
        "mosaic.jpg": "styles/mosaic",
        "photos/a.jpg": "contents/mountains",
        "photos/b.jpg": "contents/still_life",
        "paintings/a.jpg": "styles/strokes",
        "paintings/b.jpg": "styles/waves",
    }.items():
        images.write(folder / name, scenes[scene])
    for number, source in enumerate(sorted(EXAMPLES.glob("*.webp"))):
        images.write(folder / f"faces/{number}.png", images.fit(images.read(source), 64))
    shutil.copy(folder / "faces/0.png", folder / "face.png")
    half = torch.ones(3, 48, 64)
    half[:, 24:] = -1
    images.write(folder / "sky.png", half)
    images.write(folder / "ground.png", -half)
    (folder / "landmarks.json").write_text("[[24, 20], [40, 20], [32, 28], [26, 36], [38, 36]]")
    for name in ("recipes", "src"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "examples").mkdir()
    for path in EXAMPLES.iterdir():
        (folder / "examples" / path.name).symlink_to(path)
    for name in ("contents/mountains", "styles/waves"):
        (folder / "examples" / name.partition("/")[0]).unlink()
        images.write(folder / "examples" / f"{name}.png", scenes[name])
    # Kernels choose the folder of their machine code when they are imported: the next line would lose it.
    for scan in ("selective_scan", "ss2d_scan"):
        importlib.import_module(f"mambastyle.ops.{scan}.cpu_numba")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    monkeypatch.chdir(folder)
    return folder


def write_published(folder: Path) -> None:
    """Files as their authors publish them, small and with random weights."""
    config = StyleGAN2Config(z_dim=24, w_dim=24, mapping_layers=2, widths=(4,) * 9, feature_layer=0)
    state = {}
    for ours, tensor in Generator(config).state_dict().items():
        name = stylegan2._rosinality_name(ours)
        if ours.endswith("const"):
            tensor = tensor[None] if "blocks.0.const" in ours else tensor[None, None]
        elif name.endswith("conv.weight"):
            tensor = tensor[None]
        elif "to_rgb" in name and name.endswith(".bias") and "modulation" not in name:
            tensor = tensor.reshape(1, 3, 1, 1)
        elif ours.endswith("noise_strength"):
            tensor = tensor.reshape(1)
        state[name] = tensor.clone()
    torch.save({"g_ema": state, "latent_avg": state.pop("latent_avg")}, folder / "ffhq.pkl")
    np.save(folder / "age_w_boundary.npy", np.random.default_rng(0).normal(size=(1, 24)).astype(np.float32))


def write_squeezenet(folder: Path) -> None:
    """torchvision's file, with random weights."""
    tensors = load_file(random_squeezenet(folder / "random.safetensors"))
    torch.save(tensors, folder / "squeezenet1_0-b66bff10.pth")


def write_clip(folder: Path) -> None:
    from tests.test_video import save_clip

    save_clip(folder / "clip.mp4", [(200, 30, 60), (20, 180, 60)])


def write_shards(folder: Path) -> None:
    """A webdataset of two samples, each with a label."""
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "000000.tar", "w") as archive:
        for number in range(2):
            archive.add(folder / f"faces/{number}.png", f"{number}.png")
            label = tarfile.TarInfo(f"{number}.txt")
            label.size = 1
            archive.addfile(label, io.BytesIO(b"1"))


# What a document reads -> what makes it.
MADE = {
    "shards/": write_shards,
    "ffhq.pkl": write_published,
    "squeezenet1_0-b66bff10.pth": write_squeezenet,
    "clip.mp4": write_clip,
}


class Reader:
    """Does what a document says, piece by piece."""

    def __init__(self, monkeypatch, capsys) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.names: dict = {}

    def read(self, document: Path) -> None:
        for language, text in pieces(document, "python", "sh", "yaml"):
            if language == "python":
                exec(compile(text, document.name, "exec"), self.names)
            elif language == "yaml":
                name = re.match(r"# (\S+\.yaml)\n", text)
                assert name, f"the first line of a YAML block names its file: {text}"
                Path(name[1]).write_text(text)
            else:
                for line in commands(text):
                    self.run(line)

    def run(self, line: str) -> None:
        if line in NOT_RUN:
            return
        program, *words = shlex.split(SUBSTITUTED.get(line, (line,))[0])
        if program == "export":
            self.monkeypatch.setenv(*words[0].split("=", 1))
        elif program in SHELL:
            subprocess.run([program, *words], check=True)
        elif program == "mambastyle":
            self.monkeypatch.setattr(sys, "argv", [program, *words])
            code: object = 0
            try:
                main()
            except SystemExit as stopped:
                code = stopped.code
            assert not code, f"{line}: {self.capsys.readouterr().err}"
        elif program == "python":
            subprocess.run([sys.executable, *words], check=True)
        else:
            assert program in OTHERS, line


@pytest.fixture
def made_by_hand():
    """Guides may put modules where imports find them."""
    yield
    for name in [name for name, module in sys.modules.items() if getattr(module, "__spec__", None) is None]:
        if name.partition(".")[0] == "mamba_ssm":
            del sys.modules[name]


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            path,
            marks=[pytest.mark.thorough] * (path.stem in LONG)
            + [pytest.mark.no_shape_checks] * (path.stem in UNCHECKED),
        )
        for path in RUN
        if path.stem not in ELSEWHERE
    ],
    ids=lambda path: path.stem,
)
def test_a_document_runs(document, folder, made_by_hand, monkeypatch, capsys):
    text = document.read_text(encoding="utf-8")
    for preset in PRESETS.values():
        if preset.name in text and preset.missing():
            pytest.skip(f"this installation lacks the weights of {preset.name}")
    for name, make in MADE.items():
        if name in text:
            make(folder)
    assert pieces(document, "python", "sh")
    Reader(monkeypatch, capsys).read(document)


@pytest.mark.parametrize("document", PARSED, ids=lambda path: path.stem)
def test_links_and_names_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (document.parent / target).exists(), target
    for name in re.findall(r"`(mambastyle(?:\.\w+)+)(?:\(\))?`", text):
        api_reference.resolve(name)


def test_the_api_reference_is_that_of_the_code():
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == api_reference.text(), "make it again: python -m tests.api_reference > docs/api.md"


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mambastyle.__version__
    assert [reference["title"].partition(":")[0] for reference in citation["references"]] == [
        "MambaStyle",
        "Mamba-ST",
        "SaMam",
    ]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^]]+)\]", changes, re.M)[0] in (mambastyle.__version__, "Unreleased")
