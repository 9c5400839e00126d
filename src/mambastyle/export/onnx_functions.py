"""What torch's exporter has no ONNX for: the selective scans, pooling and repeating of maps of any size.

The recurrence is one `Scan` operator: the state is its loop variable, and a step is six operators on
(batch, paths, channels, state), so any runtime of opset 18 runs it over any length. The rest are functions
that torch's exporter calls for an operator, with its arguments in the operator's order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import FLOAT, graph, opset18, script
from onnxscript.values import Opset

# Untyped: the operators' annotations know single types, and not what the exporter hands over.
op: Any = opset18
TensorType = Any
DOMAIN = Opset("mambastyle", 1)
_FLOAT = 1  # onnx.TensorProto.FLOAT
_LN_2 = 0.6931471805599453


@script(DOMAIN, default_opset=op)
def recurrence(u: FLOAT[...], delta: FLOAT[...], A: FLOAT[...], B: FLOAT[...], C: FLOAT[...]) -> FLOAT[...]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and y_t = C_t . h_t from h_0 = 0.

    u and delta are (batch, paths, length, channels), A (images, paths, channels, state), B and C
    (batch, paths, length, state); y has the shape of u.
    """
    last = op.Constant(value_ints=[-1])
    row = op.Constant(value_ints=[-2])
    size = op.Concat(op.Shape(u, start=0, end=2), op.Shape(A, start=2, end=4), axis=0)

    @graph()
    def step(h: FLOAT[...], delta_t: FLOAT[...], drive_t: FLOAT[...], B_t: FLOAT[...], C_t: FLOAT[...]):
        kept = op.Mul(op.Exp(op.Mul(delta_t, A)), h)
        h_next = op.Add(kept, op.Mul(drive_t, B_t))
        y_t = op.MatMul(h_next, C_t)
        return h_next, y_t

    _last, y = op.Scan(
        op.Expand(op.Constant(value_float=0.0), size),
        op.Unsqueeze(delta, last),
        op.Unsqueeze(op.Mul(delta, u), last),
        op.Unsqueeze(B, row),
        op.Unsqueeze(C, last),
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[2, 2, 2, 2],
        scan_output_axes=[2],
    )
    return op.Squeeze(y, last)


def ss2d_scan(
    u: TensorType,
    dt: TensorType,
    B: TensorType,
    C: TensorType,
    parameters: TensorType,
    read: TensorType,
    write: TensorType,
    keep_starts: bool,
) -> tuple[TensorType, TensorType]:
    """mambastyle::ss2d_scan: y, and nothing where the states for gradients would be.

    Reading is a gather along each path and writing one by the path's inverse, so each path must visit every
    position, as those of `ops.scan_paths` do.
    """
    # The packed parameters (images, paths, blocks, entries, 16) as (images, paths, channels, entries).
    rows = op.Transpose(parameters, perm=[0, 1, 2, 4, 3])
    rows = op.Reshape(rows, op.Concat(_ints(0, 0, -1), op.Shape(rows, start=4), axis=0))
    own = op.Slice(rows, [0], op.Shape(u, start=2), [2])
    state, rank = op.Shape(B, start=3), op.Shape(dt, start=3)
    bias_at = op.Add(state, rank)
    # The kernels compute with powers of two.
    A = op.Mul(op.Slice(own, [0], state, [3]), _LN_2)
    dt_weight = op.Transpose(op.Slice(own, state, bias_at, [3]), perm=[0, 1, 3, 2])
    dt_bias = op.Transpose(op.Slice(own, bias_at, op.Add(bias_at, [1]), [3]), perm=[0, 1, 3, 2])
    D = op.Transpose(op.Slice(own, op.Add(bias_at, [1]), op.Add(bias_at, [2]), [3]), perm=[0, 1, 3, 2])

    # Path k's own entries of (length, paths) flattened stand at position * paths + k.
    paths, length = op.Shape(read, start=0, end=1), op.Shape(read, start=1)
    number = op.Unsqueeze(_range(op.Squeeze(paths)), [1])
    positions = op.Add(op.Mul(read, paths), number)

    def walked(x: TensorType, entries: TensorType) -> TensorType:
        """(batch, length, paths, entries) -> (batch, paths, length, entries) in the order of each path."""
        return op.Gather(op.Reshape(x, op.Concat(_ints(0, -1), entries, axis=0)), positions, axis=1)

    tokens = op.Gather(u, read, axis=1)
    delta = op.Softplus(op.Add(op.MatMul(walked(dt, rank), dt_weight), dt_bias))
    y = recurrence(tokens, delta, A, walked(B, state), walked(C, state))
    y = op.Add(y, op.Mul(tokens, D))

    # Step t of path k stands at k * length + t of (paths, length) flattened.
    steps = op.Expand(_range(op.Squeeze(length)), op.Shape(write))
    inverse = op.ScatterElements(write, write, steps, axis=1)
    back = op.Add(inverse, op.Mul(number, length))
    merged = op.Gather(op.Reshape(y, op.Concat(_ints(0, -1), op.Shape(u, start=2), axis=0)), back, axis=1)
    return op.ReduceSum(merged, [1], keepdims=0), _nothing()


