"""Frozen networks that judge pictures: losses and distances are made of their features."""

from mambastyle.features.small import SmallFeatures, SmallFeaturesConfig
from mambastyle.features.squeezenet import SqueezeNetFeatures

__all__ = ["SmallFeatures", "SmallFeaturesConfig", "SqueezeNetFeatures"]
