"""What PyTorch has to know of a backend's two ops: shapes, derivatives, and the work they do.

A backend defines `mambastyle::NAME` and `mambastyle::NAME_backward`:

    NAME(u, dt, B, C, parameters, read, write, keep_starts) -> y, starts
    NAME_backward(grad_y, u, dt, B, C, parameters, read, write, starts)
        -> gradients of u, dt, B, C and parameters, each in the dtype and shape of its tensor

u is (batch, length, channels), dt, B and C are (batch, length, paths, entries), the tables (paths, length),
and `parameters` is what `pack` makes. y has the dtype of u. `starts` holds the state before each tile, in the
backend's own layout. It is what gradients need; without `keep_starts` it is empty.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from mambastyle.ops.selective_scan.operator import refuse_second_derivative

PACKED = 16  # channels in a block of parameters


def register(
    name: str, backend: str, empty_outputs: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
) -> None:
    """Gives the ops their fake versions, derivatives and flop formulas.

    `empty_outputs(u, B, keep_starts)` makes what the forward op returns, unfilled.
    """
    forward_op, backward_op = f"mambastyle::{name}", f"mambastyle::{name}_backward"

    def fake(u, dt, B, C, parameters, read, write, keep_starts):  # type: ignore
        return empty_outputs(u, B, keep_starts)

    def fake_backward(grad_y, u, dt, B, C, parameters, read, write, starts):  # type: ignore
        return tuple(x.new_empty(x.shape) for x in (u, dt, B, C, parameters))

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, _ = inputs
        # Without this, autograd would make zeros of the size of all stored states.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    def backward(ctx: Any, grad_y: Tensor | None, grad_starts: None) -> tuple:
        if grad_y is None:
            return (None,) * 8
        grads = getattr(torch.ops.mambastyle, f"{name}_backward")(grad_y, *ctx.saved_tensors)
        return (*grads, None, None, None)

    torch.library.register_fake(forward_op, fake)
    torch.library.register_fake(backward_op, fake_backward)
    torch.library.register_autograd(forward_op, backward, setup_context=setup_context)
    torch.library.register_autograd(backward_op, refuse_second_derivative("SS2D scan", backend))
    register_flop_formula(getattr(torch.ops.mambastyle, name))(_flops)
    register_flop_formula(getattr(torch.ops.mambastyle, f"{name}_backward"))(_backward_flops)


def _flops(u_shape, dt_shape, B_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore
    """9 per state and step, 2 per step for D u and 2 for each rank of the step size, on every path."""
    batch, length, channels = u_shape
    return batch * length * channels * dt_shape[2] * (9 * B_shape[3] + 2 * dt_shape[3] + 2)


def _backward_flops(grad_y_shape, *shapes, out_shape=None, **kwargs) -> int:  # type: ignore
    """Twice the forward pass, as for a matrix product."""
    return 2 * _flops(*shapes)


def check_table(table: Int[Tensor, "paths length"], length: int) -> None:
    """Raises unless all positions lie on the grid; on a GPU it does so without waiting for the device."""
    low, high = torch.aminmax(table)
    if table.is_cuda:
        inside = (low >= 0) & (high < length)
        torch._assert_async(inside, f"paths must hold positions from 0 to {length - 1}")  # type: ignore
    elif low < 0 or high >= length:
        raise ValueError(f"paths must hold positions from 0 to {length - 1}: got {int(low)} to {int(high)}")


def with_entries_together(x: Float[Tensor, "batch length paths entries"]) -> Tensor:
    """The tensor, copied only if the entries of a position and path do not lie side by side.

    The three parts of one projection are read where they lie.
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def pack(
    A: Float[Tensor, "images paths channels state"],
    dt_weight: Float[Tensor, "paths channels rank"],
    dt_bias: Float[Tensor, "paths channels"],
    D: Float[Tensor, "images paths channels"],
) -> Float[Tensor, "images paths blocks entries 16"]:
    """What kernels know of each block of 16 channels, side by side: log2(e) A, the weights of the step sizes,
    their bias, and D. Zeros fill up the last block.
    """
    images, _, channels, _ = A.shape
    parts = (A * math.log2(math.e), dt_weight.expand(images, -1, -1, -1))
    parts += (dt_bias.expand(images, -1, -1).unsqueeze(-1), D.unsqueeze(-1))
    packed = torch.cat(parts, dim=-1)  # (images, paths, channels, entries)
    if channels % PACKED:
        packed = F.pad(packed, (0, 0, 0, -channels % PACKED))
    return packed.unflatten(2, (-1, PACKED)).transpose(-1, -2).contiguous()


def run(
    op: Callable[..., tuple[Tensor, Tensor]],
    u: Float[Tensor, "batch length channels"],
    dt: Float[Tensor, "batch length paths rank"],
    B: Float[Tensor, "batch length paths state"],
    C: Float[Tensor, "batch length paths state"],
    parameters: Float[Tensor, "images paths blocks entries 16"],
    read: Int[Tensor, "paths length"],
    write: Int[Tensor, "paths length"],
) -> Float[Tensor, "batch length channels"]:
    """`ss2d_scan` with packed parameters by a backend's op."""
    tensors = (u, dt, B, C, parameters)
    keep_starts = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    y, _ = op(*tensors, read, write, keep_starts)
    return y
