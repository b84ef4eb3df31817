"""The weighted average of RWKV: against the sums of its equation, kernel against scans, and where floats end."""

import importlib
import math

import pytest
import torch

from conftest import assert_close, backends_under_test
from minrnn.ops import WKVState, wkv
from parity import check_chunks, check_resets, compare

BACKENDS = [name for name in ("native", "parallel") if name in backends_under_test()]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("MINRNN_BACKEND", request.param)
    return request.param


def arguments(batch, time, width, dtype=torch.float64):
    """(keys, values, decay, bonus) and a state from the middle of other sequences."""
    torch.manual_seed(1)
    keys, values = (torch.randn(batch, time, width, dtype=dtype) for _ in range(2))
    decay, bonus = torch.rand(width, dtype=dtype), torch.randn(width, dtype=dtype)
    initial = WKVState(*(f(torch.randn(batch, width, dtype=dtype)) for f in (torch.clone, torch.exp, torch.clone)))
    for x in (keys, values, decay, bonus, initial.average, initial.weight):
        x.requires_grad_()
    return (keys, values, decay, bonus), initial


def define(keys, values, decay, bonus, initial, reset):
    """Every output from all weights of its sequence, with no stabiliser; at the end the average and the weight."""
    batch, time, _ = keys.shape
    step = torch.arange(time)
    sequence = torch.zeros(batch, time, dtype=torch.long) if reset is None else reset.cumsum(1)

    def sums(age, seen, weights):
        """num and den, (B, rows, D), of ages (rows, T) and of what is seen, (B, rows, T)."""
        weights = torch.exp(weights[:, None] - age[None, ..., None] * decay) * seen[..., None]
        return (weights * values[:, None]).sum(2), weights.sum(2)

    def first(age, seen):
        """What is left of the initial state."""
        left = torch.exp(initial.max[:, None] - age[..., None] * decay) * seen[..., None]
        return left * (initial.average * initial.weight)[:, None], left * initial.weight[:, None]

    earlier = (step[:, None] > step) & (sequence[:, :, None] == sequence[:, None])
    (num, den), (num0, den0) = sums(step[:, None] - 1 - step, earlier, keys), first(step, sequence == 0)
    now = torch.exp(bonus + keys)
    y = (num + num0 + now * values) / (den + den0 + now)
    last = sequence == sequence[:, -1:]
    (num, den), (num0, den0) = (
        sums(time - 1 - step[None], last[:, None], keys),
        first(torch.tensor([time]), sequence[:, -1:] == 0),
    )
    num, den = (num + num0)[:, 0], (den + den0)[:, 0]
    return y, num / den, den


@pytest.mark.parametrize("resets", [False, True])
def test_it_is_its_equation(backend, resets):
    (args, initial), reset = arguments(3, 35, 5), torch.rand(3, 35) < 0.1 if resets else None
    y, state = wkv(*args, initial, reset=reset)
    expected, average, weight = define(*args, initial, reset)
    inputs = [*args, initial.average, initial.weight]
    compare((y, (state.average, state.weight)), (expected, (average, weight * torch.exp(-state.max))), inputs, y.dtype)


def test_without_decay_and_bonus_it_is_attention_of_one_query(backend):
    (keys, values, *_), _ = arguments(2, 33, 3)
    y, _ = wkv(keys, values, torch.zeros(3).double(), torch.zeros(3).double())
    query = torch.ones(2, 3, 33, 1, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys.mT[..., None], values.mT[..., None], is_causal=True, scale=1.0
    )
    compare((y, ()), (expected[..., 0].mT, ()), [keys, values], y.dtype)


@pytest.mark.parametrize(("shift", "unit"), [(0.0, 0.0), (-200.0, 0.0), (0.0, 200.0)])
def test_a_weight_of_zero_is_no_past(backend, shift, unit):
    """However far the keys are from its unit, and whatever its average."""
    (keys, *rest), _ = arguments(2, 20, 3, torch.float32)
    given = ((keys + shift).detach().requires_grad_(), *rest)
    average, weight = (torch.full((2, 3), fill, requires_grad=True) for fill in (5.0, 0.0))
    y, state = wkv(*given, WKVState(average, weight, torch.full((2, 3), unit)))
    lost = torch.autograd.grad(y.sum(), [average, weight], retain_graph=True)
    assert all((grad.abs() < 1e-30).all() for grad in lost)  # the kernel's exp ends above 0
    compare((y, state), wkv(*given), given, torch.float32)


