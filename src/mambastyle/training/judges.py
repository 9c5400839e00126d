"""The frozen networks that compare pictures in a training step: one judge, one loss term."""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle import published
from mambastyle.compute import channels_last
from mambastyle.features import identity, small
from mambastyle.features.face_parsing import FaceParsingUNet
from mambastyle.features.identity import ArcFace
from mambastyle.features.lpips import LPIPS
from mambastyle.features.squeezenet import SqueezeNetFeatures
from mambastyle.losses import inversion as losses
from mambastyle.losses.reconstruction import Maps, at_size
from mambastyle.training.config import Section

Module = TypeVar("Module", bound=nn.Module)
Term = Literal["perceptual", "identity", "structure"]
_DISTANCES = {
    "perceptual": losses.perceptual,
    "identity": losses.identity,
    "structure": losses.structure,
}
# LPIPS is quoted at this size, and it is the input of ArcFace's crop.
_SIZE = 256
_PARSING_SIZE = 512


class JudgeSection(Section):
    """A frozen network that compares pictures; its term has the key's name, as has its weight.

    | network | file | compares |
    |---|---|---|
    | lpips | the linear layers as published, with `backbone` | pictures at 256 px, by LPIPS 0.1 |
    | arcface | model_ir_se50.pth, or converted | the face of a picture framed as FFHQ, at five depths |
    | face-parsing | the U-Net of CelebAMask-HQ, or converted | pictures at 512 px, at five levels |
    | squeezenet | torchvision's, by default from the environment | maps at 256 px |
    | small | our own checkpoint | maps at 256 px |
    """

    network: Literal["lpips", "arcface", "face-parsing", "squeezenet", "small"]
    file: str | None = None
    backbone: str | None = None
    """lpips: torchvision's file of the backbone, where `file` holds the linear layers alone."""
    layers: tuple[str, ...] = ()
    """Its maps to compare; empty for all. LPIPS compares those that its weights are for."""


class Judge:
    """How far a rendered picture is from its target, in the eyes of one network: one unweighted term."""

    def __init__(self, term: Term, section: JudgeSection, device: torch.device) -> None:
        self.distance = _DISTANCES[term]
        self.lpips: LPIPS | None = None
        self.see: Callable[[Tensor], Maps] = lambda image: {}
        if section.network == "lpips":
            if term != "perceptual" or section.layers:
                raise ValueError(
                    f"lpips is a distance with weights of its own: name it under perceptual, not {term}, "
                    "and without layers"
                )
            self.lpips = _published(section, device, LPIPS)
        else:
            self.see = _eyes(section, device)

    def __call__(
        self, rendered: Float[Tensor, "batch 3 height width"], target: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """Gradients reach `rendered` alone."""
        if self.lpips is not None:
            return self.lpips(at_size(rendered, _SIZE), at_size(target, _SIZE)).mean()
        with torch.no_grad():
            wanted = self.see(target)
        return self.distance(self.see(rendered), wanted)


def _eyes(section: JudgeSection, device: torch.device) -> Callable[[Tensor], Maps]:
    """What a network sees in a picture: the chosen ones of its maps."""
    if section.network == "squeezenet":
        squeezenet = channels_last(SqueezeNetFeatures(section.file), device)
        return lambda image: squeezenet(at_size(image, _SIZE), section.layers or None)
    if section.network == "arcface":
        arcface = _published(section, device, ArcFace)
        return lambda image: _chosen(_as_maps(arcface.maps(identity.crop_face(image))), section)
    if section.network == "face-parsing":
        unet = _published(section, device, FaceParsingUNet)
        return lambda image: _chosen(unet.maps(F.adaptive_avg_pool2d(image, _PARSING_SIZE)), section)
    if section.file is None:
        raise ValueError(
            "the judge of network small needs a file: train one with recipes/features-judge.yaml"
        )
    network = channels_last(small.load(section.file), device)
    return lambda image: _chosen(network(at_size(image, _SIZE)), section)


def _published(section: JudgeSection, device: torch.device, kind: type[Module]) -> Module:
    """The network in a published file, or in what `mambastyle convert` made of it."""
    if section.file is None:
        raise ValueError(
            f"the judge of network {section.network} needs a file: name the published one "
            "(docs/guides/your-own-mambastyle.md says where it is from)"
        )
    network = published.load(section.file, backbone=section.backbone)
    if not isinstance(network, kind):
        raise ValueError(
            f"{section.file} holds a {type(network).__name__}, and the judge {section.network} needs "
            f"{kind.__name__}: name another file"
        )
    return network.to(device)


def _as_maps(found: dict[str, Tensor]) -> Maps:
    """Vectors as maps of one position."""
    return {name: value if value.ndim == 4 else value[:, :, None, None] for name, value in found.items()}


def _chosen(found: Maps, section: JudgeSection) -> Maps:
    if unknown := [name for name in section.layers if name not in found]:
        raise ValueError(
            f"{section.network} has no layers {', '.join(unknown)}: choose among {', '.join(found)}"
        )
    return {name: found[name] for name in section.layers or found}
