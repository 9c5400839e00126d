"""How much memory something takes at its peak, on the CPU (Linux) or an accelerator."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from mambastyle.allocator import return_freed_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """`bytes`: the most that was held inside the block beyond what was held at its start, or None."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[Peak]:
    """Measure a block; on the CPU by the process's high-water mark, which only Linux can reset."""
    peak = Peak()
    if device is not None and device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield peak
        peak.bytes = torch.accelerator.max_memory_allocated(device) - before
        return
    # Kept memory would be taken for what the block starts from.
    return_freed_memory()
    try:
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
