"""How good a generator's samples are: Frechet and kernel distances to real pictures, along a training."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mambastyle import checkpoints
from mambastyle.data.packs import Pack, from_bytes, open_pack
from mambastyle.evaluation import metrics
from mambastyle.evaluation.judges import HEADINGS, Judges
from mambastyle.evaluation.table import Table
from mambastyle.models.stylegan2 import Generator

COLUMNS = {
    "name": "generator",
    "pictures": "pictures shown",
    "fd_inception": HEADINGS["fd_inception"],
    "kd_inception": HEADINGS["kd_inception"],
    "fd_squeeze": HEADINGS["fd_squeeze"],
    "kd_squeeze": HEADINGS["kd_squeeze"],
    "precision": "precision",
    "recall": "recall",
    "fd_small": HEADINGS["fd_small"],
    "hatching": "hatching",
    "milliseconds": "ms per sample",
}

_NEIGHBOURS = 3
_NOTES = (
    "precision, recall: Kynkäänniemi et al. 2019, 3 neighbours, in the features of the row's first distance,"
    " on as many real pictures as samples.",
    "hatching: power of the finest diagonal detail, over that of the training pictures; 1 is natural.",
)


def run(
    generators: Sequence[str | Path],
    pack: str | Path,
    judges: Judges,
    *,
    count: int = 5000,
    batch: int = 100,
    truncation_psi: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Table:
    """One row per checkpoint, and one for the held-out real pictures: what a perfect generator would reach.

    Distances are to all training pictures of the pack (its rows with split "train"), at the generator's size.
    The same latents and the same noise, from `seed`, go through every checkpoint.
    """
    if not generators:
        raise ValueError(
            "no generator to evaluate: name checkpoints, such as runs/NAME/snapshots/*.safetensors"
        )
    opened = open_pack(pack)
    table: Table | None = None
    references: dict[str, Tensor] = {}
    for path in generators:
        checkpoint = checkpoints.load(path, kind="stylegan2")
        generator = Generator.from_checkpoint(checkpoint).to(device)
        size = generator.config.resolution
        if table is None:
            columns = {key: heading for key, heading in COLUMNS.items() if judges.measures(key)}
            table = Table(_title(opened, count, size, truncation_psi, seed), columns, notes=list(_NOTES))
            real = from_bytes(opened.select(split="train").load(size, progress=progress))
            held_out = from_bytes(opened.select(split="test").load(size, progress=progress))
            references = judges.pooled(real)
            row = {
                "name": f"{len(held_out)} held-out pictures",
                "hatching": metrics.hatching(held_out, real),
            }
            table.rows.append(row | _distances(judges, judges.pooled(held_out), references))
        started = time.perf_counter()
        fakes = draw(generator, count, batch, truncation_psi, seed, device, progress)
        milliseconds = 1e3 * (time.perf_counter() - started) / count
        row = {
            "name": Path(path).stem,
            "pictures": checkpoint.card.get("pictures"),
            "hatching": metrics.hatching(fakes, real),
            "milliseconds": milliseconds,
        }
        table.rows.append(row | _distances(judges, judges.pooled(fakes), references))
    if table is None:
        raise AssertionError("at least one generator was read")
    return table


@torch.inference_mode()
def draw(
    generator: Generator,
    count: int,
    batch: int,
    truncation_psi: float,
    seed: int,
    device: str | torch.device,
    progress: bool,
) -> Float[Tensor, "count 3 size size"]:
    """Samples of a generator, clamped and rounded to 8 bits as a file would hold them."""
    stream = torch.Generator(device).manual_seed(seed)
    out = []
    for start in tqdm(range(0, count, batch), desc="samples", disable=not progress, leave=False):
        number = min(batch, count - start)
        z = torch.randn(number, generator.config.z_dim, generator=stream, device=device)
        fake = generator(z, truncation_psi=truncation_psi, noise="random", generator=stream)
        out.append(((fake.clamp(-1, 1) + 1) * 127.5).round().div(127.5).sub(1).cpu())
    return torch.cat(out)


def _distances(judges: Judges, fakes: dict[str, Tensor], reals: dict[str, Tensor]) -> dict[str, float]:
    row = judges.set_distances(reals, fakes)
    # Of the best network at hand, as many reals as fakes: a manifold grows with its number of pictures.
    name = next(iter(fakes), None)
    if name is not None and min(len(fakes[name]), len(reals[name])) > _NEIGHBOURS:
        some = min(len(fakes[name]), len(reals[name]))
        found = metrics.precision_recall(reals[name][:some], fakes[name][:some], _NEIGHBOURS)
        row |= dict(zip(("precision", "recall"), found, strict=True))
    return row


def _title(pack: Pack, count: int, size: int, truncation_psi: float, seed: int) -> str:
    return (
        f"{count} samples (psi {truncation_psi:g}, random noise, seed {seed}) against the training pictures "
        f"of {pack.path.stem}, {size} px"
    )