def selective_scan(
    u: TensorType,
    delta: TensorType,
    A: TensorType,
    B: TensorType,
    C: TensorType,
    D: TensorType | None,
    delta_bias: TensorType | None,
    delta_softplus: bool,
    keep_starts: bool,
) -> tuple[TensorType, TensorType, TensorType]:
    """mambastyle::selective_scan: y, and nothing where the last state and those for gradients would be.

    u and delta are (batch, channels, length), B and C (batch, groups, state, length): the groups are what the
    recurrence calls paths.
    """
    if delta_bias is not None:
        delta = op.Add(delta, op.Unsqueeze(delta_bias, [-1]))
    if delta_softplus:
        delta = op.Softplus(delta)
    grouped = op.Concat(_ints(0), op.Shape(B, start=1, end=2), _ints(-1), op.Shape(u, start=2), axis=0)
    # One A for all pictures, or one for each.
    sets = op.Concat(_ints(-1), op.Shape(B, start=1, end=2), axis=0)
    own = op.Concat(
        op.Div(op.Shape(u, start=1, end=2), op.Shape(B, start=1, end=2)), op.Shape(A, start=-1), axis=0
    )
    y = recurrence(
        _swapped(op.Reshape(u, grouped)),
        _swapped(op.Reshape(delta, grouped)),
        op.Reshape(A, op.Concat(sets, own, axis=0)),
        _swapped(B),
        _swapped(C),
    )
    y = op.Reshape(_swapped(y), op.Shape(u))
    if D is not None:
        y = op.Add(y, op.Mul(u, op.Unsqueeze(D, [-1])))
    return y, _nothing(), _nothing()


def adaptive_avg_pool2d(x: TensorType, output_size: Sequence[int]) -> TensorType:
    """aten::_adaptive_avg_pool2d of a map of any size: a product with a matrix from either side."""
    height, width = op.Shape(x, start=2, end=3), op.Shape(x, start=3)
    rows, columns = _averages(height, int(output_size[0])), _averages(width, int(output_size[1]))
    return op.MatMul(op.MatMul(rows, x), op.Transpose(columns, perm=[1, 0]))


def upsample_nearest_exact2d(
    x: TensorType,
    output_size: TensorType,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> TensorType:
    """aten::_upsample_nearest_exact2d to a size: the entry at floor((i + 0.5) * size / output_size)."""
    for axis in (2, 3):
        size = op.Cast(op.Shape(x, start=axis, end=axis + 1), to=_FLOAT)
        wanted = op.Gather(output_size, axis - 2, axis=0)
        ratio = op.Div(size, op.Cast(wanted, to=_FLOAT))
        at = op.Floor(op.Mul(op.Add(op.Cast(_range(wanted), to=_FLOAT), 0.5), ratio))
        x = op.Gather(x, op.Cast(op.Min(at, op.Sub(size, 1.0)), to=7), axis=axis)
    return x


def remainder(x: TensorType, divisor: TensorType) -> TensorType:
    """aten::remainder of integers by a number that depends on the picture's size."""
    return op.Mod(x, op.CastLike(divisor, x))


def _averages(size: TensorType, bins: int) -> TensorType:
    """The matrix (bins, size) whose row i averages floor(i size / bins) <= j < ceil((i + 1) size / bins)."""
    i = _ints(*range(bins))
    first = op.Unsqueeze(op.Div(op.Mul(i, size), [bins]), [1])
    end = op.Unsqueeze(op.Div(op.Add(op.Mul(op.Add(i, [1]), size), [bins - 1]), [bins]), [1])
    j = op.Unsqueeze(_range(op.Squeeze(size)), [0])
    inside = op.And(op.GreaterOrEqual(j, first), op.Less(j, end))
    return op.Div(op.Cast(inside, to=_FLOAT), op.Cast(op.Sub(end, first), to=_FLOAT))


def _range(stop: TensorType) -> TensorType:
    return op.Range(op.Constant(value_int=0), stop, op.Constant(value_int=1))


def _swapped(x: TensorType) -> TensorType:
    return op.Transpose(x, perm=[0, 1, 3, 2])


def _ints(*values: int) -> TensorType:
    return op.Constant(value_ints=values)


def _nothing() -> TensorType:
    return op.Constant(value_floats=[0.0])


def translations() -> Mapping[Callable, Callable]:
    """The functions by the torch operator that each stands for."""
    # The operators come into being with the modules that define them.
    from mambastyle.ops.selective_scan import cpu_numba as _one_dimension  # noqa: F401
    from mambastyle.ops.ss2d_scan import cpu_numba as _two_dimensions  # noqa: F401

    return {
        torch.ops.mambastyle.ss2d_scan.default: ss2d_scan,
        torch.ops.mambastyle.selective_scan.default: selective_scan,
        torch.ops.aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        torch.ops.aten._upsample_nearest_exact2d.default: upsample_nearest_exact2d,
        torch.ops.aten.remainder.Scalar: remainder,
    }
