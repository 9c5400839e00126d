"""The Triton kernels against the float64 reference: on a CUDA GPU if there is one, else in Triton's
interpreter on the CPU, with small tiles because it takes a tenth of a second for a scan of each.
"""

import os
import subprocess
import sys

import pytest
import torch
from tests.ops import test_ss2d_scan as grids
from tests.ops.test_selective_scan import SHAPES, make_inputs, relative_error, run_with_gradients
from torch import Tensor

from mambastyle.ops import available_backends, cross_paths, scan_backend, selective_scan, zigzag_paths

selective_scan_module = sys.modules["mambastyle.ops.selective_scan"]  # the function has its name
pytest.importorskip("triton", reason="there is no Triton for this platform")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# batch, groups, channels per group, state, length, A per image, D per image: more than one tile, the last not
# full, channels that do not fill a block, states that are no power of two.
TINY = [(2, 2, 3, 3, 11, False, True), (1, 1, 5, 1, 17, False, False), (2, 1, 2, 2, 8, True, False)]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if not GPU:
        from mambastyle.ops.selective_scan import gpu_triton as sequences
        from mambastyle.ops.ss2d_scan import gpu_triton as on_grids

        monkeypatch.setattr(sequences, "TILE", 8)
        monkeypatch.setattr(on_grids, "TILE", 8)


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def check_against_float64(inputs: dict[str, Tensor], *, delta_softplus: bool) -> None:
    result = run_with_gradients(on_device(inputs), backend="triton", delta_softplus=delta_softplus)
    doubles = {name: x.double() for name, x in inputs.items()}
    truth = run_with_gradients(doubles, backend="reference", delta_softplus=delta_softplus)
    for name, value in result.items():
        # As for the CPU kernels: sums in float32, and an exp2 with a relative error of 2e-7.
        assert relative_error(value.cpu(), truth[name]) < (1e-6 if name in ("y", "last") else 5e-6), name


@pytest.mark.parametrize(
    ("shape", "delta_softplus"),
    [(TINY[0], True), (TINY[1], True), (TINY[2], False)]
    + [(shape, softplus) for shape in SHAPES * GPU for softplus in (True, False)],
    ids=str,
)
def test_the_scan_agrees_with_float64_in_outputs_and_every_gradient(shape, delta_softplus):
    inputs = make_inputs(*shape)
    if not delta_softplus:  # steps are positive then, or the states grow without bound
        inputs |= {name: inputs[name].abs() for name in ("delta", "delta_bias")}
    check_against_float64(inputs, delta_softplus=delta_softplus)


