"""Parity cases: the published state dict that a case describes, and the arrays it expects."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.golden import golden

FOLDER = Path(__file__).parent
TOLERANCE = 1e-3
"""Of the expected output's standard deviation, in float32: sums run in another order than the published."""


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published state dict of a case and its expected arrays."""
    case = json.loads((FOLDER / f"{name}.json").read_text())
    make = _stylegan2_weight if name.startswith("stylegan2") else golden.weight
    state = {
        key: torch.tensor(make(key, tuple(shape), case["seed"])) for key, shape in case["state_dict"].items()
    }
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return state, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def image(seed: int, batch: int, height: int, width: int) -> Tensor:
    """The image of a case, (batch, 3, height, width) in [-1, 1] as our networks take it."""
    return torch.from_numpy(golden.image(seed, batch, height, width, -1, 1))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the expected output's standard deviation."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.std()).item()


def _stylegan2_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The weights with the exceptions that the JSON of these cases lists."""
    leaf = name.rsplit(".", 1)[-1]
    mapping = name.startswith(("mapping", "style"))
    if leaf in ("kernel", "resample_filter"):
        taps = np.asarray([1, 3, 3, 1], np.float32)
        return np.outer(taps, taps) / 64
    if (
        leaf in ("noise_const", "const")
        or name.startswith("noises")
        or (leaf == "weight" and len(shape) >= 2)
    ):
        raw = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
        return (raw * (100 if mapping else 1)).astype(np.float32)
    if leaf == "noise_strength" or name.endswith("noise.weight"):
        return np.full(shape, 0.3, np.float32)
    value = golden.weight(name, shape, seed)
    return value + 1 if name.endswith(("affine.bias", "modulation.bias")) else value
