"""Discovers the directions of a model on disk: its generator draws pictures, its classifier labels them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from mambastyle import checkpoints
from mambastyle.features import small
from mambastyle.latents.directions import Directions
from mambastyle.latents.discover import discover as discover_in
from mambastyle.models.stylegan2 import Generator
from mambastyle.presets import PRESETS, find_model

# What the packaged classifier was trained on that generated faces can show; its other heads know photographs.
FACE_HEADS = ("gender", "status")


def discover(
    model: str | Path,
    *,
    method: Literal["pca", "boundary", "both"] | str = "both",
    heads: Sequence[str] | None = None,
    components: int = 10,
    samples: int = 10_000,
    truncation_psi: float = 1.0,
    conditional: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    classifier: str | Path | None = None,
    progress: bool = True,
) -> Directions:
    """Directions of a preset, a folder with generator.safetensors, or a generator checkpoint.

    classifier: features.safetensors by path; by default the one of the model's folder. heads: the questions
    to find boundaries for; by default gender and status, those of them that the classifier has.

    Raises checkpoints.CheckpointError for files that cannot be used, and ValueError where a boundary is
    asked for and there is no classifier, or a method is unknown.
    """
    if method not in ("pca", "boundary", "both"):
        raise ValueError(f"expected the method pca, boundary or both, got {method!r}")
    generator_path, features_path = find_files(model)
    features_path = features_path if classifier is None else Path(classifier)
    checkpoint = checkpoints.load(generator_path, kind="stylegan2")
    generator = Generator.from_checkpoint(checkpoint).to(device)
    network = None
    if method != "pca":
        if features_path is None:
            raise ValueError(
                f"boundaries need a classifier, and {model} has no features.safetensors:"
                " name one, or take pca"
            )
        network = small.load(features_path).to(device)
        if heads is None:
            known = {head.name for head in network.config.heads}
            heads = [head for head in FACE_HEADS if head in known]
        for head in heads:
            network.labels(head)
    return discover_in(
        generator,
        network,
        heads=heads or (),
        components=0 if method == "boundary" else components,
        samples=samples,
        truncation_psi=truncation_psi,
        conditional=conditional,
        seed=seed,
        progress=progress,
        generator_hash=checkpoint.sha256,
    )


def find_files(model: str | Path) -> tuple[Path, Path | None]:
    """The generator and the classifier of a model that need not have an inverter yet."""
    path = PRESETS[str(model)].folder if str(model) in PRESETS else Path(model).expanduser()
    if path.is_file() and checkpoints.read_header(path).kind == "stylegan2":
        features = path.with_name("features.safetensors")
        return path, features if features.is_file() else None
    if path.is_dir() and (path / "generator.safetensors").is_file():
        return find_files(path / "generator.safetensors")
    files = find_model(model)
    return files.generator, files.features