def test_optional_inputs_may_be_left_out_and_b_be_constant():
    inputs = make_inputs(1, 2, 1, 2, 9)
    inputs = {name: inputs[name] for name in ("u", "delta", "A", "B", "C")}
    inputs |= {"B": torch.randn(2, 2, generator=torch.Generator().manual_seed(2))}
    check_against_float64(inputs, delta_softplus=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_returned_in_half(dtype):
    inputs = on_device(make_inputs(1, 1, 2, 1, 9, dtype=dtype))
    result = run_with_gradients(inputs, backend="triton", delta_softplus=True)
    y = selective_scan(**{k: x.float() for k, x in inputs.items()}, delta_softplus=True, backend="triton")
    assert torch.equal(result["y"], y.to(dtype))  # type: ignore[union-attr]
    assert result["last"].dtype == torch.float32
    assert all(result[name].dtype == dtype for name in inputs)


def test_extreme_steps_forget_or_keep_and_nan_shows():
    u = torch.ones(1, 1, 4, device=DEVICE)
    delta = torch.tensor([[[1e-30, 1e4, 1e-9, 50.0]]], device=DEVICE)
    A, one = -torch.ones(1, 1, device=DEVICE), torch.ones(1, 1, 4, device=DEVICE)
    y = selective_scan(u, delta, A, one, one, backend="triton")
    torch.testing.assert_close(y, torch.tensor([[[1e-30, 1e4, 1e4, 50.0]]], device=DEVICE))
    delta = torch.tensor([[[-1e4, -20.0, 1e4, float("nan")]]], device=DEVICE)
    y = selective_scan(u, delta, A, one, one, delta_softplus=True, backend="triton")
    torch.testing.assert_close(y[..., :3], torch.tensor([[[0.0, 2.0611537e-9, 1e4]]], device=DEVICE))  # type: ignore
    assert y[0, 0, 3].isnan()  # type: ignore


def test_a_step_of_size_zero_keeps_the_state_to_the_bit():
    inputs = on_device(make_inputs(1, 1, 2, 2, 20))
    inputs["delta"][..., 1:] = 0
    inputs["delta_bias"].zero_()
    first = {name: x[..., :1] if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}
    last = selective_scan(**inputs, return_last_state=True, backend="triton")[1]
    assert torch.equal(last, selective_scan(**first, return_last_state=True, backend="triton")[1])


def test_the_ops_pass_pytorchs_checks():
    from mambastyle.ops.selective_scan import gpu_triton

    inputs = on_device(make_inputs(1, 1, 2, 1, 9))
    tensors = [inputs[name].requires_grad_() for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gpu_triton.scan_op, (*tensors, True, True), test_utils=utilities)
    y, last, starts = gpu_triton.scan_op(*tensors, True, True)
    arguments = [x.detach() for x in (torch.ones_like(y), torch.ones_like(last), *tensors)]
    torch.library.opcheck(
        gpu_triton.scan_backward_op, (*arguments, True, starts.detach()), test_utils=utilities
    )


def check_grid(shape: tuple, read: Tensor, write: Tensor) -> None:
    inputs = grids.make_inputs(*shape)
    expected = grids.ss2d_scan(*inputs, read, write, backend="reference")
    grad_y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truths = torch.autograd.grad(expected, inputs, grad_y)
    inputs = [x.detach().float().to(DEVICE).requires_grad_() for x in inputs]
    y = grids.ss2d_scan(*inputs, read.to(DEVICE), write.to(DEVICE), backend="triton")
    assert grids.largest_error(y.cpu(), expected) < 1e-6
    gradients = torch.autograd.grad(y, inputs, grad_y.float().to(DEVICE))
    for name, gradient, truth in zip(grids.NAMES, gradients, truths, strict=True):
        assert grids.largest_error(gradient.cpu(), truth) < 5e-6, name


# batch, height, width, channels, rank, state, A and D per image: as above, channels around the 8 of a program
# and the 16 of a block of parameters.
TINY_GRIDS = [(2, 3, 3, 3, 2, 2, True), (1, 1, 5, 19, 3, 1, False)]


@pytest.mark.parametrize("shape", [*TINY_GRIDS, *grids.SHAPES * GPU], ids=str)
def test_the_scan_of_a_grid_agrees_with_float64_in_the_output_and_every_gradient(shape):
    table = zigzag_paths(*shape[1:3])
    check_grid(shape, table, table)


def test_tables_for_reading_and_writing_may_differ_and_need_not_be_permutations():
    read, write = cross_paths(2, 3), torch.zeros(4, 6, dtype=torch.int64)
    read[0], write[1] = 5, zigzag_paths(2, 3)[3]
    check_grid((1, 2, 3, 2, 1, 1, False), read, write)


def test_parts_of_one_projection_in_half_precision_are_read_where_they_lie():
    u, _, dt_weight, A, _, _, D, dt_bias = (
        x.detach().float().to(DEVICE) for x in grids.make_inputs(1, 1, 4, 3)
    )
    projected = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    u, projected = (x.bfloat16().requires_grad_() for x in (u, projected))
    table = cross_paths(1, 4, device=DEVICE)

    def scan(u: Tensor, projected: Tensor, backend: str) -> Tensor:
        dt_low, B, C = projected.split((2, 3, 3), dim=-1)
        return grids.ss2d_scan(u, dt_low, dt_weight, A, B, C, D, dt_bias, table, backend=backend)

    y = scan(u, projected, "triton")
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), (u, projected))
    wide = [x.detach().double().requires_grad_() for x in (u, projected)]
    expected = scan(*wide, "reference")
    # bfloat16 keeps 8 bits: outputs are rounded once (the interpreter cuts them off), gradients come from
    # rounded outputs.
    assert grids.largest_error(y, expected) < (2**-8 if GPU else 2**-7)
    for gradient, truth in zip(gradients, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert grids.largest_error(gradient, truth) < 2**-6


@pytest.mark.skipif(GPU, reason="there it is an assertion on the device, which ends the process")
def test_a_position_outside_the_grid_says_so():
    inputs = [x.detach().float() for x in grids.make_inputs(1, 1, 4, 3)]
    with pytest.raises(ValueError, match="positions from 0 to 3: got 0 to 4"):
        grids.ss2d_scan(*inputs, cross_paths(1, 4) + (torch.arange(4) == 3), backend="triton")


def test_two_runs_are_equal_to_the_bit():
    inputs = on_device(make_inputs(*(SHAPES[0] if GPU else TINY[2])))
    first, second = (run_with_gradients(inputs, backend="triton", delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_auto_is_triton_for_a_gpu_alone():
    x = torch.zeros(1, device=DEVICE)
    assert scan_backend("auto", x) == ("triton" if GPU else "numba")
    assert scan_backend("auto", x, x.double()) == "reference"
    assert "triton" in available_backends()
    with pytest.raises(TypeError, match=r"'triton' computes in float32: got float64"):
        scan_backend("triton", x.double())


def run_python(script: str, **environment: str) -> str:
    variables = os.environ | environment
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_gpu_and_an_interpreter_the_reason_names_the_remedy(monkeypatch):
    from mambastyle.ops import gpu_tiles

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_tiles, "interpreted", lambda: False)
    monkeypatch.setattr(selective_scan_module, "_import_problems", {})
    assert available_backends() == ("reference", "numba")
    with pytest.raises(
        ValueError, match=r"'triton' cannot run: PyTorch finds no CUDA GPU .*TRITON_INTERPRET=1"
    ):
        scan_backend("triton")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mambastyle.ops.selective_scan import gpu_triton as sequences
from mambastyle.ops.ss2d_scan import gpu_triton as grids

INTEGERS = ("channels", "groups", "length", "chunks", "A_image", "D_image", "paths", "parameters_image")
INTEGERS += ("rows", "targets", "width")
constants = dict(STATE=3, STATES=4, RANK=2, RANKS=2, BLOCK=8, STEPS=16, TARGETS=4, WIDTH=8)
constants |= dict(HAS_D=True, HAS_BIAS=True, SOFTPLUS=True, KEEP_STARTS=True)
kernels = [sequences._forward, sequences._backward, grids._forward, grids._backward, grids._merge]
for kernel in kernels:
    kinds = {}
    for name in (parameter.name for parameter in kernel.params):
        if name in constants:
            kinds[name] = "constexpr"
        elif name.endswith("_steps"):
            kinds[name] = ("i32", "i32", "i32")
        elif name in ("read", "write", "order", "first"):
            kinds[name] = "*i64"
        else:
            kinds[name] = "i32" if name in INTEGERS else "*fp32"
    given = {name: constants[name] for name, kind in kinds.items() if kind == "constexpr"}
    source = ASTSource(kernel, kinds, constexprs=given)
    target = GPUTarget("cuda", 80, 32)
    print(len(triton.compile(source, target=target, options={"num_warps": 1}).asm["cubin"]))
"""


@pytest.mark.skipif(GPU, reason="they are compiled and run above")
def test_the_kernels_compile_for_a_gpu_without_one():
    """The interpreter is Python: it takes what the compiler refuses."""
    sizes = run_python(COMPILE, TRITON_INTERPRET="0").split()
    assert len(sizes) == 5
    assert all(int(size) > 1000 for size in sizes)
