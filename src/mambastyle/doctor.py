"""Does this installation work, and what does it lack? `mambastyle doctor` and the page's Doctor tab show it.

Each check imports what it checks: a broken torch is a finding, not a traceback.
"""

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """One part of the installation; `detail` is a version, or what is wrong and what to do."""

    what: str
    state: Literal["ok", "broken", "absent"]
    detail: str


def examine() -> list[Finding]:
    """Run every check: the parts that have to work, then the optional packages."""
    findings = []
    for name, check in _CHECKS.items():
        try:
            findings.append(Finding(name, "ok", check()))
        except (ImportError, RuntimeError, ValueError, OSError) as error:
            findings.append(Finding(name, "broken", " ".join(str(error).split())))
    for package, extra in _OPTIONAL.items():
        try:
            findings.append(Finding(package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "absent", f'optional: pip install "mambastyle[{extra}]"'))
    return findings


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _device() -> str:
    import torch

    if not torch.accelerator.is_available():
        return "no accelerator, so the CPU"
    return str(torch.accelerator.current_accelerator())


def _precision() -> str:
    """Whether `precision="bf16"` pays: elsewhere bfloat16 is made of float32 and is slower."""
    import torch

    from mambastyle.compute import has_bfloat16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = "this GPU" if device.type == "cuda" else "this CPU"
    if has_bfloat16(device):
        return f"bfloat16 is in the hardware of {where}"
    return f"{where} is not known to have bfloat16: fp32 is faster"


def _scan() -> str:
    """Every backend that says it can run must agree with the reference."""
    import torch

    from mambastyle.ops import available_backends, scan_backend, selective_scan

    random = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 1, 4, 9, generator=random)
    A = -torch.rand(4, 3, generator=random)
    B, C = torch.randn(2, 1, 1, 3, 9, generator=random)
    expected = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="reference")
    for backend in available_backends():
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        inputs = [x.to(device) for x in (u, delta, A, B, C)]
        y = selective_scan(*inputs, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
        if not torch.allclose(y.to("cpu"), expected, atol=1e-5):  # type: ignore[arg-type, union-attr]
            raise RuntimeError(f"the backend {backend} disagrees with the reference: please report it")
    return f"{', '.join(available_backends())}; auto is {scan_backend('auto', u)}"


def _pillow() -> str:
    from PIL import Image, features

    if missing := [name for name in ("jpg", "zlib", "webp", "freetype2") if not features.check(name)]:
        raise RuntimeError(f"Pillow was built without {', '.join(missing)}: install its wheel from PyPI")
    return Image.__version__


def _presets() -> str:
    from mambastyle import checkpoints
    from mambastyle.presets import PRESETS

    states = []
    for preset in PRESETS.values():
        missing = preset.missing()
        for name in preset.files:
            if name not in missing:
                checkpoints.load(preset.folder / name)
        states.append(f"{preset.name} lacks {', '.join(missing)}" if missing else f"{preset.name} verified")
    return "; ".join(states)


_CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "torch": _torch,
    "device": _device,
    "precision": _precision,
    "selective scan": _scan,
    "pictures": _pillow,
    "presets": _presets,
}
_OPTIONAL = {
    "accelerate": "train",
    "tensorboard": "train",
    "torchmetrics": "eval",
    "scikit-learn": "directions",
    "av": "video",
    "onnxruntime": "onnx",
    "huggingface_hub": "hub",
    "ray": "ray",
    "gradio": "ui",
    "yuface": "faces",
}
