"""StyleGAN2 generators: NVIDIA's .pkl (stylegan2-ada-pytorch, stylegan3) and the .pt of inversion work.

Both store the up-convolution as torch's transposed convolution applies it, and so do we: none is flipped.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.published.registry import Kind, State, fill, logger
from mambastyle.published.unpickler import Persistent, PublishedError, StoredTensor

W_AVG_SAMPLES = 100_000
_PAPER_LAYER = 9


# ---- NVIDIA's pickles


def nvidia_state(network: Persistent) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The state dict of a pickled generator, and what `build_nvidia` cannot see in it (as its options)."""
    if network.class_name != "Generator":
        raise PublishedError(f"expected NVIDIA's Generator, got a {network.class_name!r:.60}")
    tensors: dict[str, StoredTensor] = {}
    settings: dict[str, Any] = {}

    def walk(module: Any, prefix: str, depth: int) -> None:
        state = getattr(module, "state", None)
        # A hostile file may hold a module inside itself, or one module under very many names.
        if (
            not isinstance(module, Persistent)
            or not isinstance(state, dict)
            or depth > 8
            or len(tensors) > 5000
        ):
            raise PublishedError(f"{prefix or 'the network'} is no module of NVIDIA's Generator")
        skipped = state.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, tensor in dict(state.get(group) or {}).items():
                if isinstance(tensor, StoredTensor) and name not in skipped:
                    tensors[f"{prefix}{name}"] = tensor
        for name in ("conv_clamp", "bias_gain", "architecture", "img_channels"):
            if isinstance(state.get(name), int | float | str):
                settings[f"{prefix}{name}"] = state[name]
        for name, child in dict(state.get("_modules") or {}).items():
            if child is not None:
                walk(child, f"{prefix}{name}.", depth + 1)

    walk(network, "", 0)
    options: dict[str, Any] = {}
    for name, value in settings.items():
        if name.endswith("architecture") and value != "skip":
            raise PublishedError(
                f"its architecture is {str(value)[:20]!r}, and only 'skip' (StyleGAN2) is read"
            )
        if name.endswith("conv1.conv_clamp"):
            options["conv_clamp"] = float(value)
        if name == "mapping.fc0.bias_gain":
            options["mapping_lr_multiplier"] = float(value)
    return tensors, options


def build_nvidia(
    state: State,
    *,
    feature_layer: int | None = None,
    conv_clamp: float | None = None,
    mapping_lr_multiplier: float = 0.01,
    w_avg_samples: int = W_AVG_SAMPLES,
) -> Generator:
    """A generator from the state dict of stylegan2-ada-pytorch, unconditional or conditional.

    feature_layer: where a feature is added; by default 9 (64 px) as in MambaStyle, where the network has it.
    conv_clamp, mapping_lr_multiplier: settings of the training that no tensor shows (`load` reads them).
    w_avg_samples: latents to estimate `mapping.w_avg` from, should the file lack it.
    """
    sides = sorted(
        int(m[1]) for name in state if (m := re.fullmatch(r"synthesis\.b(\d+)\.torgb\.weight", name))
    )
    layers = sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in state)
    _require(state, "stylegan2-nvidia", "synthesis.b4.const", "mapping.fc0.weight")
    embed = state.get("mapping.embed.weight")
    w_dim, width = (
        _shape(state, f"mapping.fc{layers - 1}.weight", 2)[0],
        _shape(state, "mapping.fc0.weight", 2)[1],
    )
    config = _config(
        sides,
        widths=[_shape(state, f"synthesis.b{side}.torgb.weight", 4)[1] for side in sides],
        feature_layer=feature_layer,
        z_dim=width - (w_dim if embed is not None else 0),
        w_dim=w_dim,
        c_dim=0 if embed is None else embed.shape[-1],
        mapping_layers=layers,
        mapping_lr_multiplier=mapping_lr_multiplier,
        conv_clamp=conv_clamp,
    )

    def published(name: str) -> str:
        name = re.sub(r"^mapping\.fc\.", "mapping.fc", name)
        return re.sub(r"^synthesis\.blocks\.(\d+)\.", lambda m: f"synthesis.b{4 << int(m[1])}.", name)

    generator = fill(
        "stylegan2-nvidia",
        lambda: Generator(config),
        state,
        published=published,
        # The filter is [1, 3, 3, 1] in every StyleGAN2.
        ignore=(r".*resample_filter",),
        optional=(r"mapping\.w_avg",),
    )
    if "mapping.w_avg" not in state:
        estimate_w_avg(generator, w_avg_samples)
    return generator


