"""MambaStyle's encoder and fuser: tables from the authors' names to ours, applied rule by rule."""

import re
from collections.abc import Mapping

from torch import Tensor

from mambastyle.models.mambastyle import Encoder, Fuser, MambaStyleConfig
from mambastyle.published.registry import Kind, State, fill

Rename = tuple[str, str | None]
"""A regular expression and what replaces it in a name; None drops the tensors whose names contain it."""

# The published VSSM blocks hold two tensors which no forward pass reads.
_VSS_BLOCK: tuple[Rename, ...] = (
    (r"\.skip_scale2$|\.in_style_proj\.", None),
    (r"^(.*SSD?2D_\d)\.self_attention\.", r"\1.block.ss2d."),
    (r"^(.*SSD?2D_\d)\.ln_1\.", r"\1.block.ln_pre."),
    (r"^(.*SSD?2D_\d)\.norm\.", r"\1.block.ln_post."),
    (r"^(.*SSD?2D_\d)\.skip_scale$", r"\1.block.skip_scale"),
)

# The published body is one flat list; blocks 2, 2, 5, 2 make its stages.
_BODY: tuple[Rename, ...] = (
    *(
        (rf"^body\.{first + block}\.", rf"body.stages.{stage}.{block}.")
        for stage, (first, blocks) in enumerate(((0, 2), (2, 2), (4, 5), (9, 2)))
        for block in reversed(range(blocks))
    ),
    (r"\.res_layer\.", ".residual."),
    (r"\.shortcut_layer\.", ".shortcut."),
)

MAMBASTYLE_ENCODER: tuple[Rename, ...] = (
    *_VSS_BLOCK,
    *_BODY,
    (r"^input_layer\.", "stem."),
    (r"^latlayer1\.", "lateral_middle."),
    (r"^latlayer2\.", "lateral_fine."),
    (r"^proj\.proj\.", "position.patches."),
    (r"^new_ps\.", "position.proj."),
    (r"^adapt_1\.", "to_feature."),
    *((rf"^SS2D_{scale + 1}\.", f"mixers.{scale}.") for scale in range(3)),
    *((rf"^output_layer_{scale + 1}\.0\.", f"heads.{scale}.norm.") for scale in range(3)),
    *((rf"^output_layer_{scale + 1}\.4\.", f"heads.{scale}.linear.") for scale in range(3)),
)
"""MambaStyle's encoder, faces, from the repository of its authors."""

MAMBASTYLE_FUSER: tuple[Rename, ...] = (
    *_VSS_BLOCK,
    (r"^latent_encoder\.conv1d_0\.", "direction_encoder.layers_to_tokens."),
    (r"^latent_encoder\.att_1\.", "direction_encoder.sequence_mixer."),
    (r"^latent_encoder\.conv1d_1\.", "direction_encoder.latent_to_grid."),
    (r"^latent_encoder\.SSD2D_1\.", "direction_encoder.coarse_mixer."),
    (r"^latent_encoder\.SSD2D_2\.", "direction_encoder.fine_mixer."),
    (r"^latent_encoder\.(depthwise|pointwise)_conv(\d)\.", r"direction_encoder.\1_\2."),
    (r"^latent_encoder\.conv(\d)\.", r"direction_encoder.conv_\1."),
    (r"^latent_encoder\.final_conv\.", "direction_encoder.conv_3."),
    (r"^approximator\.conv1\.", "pair_conv."),
    (r"^approximator\.conv2\.", "conv."),
    (r"^approximator\.SS2D_1\.", "mixer."),
    (r"^modulate_conv_(\d)\.", r"modulated_\1."),
)
"""MambaStyle's fuser; a convolution's leading axis of 1 is dropped as well."""


def rename(tensors: Mapping[str, Tensor], rules: tuple[Rename, ...]) -> dict[str, Tensor]:
    """Apply every rule to every name, in order; names that no rule touches stay."""
    renamed = {}
    for name, tensor in tensors.items():
        if any(new is None and re.search(old, name) for old, new in rules):
            continue
        for old, new in rules:
            if new is not None:
                name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def mambastyle_fuser(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fuser's tensors under our names and in our shapes."""
    renamed = rename(tensors, MAMBASTYLE_FUSER)
    return {name: tensor[0] if tensor.ndim == 5 else tensor for name, tensor in renamed.items()}


def mambastyle_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors under our names."""
    return rename(tensors, MAMBASTYLE_ENCODER)


def build_encoder(state: State, *, config: MambaStyleConfig | None = None) -> Encoder:
    """The encoder from the authors' state dict; `config` for another generator than the 1024 px faces one."""
    tensors = mambastyle_encoder(state)
    return fill("mambastyle-encoder", lambda: Encoder(config or MambaStyleConfig()), tensors)


def build_fuser(state: State, *, config: MambaStyleConfig | None = None) -> Fuser:
    """The fuser from the authors' state dict; `config` for another generator than the 1024 px faces one."""
    return fill("mambastyle-fuser", lambda: Fuser(config or MambaStyleConfig()), mambastyle_fuser(state))


_SOURCE = "the repository of MambaStyle's authors (arXiv 2505.15822)"
_LICENCE = "as its authors state; no weights were published when this was written"
KINDS = {
    "mambastyle-encoder": Kind(
        build_encoder,
        (r"input_layer\.0\.weight", r"latlayer1\.weight", r"SS2D_1\.skip_scale"),
        source=_SOURCE,
        licence=_LICENCE,
    ),
    "mambastyle-fuser": Kind(
        build_fuser,
        (r"latent_encoder\.conv1d_0\.weight", r"approximator\.conv1\.weight"),
        source=_SOURCE,
        licence=_LICENCE,
    ),
}
