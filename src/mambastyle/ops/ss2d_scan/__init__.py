"""The two-dimensional selective scan (VMamba, Liu et al. 2024, section 4) as one function on tokens."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambastyle.ops.selective_scan import scan_backend, selective_scan

__all__ = ["ss2d_scan"]


def ss2d_scan(
    u: Float[Tensor, "batch length channels"],
    dt_low: Float[Tensor, "batch length paths rank"],
    dt_weight: Float[Tensor, "paths channels rank"],
    A: Float[Tensor, "paths channels state"] | Float[Tensor, "batch paths channels state"],
    B: Float[Tensor, "batch length paths state"],
    C: Float[Tensor, "batch length paths state"],
    D: Float[Tensor, "paths channels"] | Float[Tensor, "batch paths channels"],
    dt_bias: Float[Tensor, "paths channels"],
    paths: Int[Tensor, "paths length"],
    write_paths: Int[Tensor, "paths length"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "batch length channels"]:
    """Scans tokens along several paths, each with its own parameters, and adds up what comes out.

    On path k, whose step t reads position p = paths[k, t] and writes to q = write_paths[k, t]:

        d_t = softplus(dt_weight_k dt_low_kp + dt_bias_k)
        h_t = exp(d_t A_k) h_{t-1} + d_t B_kp u_p,   h_0 = 0
        y_q = y_q + C_kp . h_t + D_k u_p

    for each image and channel. Nothing is moved into the order of a path: u, dt_low, B and C stay at their
    positions, whichever tensors they come from (Mamba-ST takes C from the content, the rest from the style).
    `write_paths` is `paths` unless given; `ops.cross_paths` and `ops.zigzag_paths` make such tables. A and D
    may differ from image to image.

    The computation runs in float32 (float64 if an input is) whatever the inputs' dtypes and autocast; y has
    the dtype of u. `backend` is "auto" or a name in `available_backends()`, as for `selective_scan`.

    Raises:
        TypeError: not float tensors, or float64 with a backend that computes in float32.
        ValueError: shapes, devices or positions that do not fit, or a backend that cannot run.
    """
    write_paths = paths if write_paths is None else write_paths
    given = {"u": u, "dt_low": dt_low, "dt_weight": dt_weight, "A": A, "B": B, "C": C, "D": D}
    given["dt_bias"] = dt_bias
    _check(given, {"paths": paths, "write_paths": write_paths})
    chosen = scan_backend(backend, *given.values())
    # Autocast would run single operations in half precision.
    with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
        return _SCANS[chosen](u, dt_low, dt_weight, A, B, C, D, dt_bias, paths, write_paths)


def _check(given: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a real floating-point tensor: got {kind}")
    for name, table in tables.items():
        if table.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 table of positions: got {table.dtype}")
    devices = {str(tensor.device) for tensor in (*given.values(), *tables.values())}
    if len(devices) > 1:
        raise ValueError(f"all inputs must be on one device: got {', '.join(sorted(devices))}; move them")
    u, dt_low, B = given["u"], given["dt_low"], given["B"]
    for name, tensor, axes in (
        ("u", u, "(batch, length, channels)"),
        ("dt_low", dt_low, "(batch, length, paths, rank)"),
        ("B", B, "(batch, length, paths, state)"),
    ):
        if tensor.ndim != axes.count(",") + 1 or min(tensor.shape) < 1:
            raise ValueError(f"{name} must be {axes}, none of them 0: got {tuple(tensor.shape)}")
    batch, length, channels = u.shape
    paths, rank = dt_low.shape[2:]
    state = B.shape[3]
    fitting = {
        "dt_low": [(batch, length, paths, rank)],
        "dt_weight": [(paths, channels, rank)],
        "A": [(paths, channels, state), (batch, paths, channels, state)],
        "B": [(batch, length, paths, state)],
        "C": [(batch, length, paths, state)],
        "D": [(paths, channels), (batch, paths, channels)],
        "dt_bias": [(paths, channels)],
        "paths": [(paths, length)],
        "write_paths": [(paths, length)],
    }
    for name, tensor in {**given, **tables}.items():
        if name in fitting and tuple(tensor.shape) not in fitting[name]:
            expected = " or ".join(str(shape) for shape in fitting[name])
            raise ValueError(
                f"{name} must be {expected} to fit u {tuple(u.shape)}, dt_low {tuple(dt_low.shape)} and "
                f"B {tuple(B.shape)}: got {tuple(tensor.shape)}"
            )


def _scan_reference(
    u: Tensor,
    dt_low: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    paths: Tensor,
    write_paths: Tensor,
) -> Float[Tensor, "batch length channels"]:
    tensors = (u, dt_low, dt_weight, A, B, C, D, dt_bias)
    double = any(x.dtype == torch.float64 for x in tensors)
    dtype = torch.float64 if double else torch.float32
    tokens, dt_low, dt_weight, A, B, C, D, dt_bias = (x.to(dtype) for x in tensors)
    number = torch.arange(len(paths), device=u.device)[:, None]

    def in_order(
        x: Float[Tensor, "batch length paths entries"],
    ) -> Float[Tensor, "batch paths entries length"]:
        return x[:, paths, number].transpose(-1, -2)

    steps = torch.matmul(dt_weight, in_order(dt_low))  # (batch, paths, channels, length)
    walked = tokens[:, paths].transpose(-1, -2)  # (batch, paths, channels, length)
    y = selective_scan(
        walked.flatten(1, 2),
        steps.flatten(1, 2),
        A.flatten(-3, -2),
        in_order(B),
        in_order(C),
        D.flatten(-2),
        delta_bias=dt_bias.flatten(),
        delta_softplus=True,
        backend="reference",
    )
    assert isinstance(y, Tensor)  # a pair only where the last state is asked for
    y = (
        y.unflatten(1, (len(paths), -1)).permute(0, 1, 3, 2).flatten(1, 2)
    )  # (batch, paths * length, channels)
    return torch.zeros_like(tokens).index_add(1, write_paths.flatten(), y).to(u.dtype)


def _scan_numba(u: Tensor, dt_low: Tensor, *inputs: Tensor) -> Tensor:
    from mambastyle.ops.ss2d_scan import cpu_numba

    dt_weight, A, B, C, *rest = inputs
    # The kernels read bfloat16 where it lies; half precision of the other kind is converted.
    tokens, dt_low, B, C = (x if x.dtype == torch.bfloat16 else x.float() for x in (u, dt_low, B, C))
    return _scan_by_kernels(cpu_numba.scan_op, tokens, dt_low, dt_weight, A, B, C, *rest).to(u.dtype)


def _scan_triton(*inputs: Tensor) -> Tensor:
    from mambastyle.ops.ss2d_scan import gpu_triton

    return _scan_by_kernels(gpu_triton.scan_op, *inputs)


def _scan_by_kernels(
    op: Any,
    u: Tensor,
    dt_low: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    paths: Tensor,
    write_paths: Tensor,
) -> Float[Tensor, "batch length channels"]:
    """Calls a backend's op (operator.py) on packed parameters."""
    from mambastyle.ops.ss2d_scan import operator

    A, D = (A if A.ndim == 4 else A[None]).float(), (D if D.ndim == 3 else D[None]).float()
    # Not len(), which would make a number of a symbol where torch.export traces.
    images = max(A.shape[0], D.shape[0])
    A, D = A.expand(images, -1, -1, -1), D.expand(images, -1, -1)
    parameters = operator.pack(A, dt_weight.float(), dt_bias.float(), D)
    return operator.run(op, u, dt_low, B, C, parameters, paths, write_paths)


_Scan = Callable[..., Tensor]
_SCANS: MappingProxyType[str, _Scan] = MappingProxyType(
    {"reference": _scan_reference, "numba": _scan_numba, "triton": _scan_triton}
)
