"""What all tests share: shapes checked as annotated, fixed seeds, and one tiny model on disk.

`pytest --no-shape-checks` runs without the checks. A test of what the code itself refuses (it says
`pytest.raises`), a compile test (it says `torch.compile`) and one marked `no_shape_checks` run without them
too: the checker would speak before the code does, and the compiler cannot see through it.
"""

import dataclasses
import inspect
import os
from pathlib import Path

import jaxtyping
import pytest
import torch

# Triton reads it when it is first imported. Without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# All but the scan's kernels: Numba compiles its functions from source and takes no wrapped ones.
CHECKED = [
    "mambastyle.api",
    "mambastyle.checkpoints",
    "mambastyle.data",
    "mambastyle.evaluation",
    "mambastyle.features",
    "mambastyle.images",
    "mambastyle.latents",
    "mambastyle.losses",
    "mambastyle.models",
    "mambastyle.nn",
    "mambastyle.ops.modulated_conv",
    "mambastyle.ops.resample",
    "mambastyle.ops.scan_paths",
    "mambastyle.ops.selective_scan.reference",
    "mambastyle.presets",
    "mambastyle.training",
    "mambastyle.video",
]
# An int is a float here, as PEP 484 has it.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
UNCHECKED_WORDS = ("pytest.raises(", "torch.compile(")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-shape-checks", action="store_true", help="do not execute the shape annotations")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_shape_checks: run this test without executed shape annotations")
    if not config.getoption("--no-shape-checks"):
        jaxtyping.install_import_hook(CHECKED, CHECKER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The page's tests come first: they take longest, and the other process does the rest meanwhile."""
    items.sort(key=lambda item: "ui" not in item.path.parts)


@pytest.fixture(autouse=True)
def _shape_checks(request: pytest.FixtureRequest):
    source = inspect.getsource(request.function)
    marked = request.node.get_closest_marker("no_shape_checks") is not None
    jaxtyping.config.update("jaxtyping_disable", marked or any(word in source for word in UNCHECKED_WORDS))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_generator_config():
    """16 px, 6 latents of 12, 10 channels at 16 px."""
    from mambastyle.models.stylegan2 import StyleGAN2Config

    return StyleGAN2Config(
        resolution=16, z_dim=12, w_dim=12, mapping_layers=2, widths=(8, 8, 10), feature_layer=5
    )


@pytest.fixture(scope="session")
def tiny_mambastyle_config():
    """Fits the tiny generator: pictures of 32 px, its feature at 16 px."""
    from tests.published_files import MODEL

    return dataclasses.replace(MODEL, num_ws=6, w_dim=12, latent_split=(2, 2, 2), feature_channels=10)


def save_tiny_model(folder: Path, generator_config, mambastyle_config, *, seed: int = 0) -> Path:
    """A whole model with random weights: generator, inversion, directions."""
    from mambastyle import checkpoints
    from mambastyle.latents.directions import Direction, Directions
    from mambastyle.models.mambastyle import MambaStyle
    from mambastyle.models.stylegan2 import Generator

    torch.manual_seed(seed)
    generator = Generator(generator_config)
    generator.mapping.w_avg.normal_()
    tensors = {f"generator.{name}": tensor for name, tensor in generator.state_dict().items()}
    path = folder / "generator.safetensors"
    sha256 = checkpoints.save(path, tensors, kind="stylegan2", config=generator_config)
    model = MambaStyle(mambastyle_config)
    checkpoints.save(
        folder / "inversion.safetensors", model.state_dict(), kind="mambastyle", config=mambastyle_config
    )
    num_ws, w_dim = generator_config.num_ws, generator_config.w_dim
    names = ("gender", "noble", "pc0")
    directions = [Direction.from_w(name, torch.randn(w_dim), num_ws) for name in names]
    Directions(directions, generator=sha256).save(folder / "directions.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_generator_config, tiny_mambastyle_config) -> Path:
    """A folder that `mambastyle.load` takes; do not write to it."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_tiny_model(folder, tiny_generator_config, tiny_mambastyle_config)


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory, tiny_generator_config, tiny_mambastyle_config) -> Path:
    """A model of the same sizes and other weights."""
    folder = tmp_path_factory.mktemp("other")
    return save_tiny_model(folder, tiny_generator_config, tiny_mambastyle_config, seed=1)


@pytest.fixture
def faces(tmp_path) -> list[Path]:
    """Three small pictures, not square, in a folder of their own."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "faces"
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = [folder / f"face{index}.png" for index in range(3)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(path)
    return paths


def save_tiny_stylizer(folder: Path, kind: str) -> Path:
    """A folder with a network that stylizes, with random weights."""
    from mambastyle import checkpoints
    from mambastyle.models.mamba_st import MambaST, MambaSTConfig
    from mambastyle.models.samam import SaMam, SaMamConfig

    torch.manual_seed(0)
    sizes = {"dim": 16, "state": 2, "patch": 4, "encoder_layers": 1, "decoder": ((8,), (8, 6), (4, 3))}
    if kind == "samam":
        config = SaMamConfig(**sizes, groups=1, squeeze=4, style_dim=6, embedder_steps=2)
        network = SaMam(config)
        with torch.no_grad():
            for parameter in network.parameters():
                # As after some training: a new SaMam does not depend on the style.
                if not parameter.any():
                    parameter.normal_(std=0.3)
    else:
        config = MambaSTConfig(**sizes, decoder_layers=2)
        network = MambaST(config)
    checkpoints.save(folder / f"{kind}.safetensors", network.state_dict(), kind=kind, config=config)
    return folder


@pytest.fixture(scope="session", params=["samam", "mamba-st"])
def tiny_stylizer_folder(request, tmp_path_factory) -> Path:
    """A folder that `mambastyle.load` makes a Stylizer of, one for each system; do not write to it."""
    return save_tiny_stylizer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def tiny_samam_folder(tmp_path_factory) -> Path:
    """SaMam alone, for what does not depend on the system."""
    return save_tiny_stylizer(tmp_path_factory.mktemp("samam-alone"), "samam")
