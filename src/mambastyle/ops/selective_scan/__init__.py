"""The selective scan of Mamba (Gu and Dao, 2023, section 3.3): one function, several backends."""

import importlib
import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from mambastyle.ops.registration import constant_result
from mambastyle.ops.selective_scan import reference

__all__ = ["available_backends", "scan_backend", "selective_scan", "unavailable_reason"]

_log = logging.getLogger(__name__)


def selective_scan(
    u: Float[Tensor, "batch channels length"],
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels state"] | Float[Tensor, "batch channels state"],
    B: Float[Tensor, "batch groups state length"]
    | Float[Tensor, "batch state length"]
    | Float[Tensor, "channels state"],
    C: Float[Tensor, "batch groups state length"]
    | Float[Tensor, "batch state length"]
    | Float[Tensor, "channels state"],
    D: Float[Tensor, " channels"] | Float[Tensor, "batch channels"] | None = None,
    z: Float[Tensor, "batch channels length"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> (
    Float[Tensor, "batch channels length"]
    | tuple[Float[Tensor, "batch channels length"], Float[Tensor, "batch channels state"]]
):
    """Runs a state-space model whose step size, input and output maps change along the sequence.

        d_t = softplus(delta_t + delta_bias)                  (softplus if delta_softplus)
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t,   h_0 = 0
        y_t = (C_t . h_t + D u_t) * silu(z_t)

    for each image and channel, over `state` entries of h. Arguments mean what they mean to mamba-ssm's
    `selective_scan_fn`; beyond it, A and D may differ from image to image, as SaMam and S7 need. With
    `groups`, the channels are split into that many consecutive runs of equal size, each with its own B and C.

    The computation runs in float32 (float64 if an input is) whatever the inputs' dtypes and autocast; y has
    the dtype of u, and the last state, which comes back too with `return_last_state`, that of the
    computation. Both carry gradients. `backend` is "auto" or a name in `available_backends()`; `scan_backend`
    tells what "auto" stands for.

    Raises:
        TypeError: not float tensors, or float64 with a backend that computes in float32.
        ValueError: shapes or devices that do not fit, or a backend that cannot run.
    """
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check_tensors(given)
    _check_shapes(given)
    chosen = scan_backend(backend, *given.values())
    y, last_state = _SCANS[chosen](
        u, delta, A, B, C, D, delta_bias, delta_softplus, _compute_dtype(*given.values())
    )
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run in this process."""
    return tuple(name for name in _SCANS if unavailable_reason(name) is None)


@constant_result
def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run here, with the remedy, or None if it can."""
    if name not in _SCANS:
        raise ValueError(f"backend must be 'auto' or one of {list(_SCANS)}: got {name!r}")
    if name == "reference":
        return None
    if name not in _import_problems:
        _import_problems[name] = _import_problem(name)
    return _import_problems[name]


def scan_backend(backend: str = "auto", *tensors: Tensor) -> str:
    """The backend that `selective_scan(..., backend=backend)` uses for these tensors.

    Without tensors the answer is the one for float32 on the CPU.

    "auto" is `triton` for tensors on a CUDA (or ROCm) device and `numba` for those on the CPU, wherever the
    package can be imported, none is float64 and none carries a forward-mode tangent, and else `reference`.

    Raises ValueError, TypeError or NotImplementedError, with the reason and the remedy, if a named backend
    cannot run on the tensors.
    """
    if backend == "auto":
        device = tensors[0].device.type if tensors else "cpu"
        fastest = _FASTEST.get(device)
        if fastest is None or _misfit(fastest, tensors) is not None:
            return "reference"
        reason = unavailable_reason(fastest)
        if reason is None:
            return fastest
        _warn_once(fastest, reason)
        return "reference"
    reason = unavailable_reason(backend)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    misfit = _misfit(backend, tensors)
    if misfit is not None:
        raise misfit
    return backend


def _misfit(backend: str, tensors: tuple[Tensor, ...]) -> Exception | None:
    """What about the tensors rules the backend out."""
    if backend == "reference":
        return None
    for device in {tensor.device for tensor in tensors}:
        if device.type not in _devices(backend):
            where = "CPU" if backend == "numba" else "GPU"
            return ValueError(
                f"backend {backend!r} runs on the {where}: got a tensor on {device}; "
                "use backend='auto' or move the inputs"
            )
    if _compute_dtype(*tensors) == torch.float64:
        return TypeError(
            f"backend {backend!r} computes in float32: got float64; "
            "use backend='reference' or convert the inputs"
        )
    # The kernels' outputs would have no tangent, which forward mode takes for zero.
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return NotImplementedError(
            f"backend {backend!r} has no forward-mode derivative: use backend='auto' or 'reference'"
        )
    return None


@constant_result
def _devices(backend: str) -> tuple[str, ...]:
    if backend == "numba":
        return ("cpu", "meta")
    from mambastyle.ops import gpu_tiles

    return ("cuda", "meta", "cpu") if gpu_tiles.interpreted() else ("cuda", "meta")


def _import_problem(name: str) -> str | None:
    try:
        if name == "numba":
            importlib.import_module("mambastyle.ops.selective_scan.cpu_numba")
        else:
            gpu_tiles = importlib.import_module("mambastyle.ops.gpu_tiles")
            return gpu_tiles.unavailable()
    # A package that is installed but does not fit the interpreter, NumPy or PyTorch fails in other ways than
    # ImportError.
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        fitting = "this Python and NumPy" if name == "numba" else "this Python and PyTorch"
        return f"importing it failed ({cause}); install a {name} that supports {fitting}"
    return None


@constant_result
def _warn_once(backend: str, reason: str) -> None:
    if backend not in _warned:
        _warned.add(backend)
        _log.warning(
            "selective_scan falls back to the slow 'reference' backend: %r cannot run: %s", backend, reason
        )


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32


def _check_tensors(given: dict[str, Tensor]) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor: got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be a real floating-point tensor: got {tensor.dtype}; "
                "convert it (complex A, which mamba-ssm allows, is not supported)"
            )
    devices = {tensor.device for tensor in given.values()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"all inputs must be on one device: got {names}; move them")


def _check_shapes(given: dict[str, Tensor]) -> None:
    u, A = given["u"], given["A"]
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, channels, length): got {tuple(u.shape)}")
    batch, channels, length = u.shape
    if min(u.shape) < 1:
        raise ValueError(f"u must have at least one image, channel and step: got {tuple(u.shape)}")
    state = A.shape[-1] if A.ndim else 0
    if A.ndim not in (2, 3) or state < 1:
        raise ValueError(f"A must be (channels, state) or (batch, channels, state): got {tuple(A.shape)}")
    fitting: dict[str, list[tuple[int, ...]]] = {
        "delta": [(batch, channels, length)],
        "z": [(batch, channels, length)],
        "A": [(channels, state), (batch, channels, state)],
        "B": [(channels, state), (batch, state, length)],
        "C": [(channels, state), (batch, state, length)],
        "D": [(channels,), (batch, channels)],
        "delta_bias": [(channels,)],
    }
    for name in ("B", "C"):
        if given[name].ndim == 4:
            groups = given[name].shape[1]
            if groups < 1 or channels % groups:
                raise ValueError(
                    f"{name} has {groups} groups, which do not divide u's {channels} channels: "
                    f"{name} must be (batch, groups, state, length) and groups a divisor of the channels"
                )
            fitting[name] = [(batch, groups, state, length)]
    for name, shapes in fitting.items():
        if name in given and given[name].shape not in shapes:
            expected = " or ".join(str(shape) for shape in shapes)
            raise ValueError(
                f"{name} must be {expected} to fit u {tuple(u.shape)} and A {tuple(A.shape)}: "
                f"got {tuple(given[name].shape)}"
            )
    if given["B"].ndim == given["C"].ndim == 4 and given["B"].shape[1] != given["C"].shape[1]:
        raise ValueError(
            "B and C must have the same number of groups: "
            f"got {given['B'].shape[1]} and {given['C'].shape[1]}"
        )


