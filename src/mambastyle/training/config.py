"""Run files: YAML read into typed models; an unknown key is an error that names the nearest known one."""

import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mambastyle.checkpoints import nearest
from mambastyle.compute import Precision


class Section(BaseModel):
    """Part of a run file: typed, frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class RunConfig(Section):
    """What every training run has. `batch` is the global batch, over all processes."""

    name: str
    output: str = "runs"
    seed: int = 0
    steps: int
    batch: int
    precision: Precision = "fp32"
    """auto: bf16 where the hardware has it, else fp32."""
    ema_decay: float = 0.999
    clip_gradient: float | None = None
    accumulate: int = 1
    log_every: int = 50
    sample_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    max_minutes: float | None = None
    tensorboard: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name


Run = TypeVar("Run", bound=BaseModel)


def read_run_file(
    path: str | os.PathLike[str], schema: type[Run], overrides: dict[str, Any] | None = None
) -> Run:
    """Read a run file, apply overrides ({"optimizer.lr": 1e-3}), check it; ValueError with the remedy.

    A file that says `extends: OTHER.yaml` (a path beside it) states only what differs from the other: its
    settings go over those of OTHER, sections key by key.
    """
    path = Path(path)
    values = _read(path)
    for dotted, value in (overrides or {}).items():
        node = values
        *parents, last = dotted.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"{path}: cannot set {dotted}, since {parent} is {node!r} there: set {parent} to a whole "
                    f"section, such as -s '{parent}={{base: {node}, {last}: {value}}}'"
                )
        node[last] = value
    return check(values, schema, str(path))


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a run file, over that of the file it extends."""
    if not path.is_file():
        asked = f" (which {seen[-1]} extends)" if seen else ": recipes/ has one for each preset"
        raise ValueError(f"no run file at {path}{asked}")
    if path.resolve() in [other.resolve() for other in seen]:
        raise ValueError(f"{path} extends itself: {' -> '.join(str(part) for part in (*seen, path))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings at the top, got {type(values).__name__}")
    if "extends" not in values:
        return values
    other = values.pop("extends")
    if not isinstance(other, str):
        raise ValueError(f"{path}: extends is {other!r}, expected the path of another run file")
    return _over(_read(path.parent / other, (*seen, path)), values)


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: sections key by key, anything else whole."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _over(base[key], value) if both else value
    return merged


def check(values: dict[str, Any], schema: type[Run], where: str) -> Run:
    """Validate; the first problem becomes a one-line ValueError."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] != "extra_forbidden":
            raise ValueError(f"{where}: {key}: {problem['msg']}") from None
        near = nearest(key.rsplit(".", 1)[-1], _keys(schema))
        hint = f": did you mean {near}?" if near else f": known keys are {', '.join(sorted(_keys(schema)))}"
        raise ValueError(f"{where}: unknown key {key}{hint}") from None


def _keys(schema: type[BaseModel]) -> list[str]:
    """All keys of a schema and the sections inside it."""
    keys = list(schema.model_fields)
    for field in schema.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation)
    return keys
