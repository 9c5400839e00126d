"""What a stylization will take, and what there is: said before the work starts, not by the kernel after."""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from mambastyle.allocator import giving_back, keeps_freed_memory, kept_bytes
from mambastyle.models.mamba_st import MambaST
from mambastyle.models.samam import SaMam

logger = logging.getLogger(__name__)

_MEMINFO = Path("/proc/meminfo")
_GROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)

# Kept memory lies in pieces between what is in use, and how much of it varies: SaMam (dim 256) then
# held from 4.4 to 6.2 GB at 4096 px where 3.8 are estimated (3.3 with memory that goes back).
_SCATTERED = 1.65


def needed_bytes(network: SaMam | MambaST, height: int, width: int) -> int:
    """About the most that one stylization of a picture of this size holds at once, in float32."""
    config = network.config
    ss2d = config.ss2d
    positions = max(-(-height // config.patch), 2) * max(-(-width // config.patch), 2)
    pixels = 3 * height * width
    # The widest moment is a scan. Counted on tensors without memory (evaluation.cost): 11 and 14 times the
    # width of the map; the process then held 1.09 times as much (SaMam, dim 64, 2048 px: 807 MB).
    maps = 14 if isinstance(network, MambaST) else 11
    scanning = positions * (maps * config.dim + 4 * (ss2d.dt_rank + ss2d.state)) * 1.1 + 2 * pixels
    # The decoder works on strips of one size whatever the picture's is, then come copies of the picture.
    widest = max(config.decoder[-2][-1], *config.decoder[-1][:-1])
    strip = min(positions, 1.3 * 128 * 128) * config.patch**2 * widest
    painting = 2 * positions * config.dim + 7 * pixels + 4.6 * strip
    return round(4 * max(scanning, painting))


def available_bytes(device: torch.device) -> int | None:
    """What may still be allocated on a device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
        for limit, used in _GROUP_LIMITS:
            # "max" where there is no limit.
            if limit.is_file() and (most := limit.read_text().strip()).isdecimal():
                found.append(int(most) - int(used.read_text()))
    except (OSError, KeyError, ValueError):
        pass
    return min(found) + kept_bytes() if found else None


def room_for(
    network: SaMam | MambaST, height: int, width: int, device: torch.device
) -> AbstractContextManager[None]:
    """To stylize a picture of this size within; ValueError with the largest side that fits where it does not.

    Where it fits only if freed memory goes back to the system, that is what happens meanwhile.
    """
    needed, free = needed_bytes(network, height, width), available_bytes(device)
    if free is None or needed * (_SCATTERED if keeps_freed_memory() else 1) <= free:
        return nullcontext()
    if needed <= free:
        logger.info("%d x %d: memory is not kept for this picture, which takes longer", height, width)
        return giving_back()
    side = max(height, width)
    fitting = int(side * (free / needed) ** 0.5) // 16 * 16
    raise ValueError(
        f"a picture of {height} x {width} takes about {needed / 1e9:.1f} GB with this model, and "
        f"{free / 1e9:.1f} GB are free: scale it to {fitting} px on the long side (--size {fitting})"
    )
