"""What every importer shares: the description of a kind, and filling a network from published names."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from mambastyle.published.unpickler import PublishedError

logger = logging.getLogger("mambastyle.published")
Module = TypeVar("Module", bound=nn.Module)
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One kind of published file.

    build: state dict under the published names, and options -> a network in eval mode.
    names: tensors which together tell that a file is of this kind (regular expressions, each must be found).
    ignore: what a file may hold that nobody reads (regular expressions).
    source, licence: where such files come from and what their authors say; a note, no legal advice.
    """

    build: Callable[..., nn.Module]
    names: tuple[str, ...]
    source: str
    licence: str
    ignore: tuple[str, ...] = ()

    def matches(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names are of this kind."""
        names = list(names)
        return all(any(re.fullmatch(rule, name) for name in names) for rule in self.names)


def fill(
    kind: str,
    make: Callable[[], Module],
    tensors: State,
    *,
    published: Callable[[str], str] = lambda name: name,
    ignore: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> Module:
    """A network in eval mode, made by `make` and filled with `tensors`.

    The network is made without memory, and takes the tensors as they are (float32; no copy where they already
    are float32), so nothing is allocated before names and shapes are found right.

    published: the published name of one of our tensors.
    ignore: what a file may hold besides (regular expressions of published names).
    optional: what a file may lack; such a tensor is filled with zeros.
    Raises PublishedError that names the tensors which are missing, too many, or of another shape.
    """
    # The one device that is no device: tensors there have shapes and no memory.
    with torch.device("meta"):
        network = make()
    expected = network.state_dict()
    ours = {published(name): name for name in expected}
    skipped = [re.compile(rule) for rule in (*ignore, r"(.*\.)?num_batches_tracked")]
    may_lack = [re.compile(rule) for rule in (*optional, r"(.*\.)?num_batches_tracked")]
    missing = [
        name for name in ours if name not in tensors and not any(rule.fullmatch(name) for rule in may_lack)
    ]
    extra = [
        name for name in tensors if name not in ours and not any(rule.fullmatch(name) for rule in skipped)
    ]
    if missing or extra:
        raise PublishedError(f"{kind}: {_list('lacks', missing)}{_list('has besides', extra)}".rstrip("; "))
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[our].shape)}"
        for name, our in ours.items()
        # A lone number may be stored as () or (1,).
        if name in tensors
        and tensors[name].shape != expected[our].shape
        and not tensors[name].numel() == expected[our].numel() == 1
    ]
    if wrong:
        raise PublishedError(f"{kind}: {_list('of another shape:', wrong)}".rstrip("; "))
    filled = {}
    for name, our in ours.items():
        dtype = expected[our].dtype
        given = tensors.get(name)
        if given is None:
            filled[our] = torch.zeros(expected[our].shape, dtype=dtype)
        else:
            filled[our] = given.detach().to(dtype).reshape(expected[our].shape)
    network.load_state_dict(filled, assign=True)
    return network.eval()


def _list(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {', '.join(names[:5])}{more}; "
