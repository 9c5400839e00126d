"""The scan of a grid along paths: each backend against a float64 loop, and the ops as PyTorch sees them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mambastyle.ops import cross_paths, zigzag_paths
from mambastyle.ops import ss2d_scan as scan_function

# The checker of types cannot count what a list of inputs unpacks to.
ss2d_scan: Any = scan_function
NAMES = ("u", "dt_low", "dt_weight", "A", "B", "C", "D", "dt_bias")
# batch, height, width, channels, rank, state, A and D per image: every count that has its own loop, grids
# around the tile of 32 steps, channels that do not fill 16 lanes, and tasks of several blocks.
SHAPES = [
    (2, 3, 5, 16, 1, 1, False),
    (2, 13, 7, 37, 3, 5, True),
    (2, 9, 8, 64, 4, 8, False),
    (2, 17, 9, 20, 9, 16, True),
    (3, 1, 2, 3, 2, 4, False),
    (17, 2, 3, 33, 1, 2, False),
    (1, 5, 13, 140, 6, 7, False),
]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """Every buffer that is not written before it is read shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    batch=2, height=3, width=4, channels=6, rank=2, state=3, per_image=False, dtype=torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length, images = height * width, (batch,) * per_image
    tensors = [normal(batch, length, channels), 0.5 * normal(batch, length, 4, rank)]
    tensors += [0.7 * normal(4, channels, rank), -3 * normal(*images, 4, channels, state).abs()]
    tensors += [normal(batch, length, 4, state), normal(batch, length, 4, state)]
    tensors += [normal(*images, 4, channels), normal(4, channels)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """In units of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("per_image", [True, False])
def test_the_reference_is_the_recurrence_written_out(per_image):
    inputs = make_inputs(per_image=per_image)
    u, dt_low, dt_weight, A, B, C, D, dt_bias = (x.detach() for x in inputs)
    read, write = cross_paths(3, 4), zigzag_paths(3, 4)
    expected = torch.zeros_like(u)
    for k in range(4):
        A_k, D_k = (A[:, k], D[:, k]) if per_image else (A[k], D[k])
        h = torch.zeros(2, 6, 3, dtype=torch.float64)
        for p, q in zip(read[k], write[k], strict=True):
            d = F.softplus(dt_low[:, p, k] @ dt_weight[k].T + dt_bias[k])
            h = torch.exp(d[..., None] * A_k) * h + (d * u[:, p])[..., None] * B[:, p, k, None]
            expected[:, q] += (h * C[:, p, k, None]).sum(-1) + D_k * u[:, p]
    torch.testing.assert_close(ss2d_scan(*inputs, read, write, backend="reference"), expected)


@pytest.mark.parametrize("paths", [cross_paths, zigzag_paths])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numba_agrees_with_float64_in_the_output_and_every_gradient(shape, paths):
    table = paths(*shape[1:3])
    inputs = make_inputs(*shape)
    expected = ss2d_scan(*inputs, table)
    grad_y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truths = torch.autograd.grad(expected, inputs, grad_y)
    inputs = make_inputs(*shape, dtype=torch.float32)
    y = ss2d_scan(*inputs, table, backend="numba")
    assert y.dtype == torch.float32
    assert largest_error(y, expected) < 1e-6
    gradients = torch.autograd.grad(y, inputs, grad_y.float())
    for name, gradient, truth in zip(NAMES, gradients, truths, strict=True):
        assert largest_error(gradient, truth) < 5e-6, name


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_tables_for_reading_and_writing_may_differ_and_need_not_be_permutations(backend):
    read, write = zigzag_paths(3, 4), torch.zeros(4, 12, dtype=torch.int64)
    read[0], write[1] = 5, cross_paths(3, 4)[3]
    inputs = make_inputs()
    expected = ss2d_scan(*inputs, read, write, backend="reference")
    truths = torch.autograd.grad(expected.square().sum(), inputs)
    inputs = make_inputs(dtype=torch.float32)
    y = ss2d_scan(*inputs, read, write, backend=backend)
    assert largest_error(y, expected) < 1e-6
    for gradient, truth in zip(torch.autograd.grad(y.square().sum(), inputs), truths, strict=True):
        assert largest_error(gradient, truth) < 5e-6


def test_parts_of_one_projection_and_half_precision_are_read_where_they_lie():
    u, _, dt_weight, A, _, _, D, dt_bias = (x.float() for x in make_inputs(channels=20))
    projected = torch.randn(2, 12, 4, 8, generator=torch.Generator().manual_seed(2))
    u, projected = (x.detach().bfloat16().requires_grad_() for x in (u, projected))
    table = cross_paths(3, 4)

    def scan(u: Tensor, projected: Tensor) -> Tensor:
        dt_low, B, C = projected.split((2, 3, 3), dim=-1)
        return ss2d_scan(u, dt_low, dt_weight, A, B, C, D, dt_bias, table)

    y = scan(u, projected)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), (u, projected))
    wide = [x.detach().double().requires_grad_() for x in (u, projected)]
    expected = scan(*wide)
    # bfloat16 keeps 8 bits: outputs are rounded once, gradients come from rounded outputs.
    assert largest_error(y, expected) < 2**-8
    truths = torch.autograd.grad(expected.square().sum(), wide)
    for gradient, truth in zip(gradients, truths, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert largest_error(gradient, truth) < 2**-6


def test_threads_do_not_change_a_bit(monkeypatch):
    from mambastyle.ops.ss2d_scan import cpu_numba

    def run() -> list[Tensor]:
        inputs = make_inputs(1, 9, 8, 70, 4, 8, dtype=torch.float32)
        y = ss2d_scan(*inputs, cross_paths(9, 8), backend="numba")
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    alone = run()
    monkeypatch.setattr(cpu_numba, "SERIAL_STATE_STEPS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_ops_pass_pytorchs_checks(batch):
    from mambastyle.ops.ss2d_scan import cpu_numba, operator

    u, dt_low, dt_weight, A, B, C, D, dt_bias = make_inputs(batch, dtype=torch.float32)
    table = cross_paths(3, 4)
    parameters = operator.pack(A[None], dt_weight, dt_bias, D[None]).detach().requires_grad_()
    arguments = (u, dt_low, B, C, parameters, table, table)
    torch.library.opcheck(cpu_numba.scan_op, (*arguments, True))
    y, starts = cpu_numba.scan_op(*arguments, True)
    detached = [x.detach() for x in (torch.ones_like(y), *arguments, starts)]
    torch.library.opcheck(cpu_numba.scan_backward_op, tuple(detached))


def scan_a_grid(*inputs: Tensor) -> Tensor:
    return ss2d_scan(*inputs, cross_paths(3, 4), backend="numba")


def test_compiles_into_one_graph_with_its_backward():
    inputs = make_inputs(dtype=torch.float32)
    compiled = torch.compile(scan_a_grid, backend="aot_eager", fullgraph=True)
    y, expected = (f(*inputs) for f in (compiled, scan_a_grid))
    torch.testing.assert_close(y, expected)
    gradients, truths = (torch.autograd.grad(x.square().sum(), inputs) for x in (y, expected))
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth)


def test_flops_are_counted_forwards_and_backwards():
    forward = 2 * 12 * 6 * 4 * (9 * 3 + 2 * 2 + 2)
    with FlopCounterMode(display=False) as counter:
        y = scan_a_grid(*make_inputs(dtype=torch.float32))
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_meta_tensors_pass_shapes_only():
    inputs = [x.to("meta") for x in make_inputs(dtype=torch.float32)]
    y = ss2d_scan(*inputs, cross_paths(3, 4, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 12, 6)


def test_a_second_derivative_is_refused_with_the_remedy():
    inputs = make_inputs(dtype=torch.float32)
    (gradient,) = torch.autograd.grad(scan_a_grid(*inputs).sum(), inputs[4], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        gradient.square().sum().backward()


# PyTorch's own jvp still scripts its decompositions.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_takes_the_reference_or_is_refused():
    inputs = tuple(x.detach() for x in make_inputs(dtype=torch.float32))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, pushed = torch.func.jvp(lambda *x: ss2d_scan(*x, cross_paths(3, 4)), inputs, tangents)
    doubles, directions = ([x.double() for x in each] for each in (inputs, tangents))
    _, expected = torch.func.jvp(
        lambda *x: ss2d_scan(*x, cross_paths(3, 4)), tuple(doubles), tuple(directions)
    )
    torch.testing.assert_close(pushed.double(), expected, rtol=1e-4, atol=1e-4)
    assert pushed.abs().max() > 0.1
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(scan_a_grid, inputs, tangents)


def test_what_does_not_fit_says_why():
    inputs = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="positions from 0 to 11: got 0 to 12"):
        ss2d_scan(*inputs, cross_paths(3, 4) + (torch.arange(12) == 11), backend="numba")
    with pytest.raises(ValueError, match=r"paths must be \(4, 12\) to fit u"):
        ss2d_scan(*inputs, cross_paths(3, 5))
    with pytest.raises(TypeError, match="write_paths must be an int64 table"):
        ss2d_scan(*inputs, cross_paths(3, 4), cross_paths(3, 4).int())
    with pytest.raises(TypeError, match="u must be a real floating-point tensor"):
        ss2d_scan(inputs[0].long(), *inputs[1:], cross_paths(3, 4))
    with pytest.raises(TypeError, match="got float64"):
        ss2d_scan(*make_inputs(), cross_paths(3, 4), backend="numba")
