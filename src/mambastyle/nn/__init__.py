"""Blocks shared by two or more models."""

from mambastyle.nn.mamba import Mamba
from mambastyle.nn.ss2d import SS2D, SS2DConfig

__all__ = ["SS2D", "Mamba", "SS2DConfig"]
