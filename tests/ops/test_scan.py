"""The scans: every backend against the step loop, which is the definition, in values and all gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import assert_close, backends_under_test
from minrnn.ops import ACTIVATIONS, last_backend, linear_scan, mingru_scan, minlstm_scan
from parity import check_chunks, check_lengths, check_resets, gradients

BACKENDS = backends_under_test()
SHORT, LONG = (0, 1, 2, 63), (1000, 4097)
REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.promote_types(dtype, torch.float32)) * scale).to(dtype).requires_grad_()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def agree(run, tensors: dict[str, Tensor], dtype: torch.dtype, backend: str) -> None:
    """`run(backend=..., **tensors)` on the backend in `dtype`, and by the step loop in float64."""
    own = run(backend=backend, **tensors)
    assert last_backend() == backend
    exact = {
        k: v.detach().to(wide(dtype)).requires_grad_() if v.is_floating_point() or v.is_complex() else v
        for k, v in tensors.items()
    }
    wanted = run(backend="reference", **exact)
    own, wanted = (x if isinstance(x, tuple) else (x,) for x in (own, wanted))
    for a, b in zip(own, wanted, strict=True):
        assert_close(a, b, dtype)
    assert own[0].dtype == dtype
    if own[0].numel() or len(own) > 1:
        differentiable = [k for k, v in tensors.items() if v.requires_grad]
        mine = gradients(own[0], own[1:], [tensors[k] for k in differentiable])
        theirs = gradients(wanted[0], wanted[1:], [exact[k] for k in differentiable])
        for name, a, b in zip(differentiable, mine, theirs, strict=True):
            try:
                assert_close(a, b, dtype)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}: {error}") from error


def surroundings(batch: int, time: int, hidden: int, dtype: torch.dtype, *, gated: bool) -> dict[str, Tensor]:
    context = {
        "initial": random(batch, hidden, dtype=dtype if dtype.is_complex or dtype == torch.float64 else torch.float32),
        "reset": torch.rand(batch, time) < 0.1,
    }
    if gated:
        context["restart"] = random(hidden, dtype=context["initial"].dtype)
        context["lengths"] = torch.randint(0, time + 1, (batch,))
    return context


def check_linear(backend: str, time: int, dtype: torch.dtype, reverse: bool) -> None:
    scale = 0.5 if dtype.is_complex else 1.0
    coeffs = random(3, time, 5, dtype=dtype, scale=scale)
    coeffs = (coeffs.detach() if dtype.is_complex else coeffs.detach().sigmoid()).requires_grad_()
    tensors = {
        "coeffs": coeffs,
        "values": random(3, time, 5, dtype=dtype),
        **surroundings(3, time, 5, dtype, gated=False),
    }
    agree(lambda **kw: linear_scan(**kw, reverse=reverse), tensors, dtype, backend)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", REAL + COMPLEX, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_scan(backend, dtype, reverse):
    for time in SHORT:
        check_linear(backend, time, dtype, reverse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("time", LONG)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_scan_at_length(backend, time, dtype):
    check_linear(backend, time, dtype, reverse=time == 1000)


@pytest.mark.parametrize("shape", [(1,), (5,), (7, 1), (7, 5), (3, 1, 1), (3, 7, 1), (1, 7, 5), (3, 1, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_broadcast(backend, shape):
    tensors = {
        "coeffs": torch.rand(shape, dtype=torch.float64).requires_grad_(),
        "values": random(3, 7, 5, dtype=torch.float64),
        **surroundings(3, 7, 5, torch.float64, gated=False),
    }
    agree(linear_scan, tensors, torch.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_over_many_small_gradients_is_not_lost_in_16_bits(backend):
    """2^20 terms of 2^-25, each of which float16 rounds to zero."""
    coeffs = torch.ones(1, dtype=torch.float16, requires_grad=True)
    values = torch.full((1 << 10, 1 << 10, 1), 2.0**-10, dtype=torch.float16)
    out = linear_scan(
        coeffs, values, reset=torch.arange(1 << 10).remainder(2).eq(0).expand(1 << 10, -1), backend=backend
    )
    out.backward(torch.full_like(out, 2.0**-15))
    assert coeffs.grad.item() == 2.0**19 * 2.0**-25


GATED = [(mingru_scan, 2, {"activation": a}) for a in ACTIVATIONS] + [
    (minlstm_scan, 3, {"activation": a, "normalize": n}) for a, n in itertools.product(ACTIVATIONS, (True, False))
]
GATED_IDS = ["-".join([scan.__name__, *map(str, options.values())]) for scan, _, options in GATED]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize(("scan", "blocks", "options"), GATED, ids=GATED_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_scan(backend, scan, blocks, options, dtype, reverse):
    for time in SHORT:
        tensors = {
            "projection": random(4, time, blocks * 5, dtype=dtype),
            **surroundings(4, time, 5, dtype, gated=True),
        }
        agree(lambda **kw: scan(**kw, **options, reverse=reverse), tensors, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("time", "hidden"), [(1000, 1), (4097, 33)])
@pytest.mark.parametrize(("scan", "blocks"), [(mingru_scan, 2), (minlstm_scan, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_scan_at_length(backend, scan, blocks, hidden, time, dtype):
    tensors = {
        "projection": random(2, time, blocks * hidden, dtype=dtype),
        **surroundings(2, time, hidden, dtype, gated=True),
    }
    agree(scan, tensors, dtype, backend)


@pytest.mark.parametrize(("scan", "blocks", "options"), GATED, ids=GATED_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation_at_length(backend, scan, blocks, options):
    tensors = {
        "projection": random(1, 4097, blocks * 3, dtype=torch.float32),
        **surroundings(1, 4097, 3, torch.float32, gated=True),
    }
    agree(lambda **kw: scan(**kw, **options), tensors, torch.float32, backend)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", ["plain", "resets", "lengths", "all"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "native"])
def test_chunks_of_time(backend, case, reverse):
    """Few channels and a long series: the native backend solves chunks of time at once."""
    time, context = 2 * 4096 + 17, {}
    whole = surroundings(3, time, 3, torch.float64, gated=True)
    whole["reset"] = torch.rand(3, time) < (1 / 3000)
    if case in ("resets", "all"):
        context |= {k: whole[k] for k in ("reset", "restart")}
    if case in ("lengths", "all"):
        context["lengths"] = torch.tensor([time, 0, 5000])
    tensors = {"projection": random(3, time, 6, dtype=torch.float64), "initial": whole["initial"], **context}
    agree(lambda **kw: mingru_scan(**kw, reverse=reverse), tensors, torch.float64, backend)


def runs(backend: str, dtype: torch.dtype):
    """The gated scans as rows of the parity harness, with all that they learn."""
    for scan, blocks, options in GATED:

        def run(x, state, scan=scan, options=options, **kw):
            return scan(x, state, backend=backend, **options, **kw)

        yield run, blocks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_of_the_linear_scan(backend, dtype):
    """As a row of the harness: its coefficients are a function of the same input."""

    def run(x, state, *, reset=None):
        gate, values = x.chunk(2, -1)
        coeffs = torch.tanh(gate) if dtype.is_complex else gate.sigmoid()
        state = torch.zeros_like(values[:, 0]) if state is None else state
        hidden = linear_scan(coeffs, values, state, reset=reset, backend=backend)
        return hidden, hidden[:, -1]

    for time in (1, 2, 63):
        x = random(4, time, 8, dtype=dtype, scale=0.5)
        check_chunks(run, x, random(4, 4, dtype=dtype))
        check_resets(run, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend, dtype):
    for run, blocks in runs(backend, dtype):
        for time in (1, 2, 63):
            x, state = random(5, time, blocks * 4, dtype=dtype), random(5, 4, dtype=dtype)
            check_chunks(run, x, state)
            check_resets(run, x)
            check_lengths(run, x, state)
            check_lengths(run, x, None)
            check_lengths(lambda *a, run=run, **kw: run(*a, **kw, reverse=True), x, state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bit_state_is_carried_without_loss(backend):
    x = torch.randn(2, 40, 10).bfloat16()
    whole, last = mingru_scan(x, backend=backend)
    first, state = mingru_scan(x[:, :17], backend=backend)
    second, end = mingru_scan(x[:, 17:], state, backend=backend)
    assert last.dtype == torch.float32
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=0 if backend == "native" else 1e-2)
    assert_close(end, last, torch.float32)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend, data):
    """Odd sizes; tensors that are transposed, sliced, expanded."""
    batch, time, hidden = (data.draw(st.integers(low, high)) for low, high in ((0, 5), (0, 40), (0, 37)))
    layout = data.draw(st.sampled_from(["batch", "time", "sliced", "channels", "expanded"]))
    reverse = data.draw(st.booleans())
    wide = 2 * hidden
    if layout == "time":
        projection = torch.randn(time, batch, wide).transpose(0, 1)
    elif layout == "sliced":
        projection = torch.randn(batch, 2 * time, wide + 3)[:, ::2, 3:]
    elif layout == "channels":
        projection = torch.randn(wide, batch, time).permute(1, 2, 0)
    elif layout == "expanded":
        projection = torch.randn(1, time, wide).expand(batch, time, wide)
    else:
        projection = torch.randn(batch, time, wide)
    tensors = {
        "projection": projection.requires_grad_(),
        **surroundings(batch, time, hidden, torch.float32, gated=True),
    }
    tensors["reset"] = tensors["reset"].t().contiguous().t()
    agree(lambda **kw: mingru_scan(**kw, reverse=reverse), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_major_input_gives_time_major_output(backend):
    projection = torch.randn(9, 3, 8).transpose(0, 1).requires_grad_()
    hidden, _ = mingru_scan(projection, backend=backend)
    assert hidden.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_any_stride(backend):
    projection = torch.randn(4, 9, 8)
    for lengths in (torch.tensor([[9, 1], [2, 9], [0, 5], [7, 3]])[:, 0], torch.tensor(5).expand(4)):
        for reverse in (False, True):
            given = mingru_scan(projection, lengths=lengths, reverse=reverse, backend=backend)
            wanted = mingru_scan(projection, lengths=lengths.contiguous(), reverse=reverse, backend="reference")
            for a, b in zip(given, wanted, strict=True):
                assert_close(a, b, torch.float32)


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_overlap_in_memory(backend, conjugate):
    """Windows of a signal, which are also rows of contiguous numbers."""
    dtype = torch.complex128 if conjugate else torch.float64
    signal = torch.randn(6, dtype=dtype, requires_grad=True)
    windows = signal.unfold(0, 4, 1)
    windows = windows.conj() if conjugate else windows
    coeffs, values = torch.rand(3, 5, 4).to(dtype), torch.randn(3, 5, 4, dtype=dtype)

    def run(initial):
        hidden = linear_scan(coeffs, values, initial, backend=backend)
        return hidden, torch.autograd.grad(hidden.abs().sum(), signal, retain_graph=True)[0]

    for own, wanted in zip(run(windows), run(windows.clone(memory_format=torch.contiguous_format)), strict=True):
        assert_close(own, wanted, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_state_is_no_view_of_the_first(backend):
    initial = torch.zeros(2, 3)
    _, last = mingru_scan(torch.zeros(2, 0, 6), initial, backend=backend)
    last += 1
    assert not initial.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_output_gradient(backend):
    projection = torch.randn(3, 9, 8, dtype=torch.float64, requires_grad=True)
    (own,) = torch.autograd.grad(mingru_scan(projection, backend=backend)[0].sum(), projection)
    (wanted,) = torch.autograd.grad(mingru_scan(projection, backend="reference")[0].sum(), projection)
    assert_close(own, wanted, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_last_state_is_used(backend):
    projection = torch.randn(3, 9, 8, dtype=torch.float64, requires_grad=True)
    (own,) = torch.autograd.grad(mingru_scan(projection, backend=backend)[1].sum(), projection)
    (wanted,) = torch.autograd.grad(mingru_scan(projection, backend="reference")[1].sum(), projection)
    assert_close(own, wanted, torch.float64)


@pytest.mark.parametrize("gates", [1e4, -1e4])
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize(("scan", "blocks", "options"), GATED, ids=GATED_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_gates_stay_finite(backend, scan, blocks, options, dtype, gates):
    """No 0/0 of two shut gates, no overflow: values and gradients finite and right at pre-activations of ±10,000."""
    projection = torch.randn(2, 50, blocks * 3, dtype=torch.float32)
    projection[..., : (blocks - 1) * 3] = gates * torch.rand_like(projection[..., : (blocks - 1) * 3]).round()
    tensors = {"projection": projection.to(dtype).requires_grad_()}
    agree(lambda **kw: scan(**kw, **options), tensors, dtype, backend)
    out, last = scan(tensors["projection"], backend=backend, **options)
    assert out.isfinite().all()
    assert last.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gate_is_an_open_or_a_shut_one(backend):
    projection = torch.randn(1, 4, 9, requires_grad=True)
    infinite = projection.detach().clone()
    infinite[0, :, 0], infinite[0, :, 1], infinite[0, :, 4] = torch.inf, -torch.inf, torch.inf
    wanted = minlstm_scan(infinite.clamp(-1e4, 1e4), backend="reference")[0]
    assert_close(minlstm_scan(infinite, backend=backend)[0], wanted, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_sequence_and_channel(backend):
    projection = torch.randn(3, 20, 10)
    projection[1, 7, 2] = float("nan")
    hidden, last = mingru_scan(projection, backend=backend)
    bad = torch.zeros(3, 20, 5, dtype=torch.bool)
    bad[1, 7:, 2] = True
    assert torch.equal(hidden.isnan(), bad)
    assert torch.equal(last.isnan(), bad[:, -1])


@pytest.mark.parametrize("backend", [None, "parallel"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("scan", "blocks"), [(mingru_scan, 2), (minlstm_scan, 3)])
def test_a_nan_is_in_no_derivative_of_another_sequence(scan, blocks, reverse, backend):
    """First and second ones; of padding and of what a reset cuts off in none at all."""

    def derivatives(projection, **options):
        loss = scan(projection, reverse=reverse, backend=backend, **options)[0][rows].sin().sum()
        (first,) = torch.autograd.grad(loss, projection, create_graph=True)
        return first[rows], torch.autograd.grad(first[rows].sin().sum(), projection)[0][rows]

    clean = torch.randn(2, 8, blocks * 4, dtype=torch.float64)
    spoiled = clean.clone()
    padded, rows = {"lengths": torch.tensor([8, 5])}, (slice(None), slice(0, 5))
    spoiled[1, 5:] = torch.nan
    for found, wanted in zip(*(derivatives(x.requires_grad_(), **padded) for x in (spoiled, clean)), strict=True):
        assert_close(found, wanted, torch.float64)
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[:, 2 if reverse else 3] = True
    spoiled = clean.detach().clone()
    spoiled[1, 5 if reverse else 1] = torch.nan
    rows = (slice(None), slice(0, 3) if reverse else slice(3, None))
    for found, wanted in zip(*(derivatives(x.requires_grad_(), reset=reset) for x in (spoiled, clean)), strict=True):
        assert_close(found, wanted, torch.float64)


@pytest.mark.parametrize(("scan", "blocks"), [(mingru_scan, 2), (minlstm_scan, 3)])
def test_a_nan_is_in_no_gradient_of_another_sequence_where_pytorchs_own_rules_are_taken(scan, blocks, compilable):
    reset, lengths = torch.zeros(2, 8, dtype=torch.bool), torch.tensor([8, 7])
    reset[:, 3] = True
    clean, restart = torch.randn(2, 8, blocks * 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    spoiled = clean.clone()
    spoiled[0, 1], spoiled[1, 7] = torch.nan, torch.nan

    def loss(x):
        hidden, _ = scan(x, reset=reset, restart=restart, lengths=lengths)
        return hidden[:, 3:].sin().sum()

    gradient = torch.compile(lambda x: torch.func.grad(loss)(x), backend="eager", fullgraph=True)
    assert_close(gradient(spoiled)[:, 3:], torch.func.grad(loss)(clean)[:, 3:], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_modes_zero_has_no_memory(backend):
    zero = torch._efficientzerotensor((2, 5, 4))
    wanted = mingru_scan(torch.zeros(2, 5, 4), torch.zeros(2, 2), backend=backend)
    assert all(map(torch.equal, mingru_scan(zero, zero[:, 0, :2], backend=backend), wanted))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize(("scan", "blocks"), [(mingru_scan, 2), (minlstm_scan, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_steps(backend, scan, blocks, dtype):
    """The error against float64 does not grow with the length, and nothing overflows."""
    projection = random(1, 1_000_000, blocks, dtype=dtype)
    hidden, _ = scan(projection, backend=backend)
    (grad,) = torch.autograd.grad(hidden.sum(), projection)
    wide = projection.detach().double().requires_grad_()
    exact, _ = scan(wide, backend="native" if "native" in BACKENDS else "parallel")
    (exact_grad,) = torch.autograd.grad(exact.sum(), wide)
    assert_close(hidden, exact, dtype)
    assert_close(grad, exact_grad, dtype)


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    """More than 2^31 elements, of which the last sequence is checked."""
    if "native" not in BACKENDS:
        pytest.skip("the other backends are PyTorch's own indexing")
    batch, time, hidden = 3, 1 << 20, 700
    values = torch.ones(1, 1, 1, dtype=torch.bfloat16).expand(batch, time, hidden)
    out = linear_scan(torch.full((1,), 0.5, dtype=torch.bfloat16), values, backend="native")
    assert out.numel() > 1 << 31
    assert (out[-1, -1] == 2).all()
    assert out[-1, 0].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("time", "hidden"), [(300, 37), (9000, 5), (40, 700)])
@pytest.mark.parametrize(("scan", "blocks", "options"), GATED[::3], ids=GATED_IDS[::3])
def test_bitwise_independent_of_threads_and_batch(scan, blocks, options, time, hidden, dtype):
    """The same bits in ten runs, for 1 and 2 threads, alone and in a batch, batch-major and time-major."""
    if "native" not in BACKENDS:
        pytest.skip("the native backend is not under test")
    batch = 7
    projection, weight = torch.randn(batch, time, blocks * hidden).to(dtype), torch.randn(batch, time, hidden)
    around = surroundings(batch, time, hidden, torch.float32, gated=True)
    around["reset"] = torch.rand(batch, time) < 2 / time

    def results(p, rows=slice(None)):
        p = p.detach().requires_grad_()
        restart = around["restart"].detach().requires_grad_()
        context = {name: around[name][rows] for name in ("reset", "lengths", "initial")}
        h, last = scan(p, **context, restart=restart, backend="native", **options)
        return h, last, *torch.autograd.grad((h * weight[rows]).sum() + last.sum(), (p, restart))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = results(projection)
    torch.set_num_threads(2)
    time_major = projection.transpose(0, 1).contiguous().transpose(0, 1)
    others = [results(projection) for _ in range(10)] + [results(time_major)]
    torch.set_num_threads(threads)
    for other in others:
        for a, b in zip(other, wanted, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(results(projection[3:4], slice(3, 4))[:3], wanted, strict=False):
        assert torch.equal(a, b[3:4])