def _groups(B: Tensor, C: Tensor) -> int:
    return max(x.shape[1] if x.ndim == 4 else 1 for x in (B, C))


def _scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch channels length"], Float[Tensor, "batch channels state"]]:
    u, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    groups = _groups(B, C)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def per_group(x: Tensor) -> Float[Tensor, "#batch groups #group state #length"]:
        if x.ndim == 2:
            return x.to(dtype).view(1, groups, -1, x.shape[-1], 1)
        x = x if x.ndim == 4 else x.unsqueeze(1)
        return x.to(dtype).expand(-1, groups, -1, -1).unsqueeze(2)

    # Autocast would run single operations in half precision; it knows none of the kernels.
    with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
        y, last_state = reference.scan(u, delta, A if A.ndim == 3 else A[None], per_group(B), per_group(C))
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * u
    return y, last_state


def _scan_numba(*inputs: Any) -> tuple[Tensor, Tensor]:
    from mambastyle.ops.selective_scan import cpu_numba

    return _scan_by_kernels(cpu_numba.scan_op, *inputs, widen=True)


def _scan_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from mambastyle.ops.selective_scan import gpu_triton

    return _scan_by_kernels(gpu_triton.scan_op, *inputs, widen=False)


def _scan_by_kernels(
    op: Any,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    dtype: torch.dtype,
    *,
    widen: bool,
) -> tuple[Float[Tensor, "batch channels length"], Float[Tensor, "batch channels state"]]:
    """Calls a backend's op (operator.py), with `widen` on tensors of the dtype that is computed in."""
    from mambastyle.ops.selective_scan import operator

    # B and C that differ between channels and not between steps are rare (S4D): every channel is its own
    # group then, which is correct, but fills one lane of sixteen.
    groups = u.shape[1] if 2 in (B.ndim, C.ndim) else _groups(B, C)
    tensors = [u, delta, A, _per_group(B, u, groups), _per_group(C, u, groups), D, delta_bias]
    if widen:
        tensors = [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]
    return operator.run(op, *tensors, delta_softplus)  # type: ignore[arg-type]


def _per_group(x: Tensor, u: Tensor, groups: int) -> Float[Tensor, "batch groups state length"]:
    """B or C of any of its shapes as the ops take it."""
    if x.ndim == 4 and x.shape[1] == groups:
        return x
    if x.ndim == 2:
        return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    x = x if x.ndim == 4 else x.unsqueeze(1)
    return x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], dim=1)


_Scan = Callable[..., tuple[Tensor, Tensor]]
_SCANS: MappingProxyType[str, _Scan] = MappingProxyType(
    {"reference": _scan_reference, "numba": _scan_numba, "triton": _scan_triton}
)
# What "auto" is on each type of device; elsewhere it is the reference.
_FASTEST = {"cpu": "numba", "meta": "numba", "cuda": "triton"}
_import_problems: dict[str, str | None] = {}
_warned: set[str] = set()
