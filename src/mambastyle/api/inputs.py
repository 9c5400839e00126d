"""What callers may hand over: pictures of any kind, one or many, and a device."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mambastyle import images

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The last `size` values that were asked for by key, for any number of threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key; made where it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        # Outside the lock: that two threads make the same value costs less than that all wait for one.
        value = make()
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            if len(self._values) > self.size:
                self._values.popitem(last=False)
        return value


def as_list(pictures: Any) -> tuple[list[Any], bool]:
    """Pictures as a list, and whether it was one alone."""
    if isinstance(pictures, Tensor | np.ndarray) and pictures.ndim == 4:
        return list(pictures), False
    if isinstance(pictures, Tensor | np.ndarray | Image.Image | str | os.PathLike | bytes | bytearray):
        return [pictures], True
    if hasattr(pictures, "read"):  # an open file, which would be iterated by lines
        return [pictures], True
    if isinstance(pictures, Iterable):
        return list(pictures), False
    return [pictures], True


def as_picture(source: Any) -> Image.Image:
    """A picture as the library reads it: upright, sRGB, opaque. Raises images.ImageError."""
    return images.to_pil(images.read(source))


def names_of(pictures: Iterable[Any]) -> tuple[str, ...]:
    """The stems of paths, and numbers for what has no name."""
    return tuple(
        Path(picture).stem if isinstance(picture, str | os.PathLike) else f"{index:04d}"
        for index, picture in enumerate(pictures)
    )


def find_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the accelerator, or the CPU; ValueError when it cannot be used."""
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.empty(0).device
    try:
        # Allocating is the only sure test: a device may be known by name and absent.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {str(device)!r} cannot be used ({reason}): leave it out") from error
