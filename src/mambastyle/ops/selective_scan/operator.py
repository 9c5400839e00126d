"""What PyTorch has to know of a backend's two ops: shapes, derivatives, and the work they do.

A backend defines `mambastyle::NAME` and `mambastyle::NAME_backward`, both on tensors shaped as in
`selective_scan`, with B and C (batch, groups, state, length):

    NAME(u, delta, A, B, C, D?, delta_bias?, delta_softplus, keep_starts) -> y, last state, starts
    NAME_backward(grad_y, grad_last, u, delta, A, B, C, D?, delta_bias?, delta_softplus, starts)
        -> gradients of u, delta, A, B, C, D and delta_bias; of one that was not given, (channels,)

`starts` holds the state before each tile, in the backend's own layout. It is what gradients need; without
`keep_starts` it is empty.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def register(name: str, backend: str, empty_outputs: Callable[[Tensor, Tensor, Tensor, bool], tuple]) -> None:
    """Gives the ops their fake versions, derivatives and flop formulas.

    `empty_outputs(u, A, B, keep_starts)` makes what the forward op returns, unfilled.
    """
    forward_op, backward_op = f"mambastyle::{name}", f"mambastyle::{name}_backward"

    def fake(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_starts):  # type: ignore
        return empty_outputs(u, A, B, keep_starts)

    def fake_backward(grad_y, grad_last, u, delta, A, B, C, D, delta_bias, delta_softplus, starts):  # type: ignore
        absent = u.new_empty(u.shape[1], dtype=torch.float32)
        given = (u, delta, A, B, C, D, delta_bias)
        return tuple(absent.clone() if x is None else x.new_empty(x.shape) for x in given)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.delta_softplus, _ = inputs
        # Without this, autograd would make zeros of the size of all stored states.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2])

    def backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, grad_starts: None) -> tuple:
        *tensors, starts = ctx.saved_tensors
        u, _, A, *_ = tensors
        if grad_y is None:
            grad_y = u.new_zeros(u.shape, dtype=torch.float32)
        if grad_last is None:
            grad_last = u.new_zeros(*u.shape[:2], A.shape[-1], dtype=torch.float32)
        op = getattr(torch.ops.mambastyle, f"{name}_backward")
        grads = op(grad_y, grad_last, *tensors, ctx.delta_softplus, starts)
        return (*(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), None, None)

    torch.library.register_fake(forward_op, fake)
    torch.library.register_fake(backward_op, fake_backward)
    torch.library.register_autograd(forward_op, backward, setup_context=setup_context)
    torch.library.register_autograd(backward_op, refuse_second_derivative("selective scan", backend))
    register_flop_formula(getattr(torch.ops.mambastyle, name))(_flops)
    register_flop_formula(getattr(torch.ops.mambastyle, f"{name}_backward"))(_backward_flops)


def as_given(grad: Tensor, x: Tensor | None) -> Tensor:
    """A gradient image by image as its tensor: summed if the images share it, in its dtype."""
    if x is None:
        return grad.sum(0)
    return (grad if grad.ndim == x.ndim else grad.sum(0)).to(x.dtype)


def refuse_second_derivative(what: str, backend: str) -> Callable[..., None]:
    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"the '{backend}' {what} has no second derivative: run it with backend='reference' "
            "where gradients are differentiated again (gradient penalties)"
        )

    return refuse


def _flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore
    """9 per state and step, as VMamba's counter and mamba-ssm's paper count it, plus 2 for D u."""
    batch, channels, length = u_shape
    return batch * channels * length * (9 * A_shape[-1] + 2)


def _backward_flops(*shapes, out_shape=None, **kwargs) -> int:  # type: ignore
    """Twice the forward pass, as for a matrix product."""
    return 2 * _flops(*shapes[2:])


def run(
    op: Callable[..., tuple[Tensor, Tensor, Tensor]],
    u: Float[Tensor, "batch channels length"],
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels state"] | Float[Tensor, "batch channels state"],
    B: Float[Tensor, "batch groups state length"],
    C: Float[Tensor, "batch groups state length"],
    D: Float[Tensor, " channels"] | Float[Tensor, "batch channels"] | None,
    delta_bias: Float[Tensor, " channels"] | None,
    delta_softplus: bool,
) -> tuple[Float[Tensor, "batch channels length"], Float[Tensor, "batch channels state"]]:
    """`selective_scan` without gate by a backend's op: y and the last state."""
    tensors = (u, delta, A, B, C, D, delta_bias)
    keep_starts = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, last_state, _ = op(*tensors, delta_softplus, keep_starts)
    return y, last_state
