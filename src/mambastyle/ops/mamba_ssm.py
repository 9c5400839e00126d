"""The scan under the name and with the arguments that mamba-ssm gives it."""

from jaxtyping import Float
from torch import Tensor

from mambastyle.ops.selective_scan import selective_scan


def selective_scan_fn(
    u: Float[Tensor, "batch channels length"],
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "channels state"]
    | Float[Tensor, "batch state length"]
    | Float[Tensor, "batch groups state length"],
    C: Float[Tensor, "channels state"]
    | Float[Tensor, "batch state length"]
    | Float[Tensor, "batch groups state length"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch channels length"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> (
    Float[Tensor, "batch channels length"]
    | tuple[Float[Tensor, "batch channels length"], Float[Tensor, "batch channels state"]]
):
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_fn`, on whatever device the tensors are.

    The output has the dtype of u, the last state is float32. A is real: the complex A of S4 models is refused
    (TypeError). Errors, precision and backends are those of `selective_scan`.
    """
    if A.is_complex():
        raise TypeError(
            f"A must be real: got {A.dtype}; complex state spaces (S4) need the mamba-ssm package itself"
        )
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
