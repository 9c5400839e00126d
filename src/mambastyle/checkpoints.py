"""Checkpoints: one safetensors file holds tensors, kind, config, card and a hash over the tensors.

Nothing is unpickled, so a file from a stranger can run no code. The metadata of the safetensors header are

    format = "mambastyle", version = "1", kind, config (JSON), card (JSON), sha256

with the hash taken over names, dtypes, shapes and bytes in the order of the names (`tensors_hash`).

| kind | tensors | config |
|---|---|---|
| stylegan2 | generator.* (discriminator.* by option) | StyleGAN2Config |
| mambastyle | encoder.*, fuser.* | MambaStyleConfig |
| directions | one (num_ws, w_dim) per name | latents.directions |
| small-features | the small network that judges | SmallFeaturesConfig |
| inversion | ws, offset, feature, tuned.* (of PTI, a row per picture) | the model that made it |
"""

import dataclasses
import difflib
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mambastyle.files import write_whole

FORMAT = "mambastyle"
VERSION = 1
Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was expected, what came and what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds; `tensors` keep the dtype they were saved in."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    card: dict[str, Any]
    path: Path
    sha256: str

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it: `part("generator.")` loads a Generator."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: Any,
    card: Mapping[str, Any] | None = None,
) -> str:
    """Write a checkpoint whole or not at all, and return the hash over its tensors.

    `config` is a dataclass or a mapping, `card` a mapping (data, licence, recipe, numbers): both must survive
    JSON. Tensors may be anywhere and share memory; they are copied to the CPU. Raises files.WriteError when
    the disk is full or the folder cannot be written, and leaves an older file as it was.
    """
    # Copies, since safetensors refuses tensors that share memory (tied weights, views of one buffer).
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    sha256 = tensors_hash(stored)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": kind,
        "config": json.dumps(config_to_dict(config), sort_keys=True),
        "card": json.dumps(dict(card or {}), sort_keys=True),
        "sha256": sha256,
    }
    write_whole(path, safetensors.torch.save(stored, metadata=metadata))
    return sha256


def load(path: str | os.PathLike[str], *, kind: str | None = None) -> Checkpoint:
    """Read a checkpoint on the CPU and verify its hash.

    Raises CheckpointError when the file is missing, is no checkpoint of ours, is of another kind than `kind`,
    was written by a newer version, or when its tensors do not match their hash.
    """
    path = Path(path)
    metadata = _read_metadata(path)
    if kind is not None and metadata["kind"] != kind:
        raise CheckpointError(
            f"{path} holds a {metadata['kind']!r} checkpoint, expected {kind!r}: give a file of that kind "
            f"(`mambastyle info {path}` shows what it is)"
        )
    try:
        tensors = safetensors.torch.load_file(path)
        config, card = json.loads(metadata["config"]), json.loads(metadata.get("card", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if tensors_hash(tensors) != metadata["sha256"]:
        raise CheckpointError(
            f"{path} does not match its own hash, so it was changed: fetch or make it again"
        )
    return Checkpoint(metadata["kind"], config, tensors, card, path, metadata["sha256"])


def read_header(path: str | os.PathLike[str]) -> Checkpoint:
    """Like `load` without the tensors: kind, config, card and hash as the file states them, unverified."""
    path = Path(path)
    metadata = _read_metadata(path)
    try:
        config, card = json.loads(metadata["config"]), json.loads(metadata.get("card", "{}"))
    except ValueError as error:
        raise _damaged(path, error) from error
    return Checkpoint(metadata["kind"], config, {}, card, path, metadata["sha256"])


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, dtypes, shapes and bytes, in the order of the names; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # As bytes: numpy knows no bfloat16. reshape(-1) because a 0-d tensor cannot be viewed as bytes.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def to_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with matrices and convolutions in float16, for files half as large.

    Scalars and vectors (norms, biases, running statistics) stay as they are: they weigh little and are the
    most sensitive. So does a tensor with a magnitude that float16 cannot hold (65504).
    """
    halved = {}
    for name, tensor in tensors.items():
        fits = tensor.dtype == torch.float32 and tensor.ndim >= 2
        if fits and tensor.numel() and tensor.abs().max() > torch.finfo(torch.float16).max:
            fits = False
        halved[name] = tensor.half() if fits else tensor
    return halved


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass or mapping as plain JSON values (tuples become lists)."""
    values = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
    return json.loads(json.dumps(values))


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass `cls` from what JSON or YAML kept of it: lists become tuples, mappings dataclasses.

    Missing keys take the default of `cls`. Raises CheckpointError for an unknown key (naming the nearest
    known one), a missing one without default, and a value of another type; the checks of `cls` itself pass
    through.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = nearest(key, fields)
            hint = f"did you mean {near!r}?" if near else f"the keys are {', '.join(fields)}"
            raise CheckpointError(f"unknown key {key!r} in {cls.__name__}: {hint}")
    for name, field in fields.items():
        unset = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if unset and name not in values:
            raise CheckpointError(f"{cls.__name__} lacks the key {name!r}, which has no default: add it")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _restore(hints[key], value, f"{cls.__name__}.{key}") for key, value in values.items()})


