"""How networks lie in memory, and in which numbers they compute.

The command line offers `Precision` and starts without torch, so torch is imported where it is used.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

if TYPE_CHECKING:
    import torch
    from torch import nn

Network = TypeVar("Network", bound="nn.Module")
Precision = Literal["fp32", "bf16"]


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


def check_precision(precision: str, device: "torch.device") -> Precision:
    """ValueError for numbers that are not known, or that a device does not compute in."""
    import torch

    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(get_args(Precision))}")
    if precision == "bf16" and not torch.amp.is_autocast_available(device.type):
        raise ValueError(f"{device.type} has no mixed precision: leave precision at 'fp32'")
    return cast("Precision", precision)


def computing_in(precision: Precision, device: "torch.device") -> AbstractContextManager[Any]:
    """A context in which products and convolutions run in `precision`; states of scans are float32 in any."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
