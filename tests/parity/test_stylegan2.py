"""The synthesis equals NVIDIA's, by the golden 64 px case under our own names."""

import re

import torch
from tests.golden import cases

from mambastyle.models.stylegan2 import Generator, StyleGAN2Config


def our_name(name: str) -> str:
    name = re.sub(r"^mapping\.fc(\d+)", r"mapping.fc.\1", name)
    return re.sub(r"^synthesis\.b(\d+)\.", lambda m: f"synthesis.blocks.{int(m[1]).bit_length() - 3}.", name)


@torch.no_grad()
def test_nvidia_64():
    state, expected = cases.load("stylegan2_nvidia64")
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
    generator.load_state_dict(
        {our_name(name): tensor for name, tensor in state.items() if not name.endswith("resample_filter")}
    )
    ws = generator.mapping(cases.normal(400, 2, 128), truncation_psi=0.7)
    assert cases.error(ws, expected["ws"]) < cases.TOLERANCE
    assert cases.error(generator.synthesis(ws), expected["image"]) < cases.TOLERANCE
