"""The Numba scan as PyTorch sees it (op checks, compilation, flops), and as a process meets it (fork,
caches).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mambastyle.ops import selective_scan


def make_tensors(requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 9), (2, 6, 9), (2, 6, 4), (2, 3, 4, 9), (2, 3, 4, 9), (6,), (6,)]
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    tensors[2] = -tensors[2].abs()
    return [x.requires_grad_(requires_grad) for x in tensors]


def scan(u, delta, A, B, C, D, delta_bias):
    return selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        delta_bias=delta_bias,
        delta_softplus=True,
        return_last_state=True,
        backend="numba",
    )


@pytest.mark.parametrize("optional", [True, False])
def test_the_forward_op_passes_pytorchs_checks(optional):
    from mambastyle.ops.selective_scan import cpu_numba

    *tensors, D, bias = make_tensors()
    arguments = (*tensors, D, bias) if optional else (*tensors, None, None)
    torch.library.opcheck(cpu_numba.scan_op, (*arguments, True, True))


def test_the_backward_op_passes_pytorchs_checks():
    from mambastyle.ops.selective_scan import cpu_numba

    tensors = make_tensors(requires_grad=False)
    y, last, starts = cpu_numba.scan_op(*tensors, True, True)
    arguments = (torch.ones_like(y), torch.ones_like(last), *tensors, True, starts)
    torch.library.opcheck(cpu_numba.scan_backward_op, arguments)


def test_compiles_into_one_graph_with_its_backward():
    tensors = make_tensors()
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    y, expected = (f(*tensors)[0] for f in (compiled, scan))
    assert torch.equal(y, expected)
    for gradient, truth in zip(
        torch.autograd.grad(y.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        assert torch.equal(gradient, truth)


def test_exports():
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return scan(*tensors)[0]

    tensors = make_tensors(requires_grad=False)
    program = torch.export.export(Scan(), tuple(tensors))
    assert torch.equal(program.module()(*tensors), scan(*tensors)[0])


def test_flops_are_counted_forwards_and_backwards():
    tensors = make_tensors()
    forward = 2 * 6 * 9 * (9 * 4 + 2)
    with FlopCounterMode(display=False) as counter:
        y = scan(*tensors)[0]
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_meta_tensors_pass_shapes_only():
    y, last = scan(*(x.to("meta") for x in make_tensors()))
    assert (y.shape, last.shape) == ((2, 6, 9), (2, 6, 4))
    assert y.is_meta


def test_a_second_derivative_is_refused_with_the_remedy():
    tensors = make_tensors()
    (gradient,) = torch.autograd.grad(scan(*tensors)[0].sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        gradient.square().sum().backward()


# PyTorch's own jvp still scripts its decompositions.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_takes_the_reference_or_is_refused():
    tensors = make_tensors(requires_grad=False)
    tangents = [torch.randn_like(x) for x in tensors]

    def auto(u, delta, A, B, C, D, delta_bias):
        return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)

    y, pushed = torch.func.jvp(auto, tuple(tensors), tuple(tangents))
    # <g, J v> is <J^T g, v>, whose gradients the kernels have.
    for x in tensors:
        x.requires_grad_()
    gradients = torch.autograd.grad(auto(*tensors), tensors, y)
    expected = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((y * pushed).sum(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(scan, tuple(x.detach() for x in tensors), tuple(tangents))


def test_without_gradients_no_states_are_kept(monkeypatch):
    from mambastyle.ops.selective_scan import cpu_numba

    kept = []
    inner = cpu_numba._empty_outputs
    monkeypatch.setattr(
        cpu_numba, "_empty_outputs", lambda *a: (outputs := inner(*a), kept.append(outputs[2].numel()))[0]
    )
    tensors = make_tensors()
    scan(*tensors)
    with torch.no_grad():
        scan(*tensors)
    assert kept[0] > 0
    assert kept[1] == 0


def test_compiled_kernels_are_cached_outside_the_package_under_a_hash_of_the_source():
    from mambastyle.ops.selective_scan import cpu_numba

    scan(*make_tensors())
    folder = Path(cpu_numba._scan_forward.stats.cache_path)
    assert "kernels-" in str(folder)
    assert not folder.is_relative_to(Path(cpu_numba.__file__).parent)
    assert list(folder.glob("*.nbc"))


def run_python(script: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,  # it compiles, which takes minutes on a loaded machine
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_numba_auto_is_the_reference_and_says_so_once():
    run_python("""
