"""Hyena and its long convolution: against sums written from the paper's equations, mode against mode."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from conftest import assert_close
from minrnn.mixers import Hyena, HyenaConfig, LongConv, LongConvConfig, make_mixer
from minrnn.mixers.inner import make_inner
from parity import check_chunks, check_resets, chunked, compare

D = 4
F64 = torch.float64
ROWS = {
    "hyena": lambda **options: Hyena(D, HyenaConfig(filter_width=8, **options)),
    "hyena-3": lambda **options: Hyena(D, HyenaConfig(filter_width=8, order=3, features=7, omega=3.0, **options)),
    "conv": lambda **options: LongConv(D, LongConvConfig(filter_width=8, **options)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(row, dtype=F64, **options):
    torch.manual_seed(0)
    return ROWS[row](**{"max_length": 80} | options).to(dtype)


def series(batch, time, dtype=F64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


def define_filter(network, length, longest, omega_features):
    """K_d(l), each number from its time."""
    width, bands = len(network.skip), (omega_features - 1) // 2
    columns = []
    for step in range(length):
        t = step / (longest - 1)
        f = [1e-4 + j * (bands - 1 - 1e-4) / max(bands - 1, 1) for j in range(bands)]
        angles = [frequency * 2 * math.pi * step / longest for frequency in f]
        h = torch.tensor([t, *map(math.cos, angles), *(-math.sin(a) for a in angles)], dtype=F64)
        for layer in network.layers:
            h = torch.sin(network.frequency * (layer.weight @ h + layer.bias))
        slow, fast = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
        window = [math.exp(-t * (slow + d * (fast - slow) / (width - 1))) for d in range(width)]
        columns.append(network.output.weight @ h * torch.tensor(window, dtype=F64))
    return torch.stack(columns, 1)


def convolve(x, kernel, skip):
    """One sequence, (T, D)."""
    return torch.stack([sum(kernel[:, t - j] * x[j] for j in range(t + 1)) + skip * x[t] for t in range(x.shape[0])])


def define(mixer, x):
    """One sequence, (T, D), by the equations."""
    network, time = mixer.filter, x.shape[0]
    kernel = define_filter(network, time, network.max_length, network.layers[0].in_features)
    if isinstance(mixer, LongConv):
        return convolve(x, kernel, network.skip)
    n = mixer.order
    z = x @ mixer.input.weight.T + mixer.input.bias
    w, zero = mixer.conv.weight, torch.zeros_like(z[0])
    past = [zero, zero, *z]
    u = torch.stack([mixer.conv.bias + sum(w[k] * past[t + k] for k in range(3)) for t in range(time)])
    parts = [u[:, i * D : (i + 1) * D] for i in range(n + 1)]
    v = parts[n]
    for stage, i in enumerate(range(n - 1, 0, -1)):
        chosen = slice(stage * D, (stage + 1) * D)
        v = convolve(parts[i] * v, kernel[chosen], network.skip[chosen])
    return (parts[0] * v) @ mixer.output.weight.T + mixer.output.bias


@pytest.mark.parametrize("row", ROWS)
def test_it_is_the_papers_equation(row):
    mixer, x = make(row, max_length=20), series(2, 13)
    y, _ = mixer(x)
    expected = torch.stack([define(mixer, one) for one in x])
    compare((y, ()), (expected, ()), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize(
    ("row", "time"), [(row, time) for row in ROWS for time in (0, 1, 2, 21 if row == "hyena-3" else 63)]
)
def test_whole_chunked_and_stepped_agree(row, time):
    mixer, x = make(row), series(2, time)
    _, state = mixer(torch.randn(2, 7, D, dtype=F64), reset=(torch.arange(7) == 3).expand(2, -1))
    state = type(state)(*(leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in state))
    check_chunks(mixer, x, state, list(mixer.parameters()))


@pytest.mark.parametrize("row", ROWS)
def test_resets_are_separate_sequences(row):
    mixer = make(row)
    check_resets(mixer, series(2, 40), list(mixer.parameters()))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), row=st.sampled_from(sorted(ROWS)), batch=st.integers(0, 3), time=st.integers(0, 12))
def test_any_chunks_with_any_resets(data, row, batch, time):
    mixer, x = make(row), series(batch, time)
    reset = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * time, max_size=batch * time)), dtype=bool)
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    reset = reset.view(batch, time)
    compare(mixer(x, reset=reset), chunked(mixer, x, None, sizes, reset), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("row", ROWS)
def test_float32_is_the_rounded_float64(row):
    mixer, exact, x = make(row, torch.float32, max_length=300), make(row, max_length=300), series(2, 200)
    exact.load_state_dict(mixer.state_dict())
    (y, _), (wanted, _) = mixer(x.float()), exact(x)
    scale = wanted.abs().max().detach()
    assert_close(y / scale, wanted / scale, torch.float32)
    pieces, _ = chunked(mixer, x.float(), None, [150, 1, 9])
    assert_close(pieces / scale, wanted / scale, torch.float32)


@pytest.mark.parametrize("row", ROWS)
def test_the_state_is_what_the_current_sequences_need(row):
    mixer, x, reset = make(row), series(3, 9), torch.zeros(3, 9, dtype=torch.bool)
    assert mixer.state_size is None
    reset[0, 3] = reset[1, 7] = reset[2, 8] = True
    _, state = mixer(x, reset=reset)
    assert state.steps.tolist() == [6, 2, 1] and state.history.shape[1] == 6
    assert (state.history[1, :4] == 0).all() and (state.history[1, 4:] != 0).all()
    _, state = mixer(x[:, :2], state, reset=reset[:, 2:4])
    assert state.steps.tolist() == [1, 4, 3] and state.history.shape[1] == 4
    assert mixer.initial_state(3).history.shape[:2] == (3, 0)


@pytest.mark.parametrize("row", ROWS)
def test_no_sequence_is_longer_than_the_filter(row):
    mixer, x = make(row, max_length=10), series(2, 24)
    caller = type(mixer).__name__
    y, state = mixer(x[:, :10])
    with pytest.raises(ValueError, match=f"{caller}: .* at most max_length = 10 .* got 11"):
        mixer(x[:, :11])
    with pytest.raises(ValueError, match=f"{caller}: .* at most max_length = 10 .* got 12"):
        mixer(x[:, 10:12], state)
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[:, [10, 14]] = True
    again, last = mixer(x, reset=reset)
    assert_close(again[:, :10], y, F64)
    assert last.steps.tolist() == [10, 10]
    reset[0, 10] = False
    with pytest.raises(ValueError, match="got 14"):  # a sequence that has ended within x
        mixer(x, reset=reset)
    reset[0, 0] = True
    mixer(x[:, :9], state, reset=reset[:, :9] | reset[:, :1].flip(0))
    with pytest.raises(ValueError, match="got 19"):
        mixer(x[:, :9], state, reset=reset[:, :9])


@pytest.mark.parametrize("row", ROWS)
def test_filters_stay_in_float32(row):
    mixer, x = make(row, torch.bfloat16), series(2, 40, torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in mixer.filter.parameters())
    y, state = mixer(x)
    assert y.dtype == state.history.dtype == torch.bfloat16 and state.steps.dtype == torch.int64
    wide = make(row, torch.float32)
    wide.load_state_dict(mixer.state_dict())
    wanted, _ = wide(x.float())
    scale = wanted.abs().max().detach()
    assert_close(y / scale, wanted / scale, torch.bfloat16)
    pieces, _ = chunked(mixer, x, None, [1, 5])
    assert_close(pieces / scale, wanted / scale, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        kernel, (y, _) = wide.filter(9), wide(x.float())
    assert torch.equal(kernel, wide.filter(9))
    assert y.dtype == (torch.float32 if row == "conv" else torch.bfloat16)


@pytest.mark.parametrize("row", ROWS)
def test_the_network_of_the_filters_has_its_own_rate_and_never_decays(row):
    tuning = make(row, lr_limit=2e-4).tuning()
    network = {name: asks for name, asks in tuning.items() if name != "filter.skip"}
    assert set(tuning) == {f"filter.{name}" for name, _ in make(row).filter.named_parameters()}
    assert all(asks.lr_limit == 2e-4 and not asks.decay and asks.keep_float32 for asks in network.values())
    assert math.isinf(tuning["filter.skip"].lr_limit)


def test_it_begins_as_the_authors():
    torch.manual_seed(0)
    mixer = Hyena(512, HyenaConfig())
    network = mixer.filter
    assert (network.frequency == 10).all() and network.frequency.shape == (64,)
    assert [layer.in_features for layer in network.layers] == [5, 64, 64] and network.output.bias is None
    assert abs(network.skip.std() - 1) < 0.1
    assert network(100).shape == (512, 100)
    assert make_mixer("hyena", 8, {"order": 4}).filter.skip.shape == (24,)


def test_a_filter_of_one_step_and_of_one_channel():
    mixer = Hyena(1, HyenaConfig(max_length=1, features=3)).double()
    x = torch.randn(2, 1, 1, dtype=F64)
    assert mixer(x)[0].isfinite().all()


def test_it_is_an_inner_layer():
    made = make_inner("hyena", D, {"max_length": 20})
    assert type(made) is LongConv and made.filter.max_length == 20


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "x must be", lambda x, state, reset: (x[..., 1:], None, None)),
        (TypeError, "reset must be", lambda x, state, reset: (x, state, reset.long())),
        (ValueError, "state must be", lambda x, state, reset: (x, tuple(state), None)),
        (ValueError, "state.history must be", lambda x, state, reset: (x, state._replace(history=x[0]), None)),
        (ValueError, "state.history must be", lambda x, state, reset: (x, state._replace(history=x[..., 1:]), None)),
        (TypeError, "state.history must be", lambda x, state, reset: (x, state._replace(history=None), None)),
        (ValueError, "state.steps must be", lambda x, state, reset: (x, state._replace(steps=state.steps[1:]), None)),
        (ValueError, "state", lambda x, state, reset: (x[1:], state, None)),
    ],
)
def test_bad_arguments_are_named(row, error, name, change):
    mixer, x = make(row), series(2, 3)
    x, state, reset = change(x, mixer(x)[1], torch.zeros(2, 3, dtype=torch.bool))
    assert len(tree_leaves(mixer(series(2, 3))[1])) == (2 if row == "conv" else 3)
    with pytest.raises(error, match=rf"{type(mixer).__name__}: {name}.*got"):
        mixer(x, state, reset=reset)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"features": 4}, "features must be odd and at least 3, got 4"),
        ({"features": 1}, "features must be odd and at least 3, got 1"),
        ({"filter_width": 0}, "filter_width must be at least 1, got 0"),
        ({"omega": math.inf}, "omega must be finite, got inf"),
        ({"lr_limit": 0.0}, "lr_limit must be above 0, got 0.0"),
        ({"order": 1}, "order must be at least 2, got 1"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=f"HyenaConfig: {match}"):
        make_mixer("hyena", D, options)
