"""Stand-ins for published files: random numbers in their layouts, small where a layout allows it."""

import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mambastyle.features.face_parsing import FaceParsingUNet
from mambastyle.features.identity import ArcFace
from mambastyle.features.lpips import LPIPS
from mambastyle.models.mambastyle import MambaStyleConfig
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config

GENERATOR = StyleGAN2Config(
    resolution=32, z_dim=24, w_dim=24, mapping_layers=2, widths=(8, 8, 12, 8), feature_layer=0
)
MODEL = MambaStyleConfig(
    image_size=32,
    num_ws=8,
    w_dim=24,
    widths=(8, 8, 12, 16),
    blocks=(1, 1, 1, 1),
    strides=(2, 1, 2, 2),
    fpn_width=8,
    position_patch=4,
    position_grid=5,
    latent_split=(2, 2, 4),
    head_pools=((4, 3, 3), (4, 3, 3), (4, 2, 2)),
    feature_channels=12,
    feature_layer=5,
    direction_tokens=8,
    direction_grid=4,
    direction_width=8,
    direction_widths=(8, 8, 8),
    state=2,
)
"""Fits GENERATOR; other tests change a few of its sizes."""


def write_generator_pickle(path: Path, *, seed: int = 0) -> None:
    """GENERATOR as NVIDIA's repositories pickle theirs: persistent objects inside of {"G_ema": ...}."""
    torch.manual_seed(seed)
    generator = Generator(GENERATOR)
    generator.mapping.w_avg.normal_()
    root = _module("Generator")
    for name, tensor in generator.state_dict().items():
        name = re.sub(r"^mapping\.fc\.", "mapping.fc", name)
        name = re.sub(r"^synthesis\.blocks\.(\d+)\.", lambda m: f"synthesis.b{4 << int(m[1])}.", name)
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            module = module.state["_modules"].setdefault(parent, _module(parent))
        module.state["_buffers"][leaf] = tensor
    # Pickle looks the function up by its name, which in their repositories is this.
    theirs = types.ModuleType("torch_utils.persistence")
    theirs._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    packages = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": theirs}
    with mock.patch.dict(sys.modules, packages), open(path, "wb") as file:
        pickle.dump({"G": None, "D": None, "G_ema": root}, file)


def write_lpips(folder: Path) -> None:
    """LPIPS in its two files, under the names that the recipes say."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    lpips = {re.sub(r"^linear\.(\d)", r"lin\1.model.1", k): v for k, v in LPIPS("alex").state_dict().items()}
    linear = {name: tensor.abs() for name, tensor in lpips.items() if name.startswith("lin")}
    torch.save(linear, folder / "lpips_alex.pth")
    backbone = {name: tensor for name, tensor in lpips.items() if name not in linear}
    torch.save(backbone, folder / "alexnet-owt-7be5be79.pth")


def write_judges(folder: Path) -> None:
    """LPIPS, ArcFace and face parsing, under the names that the recipes say."""
    write_lpips(folder)
    arcface = {}
    for name, tensor in ArcFace().state_dict().items():
        name = name.replace(".residual.", ".res_layer.")
        arcface[re.sub(r"^(body\.\d+)\.shortcut\.", r"\1.shortcut_layer.", name)] = tensor
    torch.save(arcface, folder / "model_ir_se50.pth")
    torch.save(FaceParsingUNet().state_dict(), folder / "face_parsing_unet.pth")


class _Persistent:
    """One of NVIDIA's persistent objects."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        meta = {"type": "class", "version": 6, "module_src": "", "class_name": self.class_name}
        return _reconstruct_persistent_obj, (meta | {"state": self.state},)


def _module(class_name: str) -> _Persistent:
    return _Persistent(class_name, {"training": False, "_parameters": {}, "_buffers": {}, "_modules": {}})


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("nothing in a pickle is called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
