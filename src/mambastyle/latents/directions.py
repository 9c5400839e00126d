"""Editing directions in W+: one vector per layer, applied as `ws + strength * scale * vector`.

A strength of 1 is one natural unit of its direction: a standard deviation for a principal component
(GANSpace, Härkönen et al. 2020), the distance between the two sides for a boundary (InterFaceGAN, Shen et al.
2020). Names follow the papers: a direction lives in "w" (one vector, the same in all layers) or "w+" (one per
layer).
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mambastyle import checkpoints
from mambastyle.checkpoints import CheckpointError, nearest

KIND = "directions"
Space = Literal["w", "w+"]


class DirectionError(ValueError):
    """A direction or strength that cannot be used; the message says what to do."""


class UnknownDirectionError(DirectionError, KeyError):
    """A name that the set does not hold; the message names the nearest one."""

    # KeyError prints the repr of its argument, which would put the sentence in quotes.
    __str__ = Exception.__str__


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """One direction: `offset(strength)` is what it adds to ws.

    vector: (num_ws, w_dim) float32, one row per layer.
    space: "w" when all rows are the same, else "w+".
    layers: the rows it acts on, [first, stop) as in `range`; None for all.
    scale: how much of `vector` a strength of 1 is.
    """

    name: str
    vector: Float[Tensor, "num_ws w_dim"]
    space: Space = "w+"
    layers: tuple[int, int] | None = None
    scale: float = 1.0
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name or any(mark in self.name for mark in "=,@") or self.name != self.name.strip():
            raise DirectionError(
                f"the name {self.name!r} cannot stand in NAME=STRENGTH: avoid = , @ and blanks"
            )
        if self.vector.ndim != 2 or self.vector.dtype != torch.float32:
            found = f"{tuple(self.vector.shape)} {self.vector.dtype}"
            raise DirectionError(f"the vector of {self.name!r} is {found}, expected (num_ws, w_dim) float32")
        if not bool(torch.isfinite(self.vector).all()) or not math.isfinite(self.scale):
            raise DirectionError(f"the direction {self.name!r} holds NaN or infinity: discover it again")
        if self.space not in ("w", "w+"):
            raise DirectionError(f"the space of {self.name!r} is {self.space!r}, expected 'w' or 'w+'")
        if self.layers is not None:
            first, stop = self.layers
            if not 0 <= first < stop <= self.num_ws:
                raise DirectionError(
                    f"layers {first}:{stop} of {self.name!r} are out of range: expected first < stop, "
                    f"both from 0 to {self.num_ws}"
                )

    @property
    def num_ws(self) -> int:
        return self.vector.shape[0]

    @property
    def w_dim(self) -> int:
        return self.vector.shape[1]

    @classmethod
    def from_w(cls, name: str, w: Float[Tensor, " w_dim"], num_ws: int, **fields: Any) -> "Direction":
        """The direction that adds the vector `w` (w_dim,) to all `num_ws` layers (or to `layers=`)."""
        return cls(name, w.float().expand(num_ws, -1).contiguous(), space="w", **fields)

    def on_layers(self, first: int, stop: int) -> "Direction":
        """This direction on the layers [first, stop) alone (coarse: pose, shape; fine: colour)."""
        return dataclasses.replace(self, layers=(first, stop))

    def offset(self, strength: float = 1.0) -> Float[Tensor, "num_ws w_dim"]:
        """What a strength adds to ws: strength * scale * vector, zero outside `layers`."""
        offset = self.vector * (check_strength(strength, self.name) * self.scale)
        if self.layers is not None:
            first, stop = self.layers
            offset[:first] = 0
            offset[stop:] = 0
        return offset

    def apply(
        self, ws: Float[Tensor, "batch num_ws w_dim"], strength: float | Float[Tensor, " batch"] = 1.0
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """ws moved along this direction, by one strength or by one per picture."""
        if ws.shape[1:] != self.vector.shape:
            raise DirectionError(
                f"the direction {self.name!r} is {tuple(self.vector.shape)} and the latents are "
                f"{tuple(ws.shape[1:])}: use a direction discovered in the same generator"
            )
        if not isinstance(strength, Tensor):
            return ws + self.offset(strength).to(ws)
        return ws + strength.to(ws)[:, None, None] * self.offset().to(ws)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A direction without its vector, as a file describes it."""

    name: str
    space: Space
    layers: tuple[int, int] | None
    scale: float
    description: str


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a file says of its directions."""

    directions: tuple[_Entry, ...]
    generator: str | None = None


# A name in a set or a direction itself, and how strongly.
Edits: TypeAlias = Mapping[str, float] | Iterable[tuple[str | Direction, float]]


class Directions(Mapping[str, Direction]):
    """Directions of one generator by name, in their order; saved as one safetensors file.

    `generator` is the sha256 of the generator's checkpoint they were discovered in, where it is known.
    """

    def __init__(self, directions: Iterable[Direction] = (), *, generator: str | None = None) -> None:
        self._by_name: dict[str, Direction] = {}
        self.generator = generator
        for direction in directions:
            if direction.name in self._by_name:
                raise DirectionError(f"two directions are named {direction.name!r}: rename one")
            self._by_name[direction.name] = direction
        shapes = sorted({tuple(direction.vector.shape) for direction in self._by_name.values()})
        if len(shapes) > 1:
            raise DirectionError(f"directions of shapes {shapes} in one set: keep one set per generator")

    def __getitem__(self, name: str) -> Direction:
        if name in self._by_name:
            return self._by_name[name]
        near = nearest(name, self._by_name)
        known = ", ".join(self._by_name) or "none"
        hint = f"did you mean {near!r}?" if near else f"the known ones are: {known}"
        raise UnknownDirectionError(f"no direction named {name!r}: {hint}")

    def at(self, text: str) -> Direction:
        """The direction that `gender` names, or `gender@0:4` on the layers 0 to 3."""
        name, at, layers = text.partition("@")
        direction = self[name]
        if not at:
            return direction
        found = direction.on_layers(*parse_layers(layers, text))
        if not found.offset().any():
            moved = direction.offset().any(1).nonzero()[:, 0].tolist()
            raise DirectionError(
                f"{text!r} changes nothing: {name} moves the layers {moved[0]}:{moved[-1] + 1}"
                if moved
                else f"{text!r} changes nothing: {name} is zero"
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"Directions({', '.join(self._by_name)})"

    def resolve(self, edits: Edits) -> list[tuple[Direction, float]]:
        """Names looked up and strengths checked; raises DirectionError for what is unknown or no number."""
        pairs: Iterable[Any] = edits.items() if isinstance(edits, Mapping) else edits
        resolved = []
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DirectionError(f"an edit is {pair!r}, expected a (name, strength) pair: ('age', 1.5)")
            name: Any = pair[0]
            strength = pair[1]
            direction = name if isinstance(name, Direction) else self.at(name)
            resolved.append((direction, check_strength(strength, direction.name)))
        return resolved

    def offset(self, edits: Edits) -> Float[Tensor, "num_ws w_dim"]:
        """The sum of what the edits add to ws."""
        return combine(self.resolve(edits)).vector

    def save(self, path: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None) -> str:
        """Write the set as one checkpoint of kind "directions"; returns its sha256."""
        entries = [
            {
                "name": d.name,
                "space": d.space,
                "layers": d.layers,
                "scale": d.scale,
                "description": d.description,
            }
            for d in self.values()
        ]
        # Entries in a list: the order of the set is kept, which that of JSON keys is not.
        config = {"directions": entries, "generator": self.generator}
        tensors = {direction.name: direction.vector for direction in self.values()}
        return checkpoints.save(path, tensors, kind=KIND, config=config, card=card)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Directions":
        """Read a set; raises checkpoints.CheckpointError when the file is damaged or of another kind."""
        checkpoint = checkpoints.load(Path(path), kind=KIND)
        try:
            saved = checkpoints.config_from_dict(_Saved, checkpoint.config)
            # Copies: a tensor of a file is the file's memory, and what is written into it moves the edits.
            directions = [
                Direction(vector=checkpoint.tensors[entry.name].float().clone(), **vars(entry))
                for entry in saved.directions
            ]
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error} for a direction: discover the set again") from error
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} describes no directions ({error}): discover the set again"
            ) from error
        return cls(directions, generator=saved.generator)

    @classmethod
    def joined(cls, sets: Iterable["Directions"]) -> "Directions":
        """Several sets of one generator as one, in their order.

        Raises DirectionError where two of them name different generators, hold the same name, or differ in
        shape.
        """
        sets = list(sets)
        generators = {found.generator for found in sets} - {None}
        if len(generators) > 1:
            raise DirectionError(
                "these sets were discovered in different generators: join those of one generator"
            )
        directions = [direction for found in sets for direction in found.values()]
        return cls(directions, generator=next(iter(generators), None))


def combine(
    pairs: Iterable[tuple[Direction, float]], name: str = "combined", description: str = ""
) -> Direction:
    """The one direction that does what several do together: its vector is the sum of their offsets."""
    pairs = list(pairs)
    if not pairs:
        raise DirectionError("nothing to combine: give one or more (direction, strength) pairs")
    shapes = sorted({tuple(direction.vector.shape) for direction, _ in pairs})
    if len(shapes) > 1:
        raise DirectionError(f"directions of several shapes ({shapes}): they belong to different generators")
    vector = torch.stack([direction.offset(strength) for direction, strength in pairs]).sum(0)
    space: Space = "w" if all(d.space == "w" and d.layers is None for d, _ in pairs) else "w+"
    text = " + ".join(f"{strength:g} {direction.name}" for direction, strength in pairs)
    return Direction(name, vector, space=space, description=description or text)


def parse_edit(text: str) -> tuple[str, float | None]:
    """'gender=1.5' -> ('gender', 1.5); 'gender' -> ('gender', None)."""
    name, equals, strength = text.partition("=")
    name = name.strip()
    if not name:
        raise DirectionError(
            f"the edit {text!r} names no direction, expected NAME=STRENGTH such as gender=1.5"
        )
    return name, check_strength(strength, name) if equals else None


def parse_layers(text: str, of: str = "the direction") -> tuple[int, int]:
    """'0:4' -> (0, 4), the layers [0, 4) as in `range`; DirectionError for other text."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None:
        raise DirectionError(f"the layers of {of!r} are {text!r}, expected FIRST:STOP such as 0:4")
    return int(match[1]), int(match[2])


def check_strength(strength: object, name: str = "the direction") -> float:
    """`strength` as a finite float; raises DirectionError for text that is no number, NaN and infinity."""
    try:
        value = float(strength)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise DirectionError(
            f"the strength of {name} is {strength!r}, expected a number such as 1.5"
        ) from None
    if not math.isfinite(value):
        raise DirectionError(f"the strength of {name} is {value}, expected a finite number such as 1.5")
    return value