import logging, sys
import torch
import mambastyle.ops as ops
assert "numba" not in sys.modules, "numba must be imported lazily"
sys.modules["numba"] = None
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("mambastyle").addHandler(handler)
x = torch.ones(1, 2, 3)
for _ in range(2):
    ops.selective_scan(x, x, -torch.ones(2, 1), torch.ones(1, 1, 3), torch.ones(1, 1, 3))
assert len(messages) == 1 and "'reference'" in messages[0], messages
assert ops.scan_backend() == "reference" and "numba" not in ops.available_backends()
try:
    ops.scan_backend("numba")
except ValueError as error:
    assert "install" in str(error), error
else:
    raise AssertionError
""")


COMPARE = """
import torch
from mambastyle.ops import selective_scan
torch.manual_seed(0)
def run(backend, dtype):
    torch.manual_seed(0)
    leaves = [torch.randn(*s, dtype=torch.float64).to(dtype) for s in
              [(1, 32, 99), (1, 32, 99), (32, 5), (1, 1, 5, 99), (1, 1, 5, 99)]]
    leaves[2] = -leaves[2].abs()
    for x in leaves: x.requires_grad_()
    y = selective_scan(*leaves, delta_softplus=True, backend=backend)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]
def check():
    for x, truth in zip(run("numba", torch.float32), run("reference", torch.float64)):
        assert (x - truth).abs().max() < 5e-6 * truth.abs().max()
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the platform has no fork")
def test_a_forked_child_scans_with_its_own_threads():
    run_python(
        COMPARE
        + """
import os
from mambastyle.ops.selective_scan import cpu_numba
cpu_numba.SERIAL_STATE_STEPS = 0
torch.set_num_threads(2)
check()
child = os.fork()
if child == 0:
    code = 1
    try:
        leaves = [torch.ones(1, 64, 99), torch.ones(1, 64, 99), -torch.ones(64, 5)]
        leaves += [torch.ones(1, 1, 5, 99), torch.ones(1, 1, 5, 99)]
        y = selective_scan(*leaves, backend="numba")
        code = 0 if y.isfinite().all() else 2
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
"""
    )


def processor_has(feature: str) -> bool:
    import llvmlite.binding

    return bool(llvmlite.binding.get_host_cpu_features().get(feature))


def test_the_widest_instructions_are_chosen():
    from mambastyle.ops.cpu_vectors import instruction_set

    sets = {"avx512f": ("avx512", 16), "avx2": ("avx2", 8), "sse4.2": ("sse4.2", 4)}
    widest = next((chosen for feature, chosen in sets.items() if processor_has(feature)), ("native", 4))
    assert instruction_set() == widest


@pytest.mark.parametrize(
    ("features", "lanes"), [("avx2", 8), pytest.param("sse4.2", 4, marks=pytest.mark.thorough)]
)
def test_narrower_instructions_give_the_same_results(features, lanes):
    if not processor_has(features):
        pytest.skip(f"this processor has no {features}")
    script = "from mambastyle.ops.cpu_vectors import instruction_set; print(*instruction_set()); check()"
    assert run_python(COMPARE + script, MAMBASTYLE_CPU_FEATURES=features).split() == [features, str(lanes)]


@pytest.mark.thorough
def test_instructions_that_cannot_be_had_say_why():
    script = "from mambastyle.ops import unavailable_reason; print(unavailable_reason('numba'))"
    assert "must be one of avx512, avx2, sse4.2: got 'mmx'" in run_python(
        script, MAMBASTYLE_CPU_FEATURES="mmx"
    )
    script = "import numba; numba.njit(lambda x: x)(1); " + script
    assert "came too late" in run_python(script, MAMBASTYLE_CPU_FEATURES="sse4.2")
