"""The networks that pictures are compared with: our own where no published one is at hand, always by name."""

import dataclasses
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle import published
from mambastyle.evaluation import metrics
from mambastyle.features import small
from mambastyle.features.identity import ArcFace, crop_face
from mambastyle.features.inception import FIDInception
from mambastyle.features.lpips import LPIPS
from mambastyle.features.small import SmallFeatures
from mambastyle.features.squeezenet import SqueezeNetFeatures, is_known
from mambastyle.losses.reconstruction import at_size
from mambastyle.presets import PRESETS

HEADINGS = {
    "lpips": "LPIPS",
    "perceptual_squeeze": "perceptual (SqueezeNet)",
    "fd_inception": "FID",
    "kd_inception": "KID x 1000",
    "fd_squeeze": "fd_squeeze",
    "kd_squeeze": "kd_squeeze x 1000",
    "fd_small": "fd_small",
    "kd_small": "kd_small x 1000",
    "identity": "identity (ArcFace)",
}
"""Columns by the key of a metric; only the metrics of FIDInception and LPIPS are called FID and LPIPS."""


@dataclasses.dataclass
class Judges:
    """The networks that distances are made with; a metric whose network is absent is left out."""

    squeeze: SqueezeNetFeatures | None = None
    small: SmallFeatures | None = None
    lpips: LPIPS | None = None
    inception: FIDInception | None = None
    identity: ArcFace | None = None

    @classmethod
    def found(cls, features: str | Path | None = None, judge_files: tuple[str | Path, ...] = ()) -> "Judges":
        """SqueezeNet where MAMBASTYLE_SQUEEZENET names it, the small network by path or of a preset.

        judge_files: published weights of LPIPS (as FILE,BACKBONE where they lie apart), the FID's Inception
        or ArcFace: what `mambastyle.published` reads.
        """
        packaged = [preset.folder / "features.safetensors" for preset in PRESETS.values()]
        small_file = features or next((file for file in packaged if file.is_file()), None)
        found = cls(
            SqueezeNetFeatures() if is_known() else None,
            None if small_file is None else small.load(small_file),
        )
        for file in judge_files:
            path, _, backbone = str(file).partition(",")
            network = published.load(path, backbone=backbone or None)
            if isinstance(network, LPIPS):
                found.lpips = network
            elif isinstance(network, FIDInception):
                found.inception = network
            elif isinstance(network, ArcFace):
                found.identity = network
            else:
                raise ValueError(f"{file} is no judge: give weights of LPIPS, the FID's Inception or ArcFace")
        return found

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that are here, by name."""
        return {
            field.name: network
            for field in dataclasses.fields(self)
            if (network := getattr(self, field.name)) is not None
        }

    @property
    def device(self) -> torch.device:
        """Where they compute; what comes back lies on the CPU."""
        tensors = (tensor for network in self.networks.values() for tensor in network.state_dict().values())
        return next((tensor.device for tensor in tensors), torch.empty(0).device)

    def to(self, device: torch.device) -> "Judges":
        """All on one device."""
        for network in self.networks.values():
            network.to(device)
        return self

    def measures(self, key: str) -> bool:
        """Whether a column can be filled: one with a network's name in its key needs it."""
        names = {field.name for field in dataclasses.fields(self)}
        return (names & set(key.split("_"))) <= self.networks.keys()

    def pooled(self, pictures: Float[Tensor, "count 3 height width"]) -> dict[str, Tensor]:
        """Features of a set by the suffix of their metrics: {"squeeze": (count, 512), "small": ...}."""
        return {
            name: metrics.pooled_features(network, pictures.to(self.device)).cpu()
            for name, network in self.networks.items()
            if name in ("inception", "squeeze", "small")
        }

    def set_distances(
        self, ours: dict[str, Tensor], theirs: dict[str, Tensor], of: str = ""
    ) -> dict[str, float]:
        """Frechet and kernel distances of `pooled` sets; the kernel's times 1000, with their deviation.

        The kernel's are of features divided by their size (metrics.kernel_distance), but for Inception's.
        """
        found = {}
        for name in ours:
            found[f"fd_{name}{of}"] = metrics.frechet_distance(ours[name], theirs[name])
            mean, deviation = metrics.kernel_distance(ours[name], theirs[name], normalise=name != "inception")
            found[f"kd_{name}{of}"] = 1000 * mean
            found[f"kd_{name}{of}_deviation"] = 1000 * deviation
        return found

    @torch.no_grad()
    def pair_distances(
        self, image: Float[Tensor, "batch 3 height width"], other: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Per picture the distance of two by each network that compares pairs, at 256 px at most."""
        image, other = (at_size(picture, 256).to(self.device) for picture in (image, other))
        found = {}
        if self.lpips is not None:
            found["lpips"] = self.lpips(image, other)
        if self.squeeze is not None:
            found["perceptual_squeeze"] = metrics.perceptual(self.squeeze, image, other)
        if self.identity is not None:
            found["identity"] = self.same_face(image, other)
        return {name: distance.cpu() for name, distance in found.items()}

    @torch.no_grad()
    def similarity(
        self, image: Float[Tensor, "batch 3 height width"], other: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """`metrics.identity` by our own small network; ValueError without it."""
        if self.small is None:
            raise ValueError("similarity takes the small network: name its weights")
        return metrics.identity(self.small.pooled, image.to(self.device), other.to(self.device)).cpu()

    @torch.no_grad()
    def same_face(
        self, image: Float[Tensor, "batch 3 height width"], other: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """`metrics.identity` by ArcFace; ValueError without it."""
        arcface = self.identity
        if arcface is None:
            raise ValueError("who a face is takes ArcFace: name its weights")
        image, other = image.to(self.device), other.to(self.device)
        return metrics.identity(lambda face: arcface(crop_face(face)), image, other).cpu()
