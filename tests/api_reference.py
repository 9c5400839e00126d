"""Writes docs/api.md from the code: `python -m tests.api_reference > docs/api.md`."""

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

HEAD = """# API

Made from the code by `python -m tests.api_reference > docs/api.md`; a test holds it to the code. Annotations
are left out: `help(name)` has them, with shapes, ranges and errors. What is not here may change.
"""
# module -> what it is for, and its names where not all are for callers: else __all__, or what it defines
MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mambastyle": ("Everyday use: `import mambastyle as ms`", ()),
    "mambastyle.api": ("The facade behind it", ()),
    "mambastyle.images": ("Pictures from and to files, PIL, arrays and tensors", ()),
    "mambastyle.video": ("Videos (extra [video])", ()),
    "mambastyle.checkpoints": (
        "Weights files",
        ("Checkpoint", "load", "read_header", "save", "config_from_dict", "config_to_dict", "tensors_hash"),
    ),
    "mambastyle.published": ("Weights as their authors publish them", ()),
    "mambastyle.published.convert": ("The same, to files of ours", ()),
    "mambastyle.jobs.engines": ("Big jobs", ()),
    "mambastyle.jobs.work": ("What a big job does to a batch", ()),
    "mambastyle.ops": ("The selective scan and the paths over a grid", ()),
    "mambastyle.nn": ("Blocks with the scan inside", ()),
    "mambastyle.models.mambastyle": (
        "MambaStyle",
        ("MambaStyleConfig", "variant_of", "MambaStyle", "Encoder", "Fuser", "CONFIGS", "VARIANTS"),
    ),
    "mambastyle.models.stylegan2": ("StyleGAN2", ("StyleGAN2Config", "Generator", "Discriminator")),
    "mambastyle.models.mamba_st": ("Mamba-ST", ("MambaSTConfig", "MambaST")),
    "mambastyle.models.samam": ("SaMam", ("SaMamConfig", "SaMam")),
    "mambastyle.latents.directions": ("Directions in W+", ()),
    "mambastyle.latents.discover": ("Finding directions", ()),
    "mambastyle.losses.inversion": ("The terms of MambaStyle's loss", ()),
    "mambastyle.losses.style_transfer": ("The terms of Mamba-ST's and SaMam's loss", ()),
    "mambastyle.data.faces": ("Faces in photographs (extra [faces])", ()),
    "mambastyle.data.packs": ("Picture packs for training and evaluation", ("Pack", "open_pack")),
}
# Classes whose methods are part of what a user calls.
WITH_METHODS = {"Inverter", "Inverted", "Stylizer", "Direction", "Directions"}


def text() -> str:
    """The whole of docs/api.md."""
    parts, seen = [HEAD], set()
    for name, (purpose, names) in MODULES.items():
        lines, module = [], importlib.import_module(name)
        for public, value in [(each, getattr(module, each)) for each in names] or public_names(module):
            if not _counts(value) or id(value) in seen:
                continue
            seen.add(id(value))
            lines.append(f"- {_entry(public, value)}")
            if public in WITH_METHODS:
                lines += [f"    - {_entry('.' + method, member)}" for method, member in _methods(value)]
        parts.append(f"\n## {name}\n\n{purpose}.\n\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def public_names(module: ModuleType) -> list[tuple[str, Any]]:
    """`__all__`, or the functions and classes that a module defines itself, in the order of the file."""
    if hasattr(module, "__all__"):
        return [(name, getattr(module, name)) for name in module.__all__]
    own = [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and hasattr(value, "__qualname__")
    ]
    return own


def resolve(name: str) -> Any:
    """What a dotted name stands for: a module, or something in one. AttributeError where there is none."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def _counts(value: Any) -> bool:
    return callable(value) or not isinstance(value, str | int | float)


def _methods(cls: type) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, classmethod | property))
        and inspect.getdoc(value)
    ]


def _entry(name: str, value: Any) -> str:
    doc = "" if _is_data(value) else _first_sentence(inspect.getdoc(value) or "")
    if _is_data(value):
        doc = "A table, by name."
    return f"`{name}{_signature(value)}`" + (f": {doc}" if doc else "")


def _is_data(value: Any) -> bool:
    return not callable(value) and not isinstance(value, classmethod | property)


def _signature(value: Any) -> str:
    if isinstance(value, property) or _is_data(value):
        return ""
    if isinstance(value, type) and issubclass(value, Exception):
        return ""
    function = value.__func__ if isinstance(value, classmethod) else value
    found = inspect.signature(function)
    bound = isinstance(value, classmethod) or "self" in found.parameters
    kept = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_default(parameter.default))
        for parameter in list(found.parameters.values())[bound:]
    ]
    if len(kept) > 9 and isinstance(value, type):
        return "(...)"
    short = str(found.replace(parameters=kept, return_annotation=inspect.Signature.empty))
    return short.replace("=Ellipsis", "=...")


def _default(value: Any) -> Any:
    """What has no readable form, such as a function, as three points."""
    return ... if "<" in repr(value) and value is not inspect.Parameter.empty else value


def _first_sentence(doc: str) -> str:
    paragraph = " ".join(doc.split("\n\n", 1)[0].split())
    return (
        re.split(r"(?<=\.)\s+(?=[A-Z`(])", paragraph, maxsplit=1)[0].removesuffix(":").removesuffix(".") + "."
    )


if __name__ == "__main__":
    print(text(), end="")
