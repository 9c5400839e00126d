"""The style-transfer networks as their authors publish them: Mamba-ST and SaMam."""

import re

from torch import Tensor

from mambastyle.models.mamba_st import MambaST, MambaSTConfig
from mambastyle.models.samam import SAMAM_PATCH4, SaMam, SaMamConfig
from mambastyle.published.registry import Kind, State, fill
from mambastyle.published.unpickler import PublishedError

Rename = tuple[str, str]
"""What to find in one of our names, and what stands there in the published one."""

# ---- Mamba-ST

_MAMBA_ST: tuple[Rename, ...] = (
    (r"^embedding\.", "embedding."),
    (r"^content_encoder\.", "mamba.encoder_c.layers."),
    (r"^style_encoder\.", "mamba.encoder_s.layers."),
    (r"^st_decoder\.", "mamba.decoder.layers."),
    (r"^norm\.", "mamba.decoder.norm."),
    (r"^position\.proj\.", "mamba.new_ps."),
    (r"\.ln_pre\.", ".ln_1."),
    (r"\.ln_post\.", ".norm."),
    (r"\.ss2d\.", ".self_attention."),
)
# Read by no forward pass: a second skip in every block, a style projection in the encoders' blocks.
_MAMBA_ST_DEAD = (r".*\.skip_scale2", r"mamba\.encoder_[cs]\..*\.in_style_proj\.weight", r"mamba\.new_ps\..*")


def build_mamba_st(tensors: State, *, shuffle: bool = True, position: bool = False) -> MambaST:
    """Mamba-ST in the published sizes. `position` uses the positional code, which is off as published."""
    config = MambaSTConfig(shuffle=shuffle, position_grid=18 if position else None)
    convs = _conv_names(config.decoder, "decode")
    return fill(
        "mamba-st",
        lambda: MambaST(config),
        tensors,
        published=lambda name: _rename(name, (*_MAMBA_ST, *convs)),
        ignore=_MAMBA_ST_DEAD if not position else _MAMBA_ST_DEAD[:2],
    )


# ---- SaMam

_SAMAM: tuple[Rename, ...] = (
    (r"^(content|style)_encoder\.embedding\.", r"\1_encoder.0."),
    (r"^(content|style)_encoder\.blocks\.0\.", r"\1_encoder.1.SSM."),
    (r"^(content|style)_encoder\.blocks\.1\.", r"\1_encoder.2.SSM."),
    (r"^(content|style)_encoder\.loe\.", r"\1_encoder.3.loe."),
    (r"^style_embedder\.convs\.3\.", "global_embedder.downscale2.0."),
    *((rf"^style_embedder\.convs\.{i}\.", f"global_embedder.downscale.{3 * i}.") for i in range(3)),
    (r"^style_embedder\.fc\.", "global_embedder.fc."),
    (r"^groups\.(\d)\.loe\.", r"SAVSSGs.\1.LoE.loe."),
    (r"^groups\.(\d)\.blocks\.", r"SAVSSGs.\1.SAVSSMs."),
    (r"\.loe\.conv_1\.", ".cab.0."),
    (r"\.loe\.conv_2\.", ".cab.2."),
    (r"\.loe\.attention\.squeeze\.", ".cab.3.attention.1."),
    (r"\.loe\.attention\.expand\.", ".cab.3.attention.3."),
    (r"\.s7\.sain\.", ".SSM.SAIN."),
    (r"\.sain\.", ".SAIN1."),
    (r"\.(gamma|beta)\.", r".compress_\1.1."),
    (r"\.s7\.sconv\.kernel\.", ".SSM.SConv.compress_key.0."),
    (r"\.s7\.A_log\.", ".SSM.A_logs_generate.1."),
    (r"\.s7\.D\.", ".SSM.Ds_generate.1."),
    (r"\.s7\.", ".SSM."),
    (r"\.scan\.", "."),
    (r"\.scm\.conv\.", ".ca.conv_du.0."),
    (r"\.scm\.prelu\.", ".ca.conv_du.1."),
    (r"\.scm\.linear\.", ".ca.conv_du.2."),
)


def build_samam(tensors: State) -> SaMam:
    """SaMam in the published sizes; the tensors tell whether its patches have 8 px or 4."""
    patches = tensors.get("content_encoder.0.proj.weight")
    if patches is None or patches.ndim != 4 or patches.shape[-1] not in (4, 8):
        raise PublishedError("samam: lacks content_encoder.0.proj.weight (256, 3, 8, 8) or (256, 3, 4, 4)")
    base = SAMAM_PATCH4 if patches.shape[-1] == 4 else SaMamConfig()
    config = SaMamConfig(
        patch=base.patch, embedder_steps=base.embedder_steps, decoder=base.decoder, published=True
    )
    convs = _conv_names(config.decoder, "decoder.decoder")
    return fill(
        "samam",
        lambda: SaMam(config),
        {name: _as_ours(name, tensor) for name, tensor in tensors.items()},
        published=lambda name: _rename(name, (*_SAMAM, *convs)),
    )


def _as_ours(name: str, tensor: Tensor) -> Tensor:
    """Linear maps that are 1x1 convolutions over there and plain here, and the other way round."""
    if re.search(r"\.(compress_gamma|compress_beta|A_logs_generate|Ds_generate)\.1\.weight$", name):
        return tensor.flatten(1)
    if re.search(r"\.(in_proj|out_proj)\.weight$", name):
        return tensor[:, :, None, None]
    return tensor


# ---- Both


def _rename(name: str, rules: tuple[Rename, ...]) -> str:
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


def _conv_names(stages: tuple[tuple[int, ...], ...], prefix: str) -> tuple[Rename, ...]:
    """The published decoder is one flat list of pad, convolution, ReLU, and upsampling after each stage."""
    rules, index, number = [], 1, 0
    for stage in stages:
        for _ in stage:
            rules.append((rf"^cnn_decoder\.convs\.{number}\.", f"{prefix}.{index}."))
            index, number = index + 3, number + 1
        index += 1
    return tuple(rules)


KINDS = {
    "mamba-st": Kind(
        build_mamba_st,
        (r"mamba\.encoder_c\.layers\.0\.self_attention\.A_logs", r"decode\.28\.weight"),
        source="the repository of Mamba-ST",
        licence="as its authors state",
    ),
    "samam": Kind(
        build_samam,
        (r"SAVSSGs\.0\.SAVSSMs\.0\.SSM\.SConv\.compress_key\.0\.weight", r"global_embedder\.fc\.weight"),
        source="the repository of SaMam",
        licence="as its authors state",
    ),
}
