"""How ops become PyTorch's without its compiler.

`torch.library.custom_op` and `torch.compiler.assume_constant_result` import torch._dynamo, at the first call
and at once: one to two seconds of every process, most of which compile nothing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def custom_op(
    name: str, device_type: str = "default"
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Makes a function that changes none of its arguments the op `name`, for tensors on a type of device."""

    def define(function: Callable[..., Any]) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, device_type)(function)
        namespace, own_name = name.split("::")
        return getattr(getattr(torch.ops, namespace), own_name).default

    return define


def constant_result(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`: torch.compile runs the function instead of following it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that the original does
    return function
