"""The synthesis equals NVIDIA's, by the golden 64 px case and a rename of its tensors."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from tests.golden import golden

from mambastyle.models.stylegan2 import Generator, StyleGAN2Config

GOLDEN = Path(__file__).parents[1] / "golden"


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The case's weights with its exceptions (see `weights` in the JSON)."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("noise_const", "const") or (leaf == "weight" and len(shape) >= 2):
        raw = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
        return raw * (100 if name.startswith("mapping") else 1)
    if leaf == "noise_strength":
        return np.asarray(0.3)
    value = golden.weight(name, shape, seed)
    return value + 1 if name.endswith("affine.bias") else value


def our_name(name: str) -> str:
    name = re.sub(r"^mapping\.fc(\d+)", r"mapping.fc.\1", name)
    return re.sub(r"^synthesis\.b(\d+)\.", lambda m: f"synthesis.blocks.{int(m[1]).bit_length() - 3}.", name)


def test_nvidia_64():
    case = json.loads((GOLDEN / "stylegan2_nvidia64.json").read_text())
    expected = np.load(GOLDEN / "stylegan2_nvidia64.npz")
    config = StyleGAN2Config(
        resolution=64,
        z_dim=128,
        w_dim=128,
        mapping_layers=4,
        channel_base=4096,
        channel_max=128,
        feature_layer=0,
    )
    generator = Generator(config)
    state = {
        our_name(name): torch.tensor(np.asarray(weight(name, tuple(shape), case["seed"]), dtype=np.float32))
        for name, shape in case["state_dict"].items()
        if not name.endswith("resample_filter")
    }
    generator.load_state_dict(state)
    z = torch.tensor(np.random.RandomState(400).standard_normal((2, 128)).astype(np.float32))
    with torch.no_grad():
        ws = generator.mapping(z, truncation_psi=0.7)
        image = generator.synthesis(ws, noise="const")
    for got, name in ((ws, "ws"), (image, "image")):
        error = np.abs(got.numpy() - expected[name]).max() / expected[name].std()
        assert error < 1e-3, (name, error)
