"""MambaStyle: invert, edit and stylise pictures with vision state-space models.

import mambastyle as ms
inverter = ms.load("kaokore64")
inverter.render(inverter.edit("face.png", {"gender": 1.5})).save("edited.png")
stylizer = ms.load("samam-small")
stylizer.stylize("photo.jpg", "painting.jpg").save("stylized.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambastyle.allocator import keep_freed_memory, return_freed_memory
    from mambastyle.api import Inverted, Inverter, Stylizer, StylizeWarning, load
    from mambastyle.checkpoints import CheckpointError
    from mambastyle.images import ImageError, ImageWarning
    from mambastyle.latents.directions import Direction, DirectionError, Directions
    from mambastyle.models.mambastyle import Inversion
    from mambastyle.presets import PRESETS

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "CheckpointError",
    "Direction",
    "DirectionError",
    "Directions",
    "ImageError",
    "ImageWarning",
    "Inversion",
    "Inverted",
    "Inverter",
    "StylizeWarning",
    "Stylizer",
    "__version__",
    "keep_freed_memory",
    "load",
    "return_freed_memory",
]

_HOMES = {
    "PRESETS": "presets",
    "CheckpointError": "checkpoints",
    "Direction": "latents.directions",
    "DirectionError": "latents.directions",
    "Directions": "latents.directions",
    "ImageError": "images",
    "ImageWarning": "images",
    "Inversion": "models.mambastyle",
    "Inverted": "api",
    "Inverter": "api",
    "StylizeWarning": "api",
    "Stylizer": "api",
    "keep_freed_memory": "allocator",
    "load": "api",
    "return_freed_memory": "allocator",
}


def __getattr__(name: str) -> Any:
    """Public names on first use: importing the package alone does not import torch."""
    if name in _HOMES:
        return getattr(import_module(f"mambastyle.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mambastyle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