# ---- The .pt layout


def build_rosinality(
    state: Mapping[str, Any],
    *,
    feature_layer: int | None = None,
    w_avg_samples: int = W_AVG_SAMPLES,
) -> Generator:
    """A generator from {"g_ema": state dict, "latent_avg": (w_dim,), ...}, or from the state dict alone.

    Where `latent_avg` is missing, `mapping.w_avg` is estimated from `w_avg_samples` latents, and said in the
    log. The discriminator ("d") is left out.
    """
    tensors: dict[str, Tensor] = dict(state.get("g_ema", state))
    average = state.get("latent_avg")
    _require(tensors, "stylegan2-rosinality", "input.input", "to_rgb1.conv.weight", "style.1.weight")
    blocks = sum(bool(re.fullmatch(r"to_rgbs\.\d+\.conv\.weight", name)) for name in tensors)
    names = ["to_rgb1", *(f"to_rgbs.{block}" for block in range(blocks))]
    w_dim, z_dim = _shape(tensors, "style.1.weight", 2)
    config = _config(
        [4 << block for block in range(blocks + 1)],
        widths=[_shape(tensors, f"{name}.conv.weight", 5)[2] for name in names],
        feature_layer=feature_layer,
        z_dim=z_dim,
        w_dim=w_dim,
        mapping_layers=sum(bool(re.fullmatch(r"style\.\d+\.weight", name)) for name in tensors),
    )
    if average is not None:
        # pSp and its descendants store one average per layer, all the same.
        rows = average.reshape(-1, average.shape[-1])
        if rows.shape[-1] != w_dim:
            raise PublishedError(
                f"stylegan2-rosinality: latent_avg is {tuple(average.shape)}, expected ({w_dim},)"
            )
        tensors["latent_avg"] = rows.float().mean(0)
    expected = {our: tuple(t.shape) for our, t in _meta_state(config).items()}
    for our, shape in expected.items():
        theirs = _rosinality_name(our)
        given = tensors.get(theirs)
        # Weights, noises and biases have axes of 1 for batch and picture; a wrong shape is left for `fill`.
        if given is not None and tuple(given.shape) != shape and _no_ones(given.shape) == _no_ones(shape):
            tensors[theirs] = given.reshape(shape)
    generator = fill(
        "stylegan2-rosinality",
        lambda: Generator(config),
        tensors,
        published=_rosinality_name,
        ignore=(r".*\.kernel",),
        # Files of before 2020 hold no noise pictures; theirs were drawn anew for each picture.
        optional=("latent_avg", r"noises\.noise_\d+"),
    )
    if average is None:
        estimate_w_avg(generator, w_avg_samples)
    return generator


_ROSINALITY_LEAVES = {
    "weight": "conv.weight",
    "affine.weight": "conv.modulation.weight",
    "affine.bias": "conv.modulation.bias",
    "noise_strength": "noise.weight",
    "bias": "activate.bias",
}


