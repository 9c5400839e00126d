"""The selective scan in plain PyTorch: the specification that every other backend is compared with.

Equation 2 of Mamba (Gu and Dao, 2023) with the discretisation of its published code: exp for A, Euler for B.
It runs on any device in any float dtype and can be differentiated any number of times.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64


def scan(
    u: Float[Tensor, "batch channels length"],
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "#batch channels state"],
    B: Float[Tensor, "#batch groups #group state #length"],
    C: Float[Tensor, "#batch groups #group state #length"],
) -> tuple[Float[Tensor, "batch channels length"], Float[Tensor, "batch channels state"]]:
    """`h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t` from h_0 = 0, and `y_t = C_t . h_t`.

    All inputs have one dtype, the one that is computed in; `delta` has its bias and softplus already. B and C
    have either one row for all channels of a group and one column per step, or one row per channel and one
    column. Returns y and the state after the last step.

    The states of one chunk of steps exist at a time. With gradients only the states between the chunks are
    kept, and the backward pass computes each chunk again: memory O(length / CHUNK + CHUNK) instead of
    O(length) states.
    """
    batch, channels, length = u.shape
    groups = B.shape[1]

    def time_first(x: Tensor) -> Tensor:  # (length, batch, groups, group, 1)
        return x.reshape(batch, groups, channels // groups, length).permute(3, 0, 1, 2).unsqueeze(-1)

    u, delta = time_first(u), time_first(delta)
    B, C = B.permute(4, 0, 1, 2, 3), C.permute(4, 0, 1, 2, 3)  # (#length, #batch, groups, #group, state)
    A = A.reshape(A.shape[0], groups, channels // groups, A.shape[-1])

    # Recomputing by hand in an autograd.Function would need its own second derivative; checkpoint has it.
    recompute = torch.is_grad_enabled() and length > CHUNK
    h = u.new_zeros(batch, groups, channels // groups, A.shape[-1])
    outputs = []
    for start in range(0, length, CHUNK):
        steps = slice(start, min(start + CHUNK, length))
        chunk = (h, u[steps], delta[steps], A, _steps(B, steps), _steps(C, steps))
        if recompute:
            y, h = checkpoint(_scan_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)  # type: ignore
        else:
            y, h = _scan_chunk(*chunk)
        outputs.append(y)
    y = torch.cat(outputs).permute(1, 2, 3, 0)  # (batch, groups, group, length)
    return y.reshape(batch, channels, length), h.reshape(batch, channels, -1)


def _steps(x: Tensor, steps: slice) -> Tensor:
    return x if x.shape[0] == 1 else x[steps]


def _scan_chunk(
    h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Float[Tensor, "steps batch groups group"], Float[Tensor, "batch groups group state"]]:
    decay = torch.exp(delta * A)  # (steps, batch, groups, group, state)
    drive = delta * u * B  # (steps, batch, groups, group, state)
    states = []
    for decay_t, drive_t in zip(decay.unbind(), drive.unbind(), strict=True):
        h = decay_t * h + drive_t
        states.append(h)
    return (torch.stack(states) * C).sum(-1), h
