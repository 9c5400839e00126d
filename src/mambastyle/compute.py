"""How networks lie in memory, and in which numbers they compute.

The command line offers `Precision` and starts without torch, so torch is imported where it is used.
"""

import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

if TYPE_CHECKING:
    import torch
    from torch import nn

Network = TypeVar("Network", bound="nn.Module")
Precision = Literal["fp32", "bf16", "auto"]

logger = logging.getLogger(__name__)


def channels_last(network: Network, device: "torch.device | None" = None) -> Network:
    """The network on a device, its kernels laid out so that convolutions take and give channels-last maps.

    The channels of a position lie side by side, as the scans want them too. On a CPU the other layout
    takes 1.03 to 1.23 times as long in float32 (docs/kernels.md).
    """
    import torch

    return cast("Any", network).to(device=device, memory_format=torch.channels_last)


def freeze(network: Network, device: "torch.device") -> Network:
    """The network on a device for inference: without gradients, norms by their running statistics."""
    return channels_last(network, device).eval().requires_grad_(False)


def has_bfloat16(device: "torch.device") -> bool:
    """Whether the hardware behind a device multiplies bfloat16, where that is known.

    Elsewhere PyTorch makes it of float32, on processors without AVX-512 by loops of its own: a training step
    of kaokore64's generator took 24 s there instead of 1.4.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Older versions of torch cannot tell.
        found = getattr(torch.cpu, "get_capabilities", dict)()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def check_precision(precision: str, device: "torch.device") -> Precision:
    """What to compute in on a device: "auto" becomes "bf16" where the hardware has it, else "fp32".

    ValueError for numbers that are not known, or that a device does not compute in; a warning for bfloat16
    that is made of float32.
    """
    import torch

    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(get_args(Precision))}")
    if precision == "auto":
        return "bf16" if has_bfloat16(device) else "fp32"
    if precision == "bf16":
        if not torch.amp.is_autocast_available(device.type):
            raise ValueError(f"{device.type} has no mixed precision: leave precision at 'fp32'")
        if not has_bfloat16(device):
            logger.warning(
                "this %s is not known to have bfloat16, and can be many times slower with it: "
                "precision 'auto' takes fp32 here",
                device.type,
            )
    return cast("Precision", precision)


def computing_in(precision: Precision, device: "torch.device") -> AbstractContextManager[Any]:
    """A context in which products and convolutions run in `precision`; states of scans are float32 in any.

    `precision` is what `check_precision` gave.
    """
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
