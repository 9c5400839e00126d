"""The selective scan: the formula, every backend against the float64 reference, and what callers can get
wrong.
"""

import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambastyle.ops import available_backends, scan_backend, selective_scan, unavailable_reason
from mambastyle.ops.selective_scan import reference

BACKENDS = ["reference", "numba"]
# batch, groups, channels per group, state, length, A per image, D per image: every state count that has its
# own loop, lengths around the tile of 128, runs of channels that do not fill 16 lanes, and tasks of several.
SHAPES = [
    (2, 2, 32, 16, 130, False, False),
    (1, 1, 16, 1, 1, False, False),
    (2, 3, 5, 2, 77, True, True),
    (2, 1, 37, 3, 64, True, False),
    (1, 4, 20, 16, 191, False, True),
    (1, 2, 32, 1, 333, True, True),
    (2, 3, 7, 1, 150, True, False),
    (1, 2, 18, 1, 256, False, True),
    (2, 4, 3, 5, 17, False, False),
    (3, 1, 1, 4, 65, True, True),
    (9, 2, 40, 6, 130, False, True),
]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """Every buffer that is not written before it is read shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    batch=2, groups=2, group=5, state=3, length=11, A_per_image=False, D_per_image=False, dtype=torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = groups * group
    images = (batch,)
    inputs = {
        "u": normal(batch, channels, length),
        "delta": 0.5 * normal(batch, channels, length),
        "A": -3 * normal(*images * A_per_image, channels, state).abs(),
        "B": normal(batch, groups, state, length),
        "C": normal(batch, groups, state, length),
        "D": normal(*images * D_per_image, channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def run_with_gradients(inputs, *, backend="auto", seed=1, **options):
    """y, the last state, and the gradients of a random projection of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, last = selective_scan(**leaves, return_last_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, last)]
    gradients = torch.autograd.grad([y, last], list(leaves.values()), weights)
    return {"y": y, "last": last} | dict(zip(leaves, gradients, strict=True))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The largest deviation in units of the largest true value."""
    return ((value - truth).abs().max() / truth.abs().max().clamp_min(1e-300)).item()


def test_reference_follows_the_formula_step_by_step():
    inputs = make_inputs(A_per_image=True, length=70, dtype=torch.float64)
    u, delta, A, B, C, D, z, bias = inputs.values()
    d = F.softplus(delta + bias[:, None])
    B, C = B.repeat_interleave(5, dim=1), C.repeat_interleave(5, dim=1)  # group 0: channels 0-4, group 1: 5-9
    h = torch.zeros(2, 10, 3, dtype=torch.float64)
    steps = []
    for t in range(70):
        h = torch.exp(d[..., t, None] * A) * h + d[..., t, None] * B[..., t] * u[..., t, None]
        steps.append((C[..., t] * h).sum(-1))
    expected = (torch.stack(steps, -1) + D[:, None] * u) * F.silu(z)
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_example_worked_by_hand(backend):
    # One state, exp(d A) = 1/2: h = 1, 1/2 + 2 = 2.5, 1.25 + 3 = 4.25; y = 2 h + 10 u.
    half = torch.full((1, 1), -0.6931471805599453)
    u, ones = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
    y, last = selective_scan(
        u, ones, half, ones, 2 * ones, torch.tensor([10.0]), return_last_state=True, backend=backend
    )
    torch.testing.assert_close(y, torch.tensor([[[12.0, 25.0, 38.5]]]))
    torch.testing.assert_close(last, torch.tensor([[[4.25]]]))


def test_reference_has_first_and_second_derivatives(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2)
    inputs = make_inputs(batch=2, group=1, state=2, length=3, A_per_image=True, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def scan(*arguments):
        return selective_scan(*arguments, delta_softplus=True, return_last_state=True, backend="reference")

    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)


@pytest.mark.parametrize("delta_softplus", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numba_agrees_with_float64_in_outputs_and_every_gradient(shape, delta_softplus):
    inputs = make_inputs(*shape)
    if not delta_softplus:  # steps are positive then, or the states grow without bound
        inputs |= {name: inputs[name].abs() for name in ("delta", "delta_bias")}
    result = run_with_gradients(inputs, backend="numba", delta_softplus=delta_softplus)
    truth = run_with_gradients(
        {name: x.double() for name, x in inputs.items()}, backend="reference", delta_softplus=delta_softplus
    )
    for name, value in result.items():
        # Float32 sums of some hundred terms; the scan itself adds 2e-7 (exp2).
        assert relative_error(value, truth[name]) < (1e-6 if name in ("y", "last") else 5e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_inputs_may_be_left_out(backend):
    inputs = make_inputs()
    for name in ("D", "z", "delta_bias"):
        del inputs[name]
    neutral = {"D": torch.zeros(10), "delta_bias": torch.zeros(10)}
    result = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    full = run_with_gradients(inputs | neutral, backend=backend, delta_softplus=True)
    for name in result:
        torch.testing.assert_close(result[name], full[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_two_is_two_batches_of_one(backend):
    inputs = make_inputs(A_per_image=True, D_per_image=True, length=70)
    both = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    for image in range(2):
        single = {name: x if name == "delta_bias" else x[image : image + 1] for name, x in inputs.items()}
        y = selective_scan(**single, delta_softplus=True, backend=backend)
        torch.testing.assert_close(y[0], both["y"][image], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_b_and_c_without_groups_serve_all_channels(backend):
    inputs = make_inputs(groups=1, group=6)
    flat = inputs | {name: inputs[name][:, 0] for name in ("B", "C")}
    expected = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    result = run_with_gradients(flat, backend=backend, delta_softplus=True)
    assert torch.equal(result["y"], expected["y"])
    assert torch.equal(result["B"], expected["B"][:, 0])


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_b_and_c_may_be_constant_in_time(backend, constant):
    inputs = make_inputs(dtype=torch.float64)
    for name in constant:
        inputs[name] = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    per_channel = dict(inputs)
    for name in ("B", "C"):
        x = inputs[name]
        per_channel[name] = (
            x[None, :, :, None].expand(2, -1, -1, 11) if name in constant else x.repeat_interleave(5, 1)
        )
    truth = run_with_gradients(per_channel, backend="reference", delta_softplus=True)
    dtype = torch.float32 if backend == "numba" else torch.float64
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    result = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    for name in ("y", "last", "u", "delta", "A"):
        assert relative_error(result[name], truth[name]) < 5e-6
    for name in constant:
        assert relative_error(result[name], truth[name].sum((0, 3))) < 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    inputs = make_inputs(length=40)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    expected = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    result = run_with_gradients(strided, backend=backend, delta_softplus=True)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])
    # sum() hands back a gradient with all strides zero.
    u = inputs["u"].clone().requires_grad_()
    inputs |= {"u": u, "B": inputs["B"][:1].expand(2, -1, -1, -1)}
    selective_scan(**inputs, delta_softplus=True, backend=backend).sum().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_state_alone_carries_gradients(backend):
    inputs = make_inputs(length=67)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if name not in ("z", "D")}
    options = {"delta_softplus": True, "return_last_state": True}
    last = selective_scan(**leaves, **options, backend=backend)[1]
    used = [leaves[name] for name in ("u", "delta", "A", "B", "delta_bias")]
    gradients = torch.autograd.grad(last.square().sum(), used)
    doubles = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    last = selective_scan(**doubles, **options)[1]
    truth = torch.autograd.grad(
        last.square().sum(), [doubles[n] for n in ("u", "delta", "A", "B", "delta_bias")]
    )
    for gradient, expected in zip(gradients, truth, strict=True):
        assert relative_error(gradient, expected) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32_and_returned_in_half(backend, dtype):
    inputs = make_inputs(dtype=dtype)
    result = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    y = selective_scan(**{k: x.float() for k, x in inputs.items()}, delta_softplus=True, backend=backend)
    assert torch.equal(result["y"], y.to(dtype))
    assert result["last"].dtype == torch.float32
    assert all(result[name].dtype == dtype for name in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = make_inputs()
    expected = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run_with_gradients(inputs, backend=backend, delta_softplus=True)
    for name in expected:
        assert torch.equal(result[name], expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps_forget_or_keep_and_nan_shows(backend):
    u = torch.tensor([[[1.0, 1.0, 1.0, 1.0]]])
    delta = torch.tensor([[[1e-30, 1e4, 1e-9, 50.0]]])
    A, one = torch.tensor([[-1.0]]), torch.ones(1, 1, 4)
    y = selective_scan(u, delta, A, one, one, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[[1e-30, 1e4, 1e4, 50.0]]]))
    growing = selective_scan(u, torch.full_like(u, 1.0), -50 * A, one, one, backend=backend)
    assert growing[0, 0, :2].isfinite().all()
    assert growing[0, 0, 2:].isinf().all()
    delta[0, 0, 2] = float("nan")
    y = selective_scan(u, delta, A, one, one, delta_softplus=True, backend=backend)
    assert y[0, 0, :2].isfinite().all()
    assert y[0, 0, 2:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [3.0, 6.0, 25.0])
def test_a_state_may_grow_as_far_as_float32_reaches(rate, backend):
    """A product of decays may leave its range before the state does, in one channel and late."""
    inputs = make_inputs(batch=1, groups=1, group=19, state=1, length=150, dtype=torch.float64)
    inputs["delta"] = torch.zeros_like(inputs["delta"])
    inputs["delta"][0, 3, 132:136] = 1
    inputs["delta_bias"].zero_()
    inputs["A"][3] = rate
    truth = selective_scan(**inputs, return_last_state=True, backend="reference")
    single = {name: x.float() for name, x in inputs.items()}
    assert truth[1].abs().max() > 100
    for value, true in zip(
        selective_scan(**single, return_last_state=True, backend=backend), truth, strict=True
    ):
        assert value.isfinite().all()
        # In float32 an exponent of 75 is off by some 75 * 6e-8.
        assert relative_error(value.double(), true) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_size_zero_keeps_the_state_to_the_bit(backend):
    inputs = make_inputs(groups=1, group=16, state=5, length=3000)
    inputs["delta"][..., 1:] = 0
    inputs["delta_bias"].zero_()
    inputs["delta"][..., 0] = 1
    first = {name: x[..., :1] if name in ("u", "delta", "B", "C", "z") else x for name, x in inputs.items()}
    last = selective_scan(**inputs, return_last_state=True, backend=backend)[1]
    assert torch.equal(last, selective_scan(**first, return_last_state=True, backend=backend)[1])


def test_a_long_memory_is_as_accurate_as_in_plain_float32():
    # exp(d A) is about 1 - 1e-3 in each of 20000 steps: what exp2 adds to the rounding of float32 would add
    # up.
    inputs = make_inputs(batch=1, groups=1, group=16, state=1, length=20000)
    inputs |= {"delta": torch.full((1, 16, 20000), 1e-3), "A": -torch.linspace(0.5, 2, 16)[:, None]}
    inputs |= {"delta_bias": torch.zeros(16), "u": torch.ones(1, 16, 20000), "B": torch.ones(1, 1, 1, 20000)}

    def last(dtype, backend):
        converted = {name: x.to(dtype) for name, x in inputs.items()}
        return selective_scan(**converted, return_last_state=True, backend=backend)[1]

    truth = last(torch.float64, "reference")
    plain = relative_error(last(torch.float32, "reference"), truth)
    assert relative_error(last(torch.float32, "numba"), truth) < 1.5 * plain + 1e-6


def test_thread_count_does_not_change_a_bit(monkeypatch):
    from mambastyle.ops.selective_scan import cpu_numba

    monkeypatch.setattr(cpu_numba, "SERIAL_STATE_STEPS", 0)
    inputs = make_inputs(batch=3, group=40, length=70)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_with_gradients(inputs, backend="numba", delta_softplus=True))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_many_python_threads_may_scan_at_once(monkeypatch):
    from mambastyle.ops.selective_scan import cpu_numba

    monkeypatch.setattr(cpu_numba, "SERIAL_STATE_STEPS", 0)
    inputs = make_inputs(batch=2, group=32, length=200)
    expected = run_with_gradients(inputs, backend="numba", delta_softplus=True)
    wrong: list[str] = []

    def scan():
        torch.set_num_threads(2)
        for _ in range(5):
            result = run_with_gradients(inputs, backend="numba", delta_softplus=True)
            wrong.extend(name for name in result if not torch.equal(result[name], expected[name]))

    threads = [threading.Thread(target=scan) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_auto_is_numba_for_float32_and_reference_for_float64():
    assert set(available_backends()) >= {"reference", "numba"}
    assert unavailable_reason("numba") is None
    assert scan_backend() == "numba"
    assert scan_backend("auto", torch.zeros(1), torch.zeros(1, dtype=torch.float64)) == "reference"
    with pytest.raises(TypeError, match=r"computes in float32: got float64; use backend='reference'"):
        selective_scan(**make_inputs(dtype=torch.float64), backend="numba")


def bad(name, value):
    return make_inputs() | {name: value}


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (bad("u", torch.zeros(10, 11)), ValueError, r"u must be \(batch, channels, length\): got \(10, 11\)"),
        (bad("u", torch.zeros(2, 10, 0)), ValueError, r"at least one image, channel and step"),
        (bad("delta", torch.zeros(2, 10, 12)), ValueError, r"delta must be \(2, 10, 11\)"),
        (
            bad("A", torch.zeros(3)),
            ValueError,
            r"A must be \(channels, state\) or \(batch, channels, state\)",
        ),
        (bad("A", torch.zeros(3, 10, 3)), ValueError, r"A must be \(10, 3\) or \(2, 10, 3\)"),
        (
            bad("B", torch.zeros(2, 3, 3, 11)),
            ValueError,
            r"B has 3 groups, which do not divide u's 10 channels",
        ),
        (bad("B", torch.zeros(2, 5, 3, 11)), ValueError, r"same number of groups: got 5 and 2"),
        (bad("C", torch.zeros(2, 2, 4, 11)), ValueError, r"C must be \(2, 2, 3, 11\)"),
        (bad("D", torch.zeros(3, 10)), ValueError, r"D must be \(10,\) or \(2, 10\)"),
        (bad("z", torch.zeros(2, 10)), ValueError, r"z must be \(2, 10, 11\)"),
        (bad("delta_bias", torch.zeros(2, 10)), ValueError, r"delta_bias must be \(10,\)"),
        (
            bad("A", torch.zeros(10, 3, dtype=torch.complex64)),
            TypeError,
            r"A must be a real floating-point tensor",
        ),
        (bad("u", [1.0]), TypeError, r"u must be a tensor: got list"),
        (
            make_inputs() | {"backend": "cuda"},
            ValueError,
            r"one of \['reference', 'numba', 'triton'\]: got 'cuda'",
        ),
        (bad("A", torch.zeros(10, 3, device="meta")), ValueError, r"on one device: got cpu, meta"),
    ],
)
def test_mistakes_are_explained(inputs, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**inputs)
