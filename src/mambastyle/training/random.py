"""Randomness of a training step as a pure function of (seed, step, name): resuming needs no random state."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRandom:
    """Named random streams of one step, seen from one of `shards` equal parts of the global batch.

    The draws of a batch are made for the whole batch and cut, so two processes (or two accumulated parts) see
    together exactly what one process sees alone.
    """

    seed: int
    step: int
    batch: int
    shard: int = 0
    shards: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.batch % self.shards:
            raise ValueError(
                f"batch {self.batch} does not divide over {self.shards} processes and accumulated parts"
            )

    @property
    def local_batch(self) -> int:
        return self.batch // self.shards

    def part(self, share: float, of: int, name: str) -> int:
        """How many of `of` local pictures a share is; ValueError where a share above 0 rounds to none."""
        count = round(share * of)
        if share > 0 and of and not count:
            raise ValueError(
                f"{name} {share:g} is less than one of {of} pictures, in each of {self.shards} processes and "
                f"accumulated parts of a batch of {self.batch}: raise batch, or take fewer of them"
            )
        return count

    def stream(self, name: str, *, local: bool = True) -> torch.Generator:
        """A generator of its own for `name`; local: another one in each shard."""
        key = f"{self.seed}:{self.step}:{name}:{self.shard if local else ''}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, name: str, *shape: int) -> Tensor:
        """(local_batch, *shape) standard normal."""
        stream = self.stream(name, local=False)
        return self._cut(torch.randn(self.batch, *shape, generator=stream, device=self.device))

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(local_batch, *shape) in [0, 1)."""
        stream = self.stream(name, local=False)
        return self._cut(torch.rand(self.batch, *shape, generator=stream, device=self.device))

    def integers(self, name: str, high: int) -> Tensor:
        """(local_batch,) int64 in [0, high)."""
        stream = self.stream(name, local=False)
        return self._cut(torch.randint(high, (self.batch,), generator=stream, device=self.device))

    def epoch_indices(self, count: int) -> Tensor:
        """(local_batch,) positions in a data set of `count`: each once per epoch, in random order."""
        first = self.step * self.batch
        wanted = torch.arange(first, first + self.batch)
        chosen = torch.empty_like(wanted)
        for epoch in torch.unique(wanted // count).tolist():
            stream = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=stream)
            here = wanted // count == epoch
            chosen[here] = order[wanted[here] % count]
        return self._cut(chosen)

    def _cut(self, drawn: Tensor) -> Tensor:
        start = self.shard * self.local_batch
        return drawn[start : start + self.local_batch]
