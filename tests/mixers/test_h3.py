"""H3: against sums and recurrences written from the paper's equations, mode against mode, with every inner layer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from conftest import assert_close
from minrnn.mixers import H3, H3Config, LongConv, make_mixer
from minrnn.mixers.s4 import S4
from minrnn.mixers.s4d import S4D
from parity import check_chunks, check_resets, chunked, compare

D = 4
F64 = torch.float64
ROWS = {
    "s4d": {"taps": 5, "inner_options": {"state": 6}},
    "s4d-1": {"taps": 1, "inner_options": {"state": 2, "discretization": "zoh"}},
    "s4": {"taps": 5, "inner": "s4", "inner_options": {"state": 4}},
    "hyena": {"taps": 5, "inner": "hyena", "inner_options": {"max_length": 80, "filter_width": 8}},
}


def make(row, dtype=F64):
    torch.manual_seed(0)
    return H3(D, H3Config(**ROWS[row])).to(dtype)


def series(batch, time, dtype=F64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


def define(mixer, x, reset):
    """Step by step, with a diagonal state-space model between the gates."""
    inner, taps = mixer.inner, len(mixer.taps)
    step = inner.log_step.exp()[:, None]
    a = torch.complex(-inner.log_decay.exp(), inner.frequency)
    c = torch.view_as_complex(inner.C)
    if inner.discretization == "bilinear":
        decay, into = (1 + step * a / 2) / (1 - step * a / 2), step / (1 - step * a / 2)
    else:
        decay, into = torch.exp(step * a), (torch.exp(step * a) - 1) / a
    rows = []
    for b in range(x.shape[0]):
        h, keys = torch.zeros_like(c), []
        for t in range(x.shape[1]):
            if reset[b, t]:
                h, keys = torch.zeros_like(c), []
            q, k, v = (mixer.input.weight @ x[b, t] + mixer.input.bias).view(3, D)
            keys.append(k)
            shifted = mixer.skip * k + sum(mixer.taps[i] * keys[-1 - i] for i in range(min(taps, len(keys))))
            w = shifted * v
            h = decay * h + into * w[:, None]
            s = 2 * (c * h).sum(1).real + inner.D * w
            rows.append(mixer.output.weight @ (q * s) + mixer.output.bias)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("row", ["s4d", "s4d-1"])
def test_it_is_the_papers_equation(row):
    mixer, x, reset = make(row), series(2, 23), torch.rand(2, 23) < 0.1
    y, _ = mixer(x, reset=reset)
    compare((y, ()), (define(mixer, x, reset), ()), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize(
    ("row", "time"), [(row, time) for row in ROWS for time in (0, 1, 2, 63 if row == "s4d" else 12)]
)
def test_whole_chunked_and_stepped_agree(row, time):
    mixer, x = make(row), series(2, time)
    _, state = mixer(torch.randn(2, 7, D, dtype=F64))
    state = tree_map(lambda s: s.detach().requires_grad_(s.is_floating_point() or s.is_complex()), state)
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
    mixer, x = make(row, torch.float32), series(2, 75, torch.float32)
    exact = make(row)
    exact.load_state_dict(mixer.state_dict())
    (y, _), (wanted, _), (pieces, _) = mixer(x), exact(x.double()), chunked(mixer, x, None, [50, 1, 9])
    scale = wanted.abs().max().detach()
    assert_close(y / scale, wanted / scale, torch.float32)
    assert_close(pieces / scale, wanted / scale, torch.float32)


@pytest.mark.parametrize("row", ROWS)
def test_bfloat16_keeps_the_inner_layer_in_float32(row):
    mixer, x = make(row, torch.bfloat16), series(2, 40, torch.bfloat16)
    y, state = mixer(x)
    kept = {name for name, asks in mixer.tuning().items() if asks.keep_float32}
    assert kept == {f"inner.{name}" for name, _ in mixer.inner.named_parameters()}
    assert all(p.dtype == (torch.float32 if n in kept else torch.bfloat16) for n, p in mixer.named_parameters())
    assert y.dtype == state.keys.dtype == torch.bfloat16
    assert not {leaf.dtype for leaf in tree_leaves(state.inner)} & {torch.float16, torch.float64}
    wide = make(row, torch.float32)
    wide.load_state_dict(mixer.state_dict())
    wanted, _ = wide(x.float())
    scale = wanted.abs().max().detach()
    assert_close(y / scale, wanted / scale, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = wide(x.float())
    assert y.dtype == torch.bfloat16
    assert_close(y / scale, wanted / scale, torch.bfloat16)


@pytest.mark.parametrize(("row", "inner"), [("s4d", S4D), ("s4", S4), ("hyena", LongConv)])
def test_any_inner_layer(row, inner):
    mixer, x = make(row), series(2, 9)
    _, state = mixer(x)
    assert type(mixer.inner) is inner
    assert mixer.tuning() == {f"inner.{name}": asks for name, asks in mixer.inner.tuning().items()}
    assert state.keys.shape == (2, 4, D)
    assert mixer.state_size == (None if row == "hyena" else 4 * D + mixer.inner.state_size)


def test_it_begins_as_the_authors():
    torch.manual_seed(0)
    mixer = make_mixer("h3", 256, {})
    assert mixer.taps.shape == (64, 256) and mixer.inner.discretization == "bilinear"
    assert 0.9 / 8 < mixer.taps.abs().max() <= 1 / 8
    assert abs(mixer.skip.std() - 1) < 0.15
    assert mixer.state_size == 63 * 256 + 64 * 256
    assert make_mixer("h3", 8, {"inner_options": {"discretization": "zoh"}}).inner.discretization == "zoh"


def test_a_step_looks_at_the_last_taps_only():
    mixer, x = make("s4d"), series(1, 30)
    _, state = mixer(x)
    assert torch.equal(state.keys, mixer.input(x)[:, -4:, D : 2 * D])
    _, state = mixer(x[:, :2])
    assert (state.keys[:, :2] == 0).all() and (state.keys[:, 2:] != 0).all()


@pytest.mark.parametrize("row", ["s4d", "hyena"])
@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "x must be", lambda x, state: (x[..., 1:], None)),
        (ValueError, "state must be of type H3State", lambda x, state: (x, tuple(state))),
        (ValueError, "state.keys must be", lambda x, state: (x, state._replace(keys=state.keys[:, 1:]))),
        (TypeError, "state.keys must be", lambda x, state: (x, state._replace(keys=None))),
        (ValueError, "state must be", lambda x, state: (x, state._replace(inner=(1, 2)))),
        (ValueError, "state.keys must be", lambda x, state: (x[1:], state)),
    ],
)
def test_bad_arguments_are_named(row, error, name, change):
    mixer, x = make(row), series(2, 3)
    x, state = change(x, mixer(x)[1])
    with pytest.raises(error, match=rf": {name}.*got"):
        mixer(x, state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"taps": 0}, "H3Config: taps must be at least 1, got 0"),
        ({"inner": "nothing"}, "must be one of .*got 'nothing'"),
        ({"inner_options": {"nothing": 1}}, "options of s4d must be among .*got 'nothing'"),
        ({"inner": "s4", "inner_options": {"dt_min": math.inf}}, "dt_min must be"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        make_mixer("h3", D, options)
