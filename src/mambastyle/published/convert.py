"""A published file to one of ours: safetensors with a hash, where it came from and what its authors allow."""

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from mambastyle import checkpoints, published
from mambastyle.models.mamba_st import MambaST
from mambastyle.models.mambastyle import Encoder, Fuser
from mambastyle.models.samam import SaMam
from mambastyle.models.stylegan2 import Generator
from mambastyle.published.directions import NUM_WS, StyleClipGlobal
from mambastyle.published.unpickler import PublishedError


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote: the kind of the published file, the kind of ours, its hash and its card."""

    published_kind: str
    kind: str
    sha256: str
    card: dict[str, Any]


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    backbone: str | os.PathLike[str] | None = None,
    num_ws: int = NUM_WS,
    **options: Any,
) -> Converted:
    """Read a published file and write it as a checkpoint of ours. Errors as of `published.load`.

    A StyleGAN2 becomes the "stylegan2" that training and the facade read, an encoder or fuser a "mambastyle",
    SaMam and Mamba-ST what `mambastyle.load` makes a Stylizer of, directions "directions". All others keep
    their kind and their published names, less what nobody reads, so that `published.load` reads the new file
    as it read the old one.
    """
    found = published.recognise(path, kind=kind, backbone=backbone, num_ws=num_ws)
    card = {"source": Path(path).name, "source_sha256": _sha256(path), "published_kind": found.kind}
    if found.directions is not None:
        if isinstance(found.directions, StyleClipGlobal):
            raise PublishedError(
                f"{path} is StyleCLIP's table, which is no direction yet: load it and call .direction"
            )
        card["licence"] = "as its authors state"
        return Converted(found.kind, "directions", found.directions.save(out, card=card), card)
    entry = published.KINDS[found.kind]
    card |= {"origin": entry.source, "licence": entry.licence}
    network = published.build(found.kind, found.tensors, **{**found.options, **options})
    config: Any = {}
    if isinstance(network, Generator | Encoder | Fuser):
        ours = "stylegan2" if isinstance(network, Generator) else "mambastyle"
        part = type(network).__name__.lower()
        config = network.config
        tensors = {f"{part}.{name}": tensor for name, tensor in network.state_dict().items()}
    elif isinstance(network, SaMam | MambaST):
        ours, config, tensors = found.kind, network.config, network.state_dict()
    else:
        ours = found.kind
        unread = [re.compile(rule) for rule in entry.ignore]
        tensors = {
            name: tensor
            for name, tensor in found.tensors.items()
            if not any(rule.fullmatch(name) for rule in unread)
        }
    return Converted(
        found.kind, ours, checkpoints.save(out, tensors, kind=ours, config=config, card=card), card
    )


def _sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
