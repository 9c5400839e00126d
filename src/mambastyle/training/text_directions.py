"""A text direction of a model on disk: its generator draws pictures, a CLIP says what they show."""

from pathlib import Path
from typing import Literal

import torch

from mambastyle import checkpoints, published
from mambastyle.features.clip import Clip
from mambastyle.latents import text as text_latents
from mambastyle.latents.directions import Directions
from mambastyle.models.stylegan2 import Generator
from mambastyle.published.directions import StyleClipGlobal
from mambastyle.training.directions import find_files

Method = Literal["optimise", "global"]


def text_direction(
    model: str | Path,
    text: str,
    *,
    clip: str | Path,
    neutral: str = "a person",
    name: str | None = None,
    method: Method = "optimise",
    table: str | Path | None = None,
    threshold: float = 0.1,
    steps: int = 100,
    samples: int = 100,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Directions:
    """One direction, for the generator of a preset, a folder, or a checkpoint.

    method: "optimise" moves d by CLIP; "global" reads StyleCLIP's table (`fs3.npy`), or without one measures
    it in `samples` pictures per style channel. threshold: the table's beta; larger moves fewer channels.

    Raises ValueError for an unknown method, a folder without CLIP, or a table of another generator.
    """
    if method not in ("optimise", "global"):
        raise ValueError(f"expected the method optimise or global, got {method!r}")
    checkpoint = checkpoints.load(find_files(model)[0], kind="stylegan2")
    generator = Generator.from_checkpoint(checkpoint).to(device)
    generator.synthesis.keep_kernels()
    network = Clip(clip).to(device)
    offset = text_latents.text_offset(network.text, text, neutral)
    name = name or "-".join(text.split())
    if method == "optimise":
        found = text_latents.optimise(
            name, offset, generator, network, steps=steps, seed=seed, progress=progress
        )
    else:
        found = _table(table, generator, network, samples, seed, progress).direction(
            name, offset.cpu(), generator.cpu(), threshold=threshold
        )
    return Directions([found], generator=checkpoint.sha256)


def _table(
    path: str | Path | None, generator: Generator, clip: Clip, samples: int, seed: int, progress: bool
) -> StyleClipGlobal:
    if path is None:
        rows = text_latents.relevance(generator, clip, samples=samples, seed=seed, progress=progress)
        return StyleClipGlobal(rows.float().cpu())
    table = published.load(path)
    if not isinstance(table, StyleClipGlobal):
        raise ValueError(f"{path} is no table of StyleCLIP (fs3.npy, one row per style channel)")
    return table
