"""The frozen networks that judge: VGG-19, LPIPS, ArcFace, face parsing and the FID's Inception."""

import re
from collections.abc import Callable, Mapping

from mambastyle.features import vgg
from mambastyle.features.face_parsing import FaceParsingUNet
from mambastyle.features.identity import ArcFace
from mambastyle.features.inception import FIDInception
from mambastyle.features.lpips import LPIPS, Backbone
from mambastyle.features.vgg import VGG19, NormalisedVGG19
from mambastyle.published.registry import Kind, State, fill
from mambastyle.published.unpickler import PublishedError

# Index of each convolution in the published Sequential, by the rectifier behind it.
_VGG19 = dict(zip(vgg.LAYERS, (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34), strict=True))
_NORMALISED = dict(
    zip(vgg.LAYERS, (2, 5, 9, 12, 16, 19, 22, 25, 29, 32, 35, 38, 42, 45, 48, 51), strict=True)
)

_CLASSIFIER = (r"classifier\..*",)
_DEEPER = (r"(45|48|51)\..*",)
# lins.* are the same tensors as lin* again.
_LPIPS_REST = (r"classifier\..*", r"lins\..*", r"scaling_layer\..*")
_LOGITS = (r"fc\..*", r"AuxLogits\..*")


def _vgg_name(prefix: str, indices: Mapping[str, int]) -> Callable[[str], str]:
    def published(name: str) -> str:
        name = name.replace("colours.", "0.")
        return re.sub(r"^convs\.(\w+)\.", lambda match: f"{prefix}{indices[match[1]]}.", name)

    return published


def build_vgg19(state: State) -> VGG19:
    """VGG-19 under torchvision's names; its classifier is left out."""
    name = _vgg_name("features.", _VGG19)
    return fill("vgg19", VGG19, state, published=name, ignore=_CLASSIFIER)


def build_vgg_normalised(state: State) -> NormalisedVGG19:
    """The normalised VGG-19 under the indices of its Sequential; what stands behind relu5_1 is left out."""
    name = _vgg_name("", _NORMALISED)
    return fill("vgg-normalised", NormalisedVGG19, state, published=name, ignore=_DEEPER)


def build_lpips(backbone: Backbone) -> Callable[[State], LPIPS]:
    """Reads torchvision's backbone and LPIPS's `lin*` together, or the state dict of the package `lpips`."""
    kind = f"lpips-{backbone}"

    def build(state: State) -> LPIPS:
        renamed = {re.sub(r"^net\.slice\d\.", "features.", name): tensor for name, tensor in state.items()}
        if "features.0.weight" not in renamed:
            raise PublishedError(
                f"{kind}: lacks the backbone: give torchvision's tensors (features.*) together with lin*"
            )
        return fill(
            kind,
            lambda: LPIPS(backbone),
            renamed,
            published=lambda name: re.sub(r"^linear\.(\d)\.", r"lin\1.model.1.", name),
            ignore=_LPIPS_REST,
        )

    return build


def build_arcface(state: State) -> ArcFace:
    """ArcFace with IR-SE50, as the inversion repositories share it."""

    def published(name: str) -> str:
        name = re.sub(r"^(body\.\d+)\.residual\.", r"\1.res_layer.", name)
        return re.sub(r"^(body\.\d+)\.shortcut\.", r"\1.shortcut_layer.", name)

    return fill("arcface-irse50", ArcFace, state, published=published)


def build_face_parsing(state: State) -> FaceParsingUNet:
    """The U-Net of CelebAMask-HQ's face parsing."""
    return fill("face-parsing-unet", FaceParsingUNet, state)


def build_inception(state: State) -> FIDInception:
    """The FID's Inception; its last layer (logits) is left out."""
    return fill("fid-inception", FIDInception, state, ignore=_LOGITS)


def _lpips_kind(backbone: Backbone, *layers: str) -> Kind:
    names = tuple(rf"(features|net\.slice\d)\.{layer}\.weight" for layer in layers)
    return Kind(
        build_lpips(backbone),
        (r"lin0\.model\.1\.weight", *names),
        source="richzhang/PerceptualSimilarity, with a backbone of torchvision",
        licence="linear layers BSD-2-Clause; backbone as torchvision states",
        ignore=_LPIPS_REST,
    )


KINDS = {
    "lpips-alex": _lpips_kind("alex", "8", "10"),
    "lpips-vgg": _lpips_kind("vgg", "28"),
    "lpips-squeeze": _lpips_kind("squeeze", r"3\.squeeze"),
    "vgg19": Kind(
        build_vgg19,
        (r"features\.34\.weight",),
        source="torchvision",
        licence="BSD-3-Clause code; trained on ImageNet",
        ignore=_CLASSIFIER,
    ),
    "vgg-normalised": Kind(
        build_vgg_normalised,
        (r"0\.weight", r"42\.weight"),
        source="xunhuang1995/AdaIN-style and the style-transfer repositories that share its file",
        licence="MIT code; trained on ImageNet",
        ignore=_DEEPER,
    ),
    "arcface-irse50": Kind(
        build_arcface,
        (r"input_layer\.0\.weight", r"body\.23\.res_layer\.1\.weight", r"output_layer\.3\.weight"),
        source="TreB1eN/InsightFace_Pytorch",
        licence="MIT code; trained on MS-Celeb-1M, for research",
    ),
    "face-parsing-unet": Kind(
        build_face_parsing,
        (r"center\.conv1\.0\.weight", r"up_concat4\.up\.weight"),
        source="switchablenorms/CelebAMask-HQ",
        licence="trained on CelebAMask-HQ: no commercial use",
    ),
    "fid-inception": Kind(
        build_inception,
        (r"Mixed_7c\.branch_pool\.conv\.weight",),
        source="mseitzer/pytorch-fid",
        licence="Apache-2.0",
        ignore=_LOGITS,
    ),
}