@pytest.mark.parametrize("time", [0, 1, 2, 16, 17, 63])
def test_whole_chunked_and_stepped_agree(backend, time):
    args, initial = arguments(2, time, 5)
    x = torch.cat(args[:2], 2).detach().requires_grad_()

    def run(x, state, *, reset=None):
        return wkv(*x.split(5, 2), *args[2:], state, reset=reset)

    check_chunks(run, x, initial, args[2:])
    check_resets(run, x, args[2:])


@pytest.mark.skipif(len(BACKENDS) < 2, reason="there is only one backend to test")
@pytest.mark.parametrize(("batch", "time", "width"), [(2, 40, 1), (1, 33, 130), (3, 16, 300), (0, 4, 3), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_and_scans_agree(monkeypatch, batch, time, width, dtype):
    args, initial = arguments(batch, time, width, dtype)
    reset, found = torch.rand(batch, time) < 0.1, []
    for name in BACKENDS:
        monkeypatch.setenv("MINRNN_BACKEND", name)
        y, state = wkv(*args, initial, reset=reset)
        found.append((y, (state.average, state.weight)))
    compare(*found, [*args, initial.average, initial.weight], dtype)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_long_and_extreme_in_float32(backend, size):
    torch.manual_seed(0)
    keys, values = torch.randn(1, 4096, 6) * size, torch.randn(1, 4096, 6)
    decay, bonus = torch.tensor([0, 1e-3, 0.1, 1.0, 20.0, 1e3]), torch.linspace(-5, 5, 6)
    reset, grad = torch.rand(1, 4096) < 1e-3, torch.randn(1, 4096, 6)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (keys, values, decay, bonus)]
        y, _ = wkv(*inputs, reset=reset)
        found.append([y, *torch.autograd.grad(y, inputs[:2], grad.to(dtype))])
    for single, double in zip(*found, strict=True):
        assert single.isfinite().all()
        assert_close(single, double, torch.float32)


def test_no_rounding_of_the_maximum_becomes_a_decay(backend):
    """One large key, then many small ones: its sum decays by w at each step, though max - w is rounded to 2^-10."""
    keys = torch.zeros(1, 401, 2)
    keys[:, 0] = 16000.0
    decay = torch.tensor([1e-4, 0.0067])
    _, (_, weight, top) = wkv(keys, torch.zeros_like(keys), decay, torch.zeros(2))
    # max is as it may be; weight e^max is what is due.
    assert_close(weight.double().log() + top.double() - 16000.0, -400 * decay.double()[None], torch.float32)


@pytest.mark.skipif("native" not in BACKENDS, reason="the native backend is not under test")
def test_bits_do_not_depend_on_threads_or_batch():
    args, _ = arguments(5, 200, 70, torch.float32)

    def grads(threads, rows):
        torch.set_num_threads(threads)
        keys, values, decay, bonus = args
        y, _ = wkv(keys[rows], values[rows], decay, bonus)
        return [y, *torch.autograd.grad(y.sum(), args)]

    one, four, alone = grads(1, slice(None)), grads(4, slice(None)), grads(2, slice(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))
    assert torch.equal(alone[0], one[0][3:4])
    assert all(torch.equal(a[3], b[3]) for a, b in zip(alone[1:3], one[1:3], strict=True))


def test_any_strides(backend):
    args, _ = arguments(4, 9, 6)
    keys, values, *rest = args
    for view in (lambda x: x.transpose(0, 1), lambda x: x[::2, 1::3], lambda x: x[:1].expand(3, -1, -1)):
        left = wkv(view(keys), view(values), *rest)
        right = wkv(view(keys).contiguous(), view(values).contiguous(), *rest)
        compare((left[0], left[1][:2]), (right[0], right[1][:2]), args, keys.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_sums_in_float32(backend, dtype):
    (keys, values, decay, bonus), _ = arguments(2, 50, 4, torch.float32)
    keys, values = keys.to(dtype), values.to(dtype)
    y, state = wkv(keys, values, decay, bonus)
    assert y.dtype == dtype and {x.dtype for x in state} == {torch.float32}
    assert_close(y, wkv(keys.double(), values.double(), decay.double(), bonus.double())[0], dtype)


def test_second_derivatives_and_transforms(backend):
    args, initial = arguments(1, 5, 2)
    reset = torch.tensor([[False, False, True, False, False]])

    def run(keys, values, decay, bonus, average, weight):
        y, state = wkv(keys, values, decay, bonus, WKVState(average, weight, initial.max), reset=reset)
        return y, state.average, state.weight * state.max.exp()  # max is a constant to autograd

    inputs = (*args, initial.average, initial.weight)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    whole = torch.func.grad(lambda keys: run(keys, *inputs[1:])[0].square().sum())(args[0])
    assert_close(whole, torch.autograd.grad(run(*inputs)[0].square().sum(), args[0])[0], torch.float64)


def test_second_derivatives_of_arguments_that_are_one_or_made_from_each_other(backend):
    (keys, _, decay, _), _ = arguments(2, 5, 3)
    for values in (keys, keys.sin()):
        y, _ = wkv(keys, values, decay, decay)
        wanted = torch.autograd.grad(y.square().sum(), (keys, decay), retain_graph=True)
        found = torch.autograd.grad(y.square().sum(), (keys, decay), create_graph=True)
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, keys.dtype)
    assert torch.autograd.gradgradcheck(lambda keys, decay: wkv(keys, keys.sin(), decay, decay)[0], (keys, decay))


@pytest.mark.skipif("native" not in BACKENDS, reason="the native backend is not under test")
def test_the_operator_keeps_its_promises():
    args, initial = arguments(2, 18, 3)
    reset = torch.rand(2, 18) < 0.2
    torch.library.opcheck(torch.ops.minrnn.wkv.default, (*args, *initial, reset))
    operator = importlib.import_module("minrnn.ops.wkv")._fused
    compiled = torch.compile(lambda *args: operator(*args)[0], fullgraph=True, backend="aot_eager")
    inputs = (*args, *initial, reset)
    compare((compiled(*inputs), ()), (operator(*inputs)[0], ()), [*args, *initial[:2]], torch.float64)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"keys must be \(B, T, D\) = .*got \(4, 3\)", {"keys": torch.zeros(4, 3)}),
        (TypeError, "keys must be float32.*got torch.int64", {"keys": torch.zeros(2, 4, 3, dtype=torch.int64)}),
        (ValueError, r"values must be \(B, T, D\)", {"values": torch.zeros(2, 4, 2)}),
        (TypeError, "values must have the dtype of keys", {"values": torch.zeros(2, 4, 3).double()}),
        (ValueError, r"decay must be \(D,\)", {"decay": torch.zeros(2)}),
        (TypeError, "bonus must be a torch.Tensor", {"bonus": 0.0}),
        (TypeError, "decay must be float32.*got torch.int64", {"decay": torch.zeros(3, dtype=torch.int64)}),
        (
            TypeError,
            "initial.weight must be float32.*got torch.complex64",
            {"initial": WKVState(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3))},
        ),
        (
            ValueError,
            r"initial.weight must be \(B, D\)",
            {"initial": WKVState(*map(torch.zeros, [(2, 3), (1, 3), (2, 3)]))},
        ),
        (ValueError, r"reset must be \(B, T\)", {"reset": torch.zeros(4, 2, dtype=torch.bool)}),
        (TypeError, "reset must be torch.bool", {"reset": torch.zeros(2, 4)}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    good = {"keys": torch.zeros(2, 4, 3), "values": torch.zeros(2, 4, 3)}
    good |= {"decay": torch.zeros(3), "bonus": torch.zeros(3)}
    with pytest.raises(error, match=f"wkv: {match}"):
        wkv(**(good | change))


def test_the_empty_state_is_that_of_no_steps(backend):
    (keys, values, decay, bonus), _ = arguments(2, 0, 3)
    _, state = wkv(keys, values, decay, bonus)
    assert (state.average == 0).all() and (state.weight == 0).all() and (state.max == -math.inf).all()
