"""Published weights, read without executing anything: `load(path)`, `build(kind, state_dict)`.

    generator = published.load("stylegan2-ffhq-1024x1024.pkl")
    identity = published.build("arcface-irse50", state_dict)

Both give a network of ours in eval mode; pictures are in [-1, 1] as everywhere. `KINDS` lists what is known:
to add one, write its builder in a module beside this one and add its `Kind` to the table.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from mambastyle.checkpoints import nearest
from mambastyle.latents.directions import Directions
from mambastyle.published import directions, judges, mambastyle, style_transfer, stylegan2
from mambastyle.published.directions import StyleClipGlobal
from mambastyle.published.mambastyle import mambastyle_encoder, mambastyle_fuser
from mambastyle.published.reader import read, read_tensors, tensors_in
from mambastyle.published.registry import Kind
from mambastyle.published.unpickler import Persistent, PublishedError

__all__ = [
    "KINDS",
    "Kind",
    "Published",
    "PublishedError",
    "build",
    "load",
    "mambastyle_encoder",
    "mambastyle_fuser",
    "recognise",
]

KINDS: Mapping[str, Kind] = MappingProxyType(
    {**stylegan2.KINDS, **mambastyle.KINDS, **style_transfer.KINDS, **judges.KINDS}
)
"""Every kind of network by name; the first that matches a file is taken."""

# What a training run wraps around the state dict.
_WRAPPERS = ("state_dict", "params_ema", "params", "model")


@dataclass(frozen=True)
class Published:
    """What a file holds: its kind, its tensors under the published names, and the options they imply."""

    kind: str
    tensors: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    directions: Directions | StyleClipGlobal | None = None


def load(
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    backbone: str | os.PathLike[str] | None = None,
    num_ws: int = directions.NUM_WS,
    name: str | None = None,
    **options: Any,
) -> nn.Module | Directions | StyleClipGlobal:
    """The network in a published file, in eval mode, or the directions in one.

    kind: what the file has to be; by default it is recognised.
    backbone: for LPIPS's own files, which hold the linear layers alone, torchvision's file of the backbone.
    num_ws, name: for directions, the latents of their generator, and a name (default: that of the file).
    options: of the builder, such as feature_layer= for a generator.
    Raises PublishedError for a file that is refused, not recognised, of another kind, or not complete.
    """
    found = recognise(path, kind=kind, backbone=backbone, num_ws=num_ws, name=name)
    if found.directions is not None:
        return found.directions
    try:
        return build(found.kind, found.tensors, **{**found.options, **options})
    except PublishedError as error:
        raise PublishedError(f"{path}: {error}") from error


def build(kind: str, state_dict: Mapping[str, Any], **options: Any) -> nn.Module:
    """A network in eval mode from tensors under their published names; it shares their memory.

    kind: a name in `KINDS`. For the .pt layout of StyleGAN2 `state_dict` may be the whole dictionary
    ({"g_ema": ..., "latent_avg": ...}), for LPIPS it is backbone and `lin*` together.
    Raises PublishedError that names the tensors which are missing, too many, or of another shape.
    """
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        hint = f"did you mean {near!r}?" if near else f"the kinds are {', '.join(KINDS)}"
        raise PublishedError(f"no kind named {kind!r}: {hint}")
    return KINDS[kind].build(state_dict, **options)


def recognise(
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    backbone: str | os.PathLike[str] | None = None,
    num_ws: int = directions.NUM_WS,
    name: str | None = None,
) -> Published:
    """What a published file is, with its tensors; nothing in it is executed. Errors as of `load`."""
    path = Path(path)
    tree = read(path)
    try:
        found = _recognise(tree, path, kind, backbone, num_ws, name)
    except PublishedError as error:
        raise PublishedError(f"{path}: {error}") from error
    if kind is not None and found.kind != kind:
        raise PublishedError(f"{path} is {found.kind!r}, expected {kind!r}")
    return found


def _recognise(
    tree: Any,
    path: Path,
    kind: str | None,
    backbone: str | os.PathLike[str] | None,
    num_ws: int,
    name: str | None,
) -> Published:
    if isinstance(tree, dict) and isinstance(tree.get("G_ema"), Persistent):
        tree = tree["G_ema"]
    if isinstance(tree, Persistent):
        stored, options = stylegan2.nvidia_state(tree)
        return Published("stylegan2-nvidia", read_tensors(dict(stored)), options)
    if isinstance(tree, dict) and isinstance(tree.get("g_ema"), dict):
        tensors: dict[str, Any] = {"g_ema": read_tensors(tensors_in(tree["g_ema"]))}
        return Published("stylegan2-rosinality", {**tensors, **_average(tree)})
    if (held := directions.find(tree)) is not None:
        read_held = read_tensors(held)
        return Published("directions", {}, directions=directions.parse(read_held, name or path.stem, num_ws))
    for wrapper in _WRAPPERS:
        if isinstance(tree, dict) and not tensors_in(tree) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    tensors = dict(tensors_in(tree))
    if backbone is not None:
        tensors = {**tensors_in(read(Path(backbone))), **tensors}
    if kind is not None and kind in KINDS:
        # The builder then says what is missing.
        return Published(kind, read_tensors(tensors))
    for known, entry in KINDS.items():
        if entry.matches(tensors):
            return Published(known, read_tensors(tensors))
    if "lin0.model.1.weight" in tensors:
        raise PublishedError("holds LPIPS's linear layers alone: give backbone=, torchvision's file, as well")
    shown = ", ".join(list(tensors)[:4]) or "none"
    raise PublishedError(
        f"of no known kind (its tensors: {shown}): the kinds are {', '.join(KINDS)} and directions"
    )


def _average(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    return read_tensors(tensors_in({"latent_avg": tree.get("latent_avg")}))