def fill(module: Module, tensors: Mapping[str, Tensor], path: Path) -> Module:
    """Copy tensors (of any float type) into a module; CheckpointError unless names and shapes agree."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if wrong:
        first = min(wrong)
        raise CheckpointError(
            f"{path} does not fit its own config in {len(wrong)} of {len(wanted)} tensors ({first}: expected "
            f"{wanted.get(first, 'none')}, got {found.get(first, 'none')}): make it again"
        )
    module.load_state_dict(tensors)
    return module


def start_from(
    module: nn.Module, path: str | os.PathLike[str], *, kind: str, config: Any, free: Iterable[str] = ()
) -> None:
    """Fill a module from a checkpoint whose config is `config`; ValueError for one of other sizes.

    free: names of settings that may differ from those of the checkpoint, where the config has them.
    """
    checkpoint = load(path, kind=kind)
    same = {name: getattr(config, name) for name in free if hasattr(config, name)}
    if dataclasses.replace(config_from_dict(type(config), checkpoint.config), **same) != config:
        raise ValueError(f"{path}: its {kind} has other sizes than this run's model section")
    fill(module, checkpoint.tensors, checkpoint.path)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a mistyped one most likely means, or None when nothing is near."""
    by_fold = {name.casefold(): name for name in known}
    matches = difflib.get_close_matches(word.casefold(), list(by_fold), n=1, cutoff=0.5)
    return by_fold[matches[0]] if matches else None


def _read_metadata(path: Path) -> dict[str, str]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected one .safetensors file: name a file in it")
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}: check the path, or train one with `mambastyle train`"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if metadata.get("format") != FORMAT or not {"version", "kind", "config", "sha256"} <= metadata.keys():
        raise CheckpointError(
            f"{path} is a safetensors file, but no mambastyle checkpoint (its header has no config): "
            "give a checkpoint written by this package"
        )
    if not metadata["version"].isdecimal() or int(metadata["version"]) > VERSION:
        raise CheckpointError(
            f"{path} has format version {metadata['version']}, this package reads up to {VERSION}: update it"
        )
    return metadata


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is no readable safetensors file ({error}): fetch or make it again")


def _restore(hint: Any, value: Any, where: str) -> Any:
    """`value` from JSON as the type `hint` asks: the inverse of what JSON does to a frozen config."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _restore(option, value, where)
            except CheckpointError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple or hint is tuple:
        if isinstance(value, list | tuple):
            if not arguments:
                return tuple(value)
            kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(kinds) == len(value):
                pairs = zip(kinds, value, strict=True)
                return tuple(_restore(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, Mapping):
            return config_from_dict(hint, value)  # type: ignore[arg-type]
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is bool or hint is int:
        # bool is an int in Python, and `channels: true` is a mistake.
        if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, origin or hint):
        return value
    expected = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise CheckpointError(f"{where} is {value!r}, expected {expected or hint}: correct the value")
