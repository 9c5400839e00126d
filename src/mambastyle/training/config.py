"""Run files: YAML read into typed models; an unknown key is an error that names the nearest known one."""

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mambastyle.checkpoints import nearest


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
    precision: Literal["fp32", "bf16"] = "fp32"
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
    """Read a run file, apply overrides ({"optimizer.lr": 1e-3}), check it; ValueError with the remedy."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no run file at {path}: recipes/ has one for each preset")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings at the top, got {type(values).__name__}")
    for dotted, value in (overrides or {}).items():
        node = values
        *parents, last = dotted.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return check(values, schema, str(path))


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