def _rosinality_name(name: str) -> str:
    if name == "mapping.w_avg":
        return "latent_avg"
    if match := re.fullmatch(r"mapping\.fc\.(\d+)\.(weight|bias)", name):
        # style.0 is the normalisation of z.
        return f"style.{int(match[1]) + 1}.{match[2]}"
    if name == "synthesis.blocks.0.const":
        return "input.input"
    match = re.fullmatch(r"synthesis\.blocks\.(\d+)\.(conv0|conv1|torgb)\.(.+)", name)
    if match is None:
        return name
    block, part, leaf = int(match[1]), match[2], match[3]
    if part == "torgb":
        prefix = "to_rgb1" if block == 0 else f"to_rgbs.{block - 1}"
        return f"{prefix}.bias" if leaf == "bias" else f"{prefix}.{_ROSINALITY_LEAVES[leaf]}"
    # Convolutions count from 0 at 4 px; the first stands apart.
    layer = 2 * block - (part == "conv0")
    if leaf == "noise_const":
        return f"noises.noise_{layer}"
    prefix = "conv1" if layer == 0 else f"convs.{layer - 1}"
    return f"{prefix}.{_ROSINALITY_LEAVES[leaf]}"


# ---- What both share


@torch.no_grad()
def estimate_w_avg(generator: Generator, samples: int = W_AVG_SAMPLES) -> None:
    """Fill `mapping.w_avg` with the mean of w over `samples` random z, and say so.

    The z are always the same; of a conditional network, so are the classes, drawn uniformly.
    """
    mapping, config = generator.mapping, generator.config
    random = torch.Generator().manual_seed(0)
    total = torch.zeros(config.w_dim, dtype=torch.float64)
    for first in range(0, samples, 10_000):
        count = min(10_000, samples - first)
        z = torch.randn(count, config.z_dim, generator=random)
        c = None
        if config.c_dim:
            c = torch.eye(config.c_dim)[torch.randint(config.c_dim, (count,), generator=random)]
        total += mapping.w(z, c).double().sum(0)
    mapping.w_avg.copy_(total / samples)
    logger.warning(
        "the file has no average latent: w_avg was estimated from %s mapped samples", f"{samples:,}"
    )


def _config(
    sides: list[int], *, widths: list[int], feature_layer: int | None, **fields: Any
) -> StyleGAN2Config:
    if not sides or sides != [4 << block for block in range(len(sides))] or len(sides) < 2:
        raise PublishedError(
            f"expected one block for 4, 8, ... px, got {', '.join(map(str, sides)) or 'none'}"
        )
    config = StyleGAN2Config(resolution=sides[-1], widths=tuple(widths), feature_layer=0, **fields)
    if feature_layer is None:
        feature_layer = _PAPER_LAYER if config.num_ws > _PAPER_LAYER else 0
    return dataclasses.replace(config, feature_layer=feature_layer)


def _meta_state(config: StyleGAN2Config) -> dict[str, Tensor]:
    with torch.device("meta"):
        return Generator(config).state_dict()


def _require(state: Mapping[str, Any], kind: str, *names: str) -> None:
    if missing := [name for name in names if name not in state]:
        raise PublishedError(f"{kind}: lacks {', '.join(missing)}")


def _shape(state: State, name: str, axes: int) -> tuple[int, ...]:
    if name not in state:
        raise PublishedError(f"lacks {name}")
    if state[name].ndim != axes or math.prod(state[name].shape) == 0:
        raise PublishedError(f"{name} is {tuple(state[name].shape)}, expected {axes} axes")
    return tuple(state[name].shape)


def _no_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


KINDS = {
    "stylegan2-nvidia": Kind(
        build_nvidia,
        (r"synthesis\.b4\.const", r"mapping\.fc0\.weight"),
        source="NVlabs/stylegan2-ada-pytorch, NVlabs/stylegan3",
        licence="NVIDIA Source Code License: no commercial use",
    ),
    "stylegan2-rosinality": Kind(
        build_rosinality,
        (r"input\.input", r"to_rgb1\.conv\.weight"),
        source="rosinality/stylegan2-pytorch and the inversion repositories that share its layout",
        licence="code MIT; converted NVIDIA weights keep NVIDIA's licence: no commercial use",
    ),
}
