"""Frozen networks that judge pictures: losses and distances are made of their features."""

from mambastyle.features.squeezenet import SqueezeNetFeatures

__all__ = ["SqueezeNetFeatures"]
