"""The facade: load a model and use it on pictures. One file for each system."""

import os

import torch

from mambastyle.api.inverter import Inverted, Inverter, load_inverter
from mambastyle.api.methods import METHODS
from mambastyle.api.stylizer import Stylizer, StylizeWarning, load_stylizer
from mambastyle.compute import Precision
from mambastyle.doctor import Finding, examine
from mambastyle.presets import StylizerFile, find

__all__ = [
    "METHODS",
    "Finding",
    "Inverted",
    "Inverter",
    "StylizeWarning",
    "Stylizer",
    "examine",
    "load",
    "load_inverter",
    "load_stylizer",
]


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
    batch_size: int = 16,
) -> Inverter | Stylizer:
    """Load a preset by name, or a model from disk: an Inverter or a Stylizer, by what it is.

    A model on disk is a folder with generator.safetensors and inversion.safetensors, or samam.safetensors or
    mamba-st.safetensors, or a folder with one of these. `device` is by default the accelerator where there is
    one, else the CPU. `precision` "bf16" runs products and convolutions in bfloat16: models of the published
    size take 0.58 to 0.74 of the time on a CPU that has it in hardware (`mambastyle doctor` says so; on GPUs
    it is not measured), and pictures change by half a level to one of 255 in the mean (docs/kernels.md).
    Hardware without it is slower in it; "auto" is "bf16" where it is there and "fp32" elsewhere. An Inverter
    runs `batch_size` pictures at once, a Stylizer one after the other.
    Raises checkpoints.CheckpointError when something is missing, damaged, or does not belong together, and
    ValueError for a device or precision that cannot be had.
    """
    if isinstance(find(source), StylizerFile):
        return load_stylizer(source, device=device, precision=precision)
    return load_inverter(source, device=device, precision=precision, batch_size=batch_size)
