"""Mixers: against loops written from the paper's equations, mode against mode, and what they refuse."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import assert_close
from minrnn.mixers import MIXERS, CausalConv, MinGRUConfig, Mixer, detach_state, make_mixer, mixer_config
from parity import check_chunks, check_resets, chunked, compare

D = 5
ROWS = {
    "mingru": lambda: make_mixer("mingru", D, {}),
    "mingru-narrow": lambda: make_mixer("mingru", D, {"expansion": 0.5}),
    "mingru-tanh-learned": lambda: make_mixer(
        "mingru", D, {"expansion": 2, "activation": "tanh", "learn_initial_state": True}
    ),
    "mingru-identity": lambda: make_mixer("mingru", D, {"activation": "identity"}),
    "minlstm": lambda: make_mixer("minlstm", D, {"expansion": 1.6}),
    "minlstm-learned": lambda: make_mixer("minlstm", D, {"learn_initial_state": True, "forget_bias": 3.0}),
    "minlstm-plain": lambda: make_mixer("minlstm", D, {"normalize": False, "activation": "identity"}),
    "conv": lambda: CausalConv(D, 4),
    "conv-1": lambda: CausalConv(D, 1),
}
MINRNNS = [row for row in ROWS if not row.startswith("conv")]


def make(row, dtype=torch.float64) -> Mixer:
    torch.manual_seed(0)
    return ROWS[row]().to(dtype)


def series(batch, time, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=torch.float64))
    return state.requires_grad_()


def act(x, activation):
    if activation == "identity":
        return x
    return torch.tanh(x) if activation == "tanh" else torch.where(x >= 0, x + 0.5, 1 / (1 + torch.exp(-x)))


def define_minrnn(row, mixer, x, state, reset):
    """The equations of Feng et al. (2024), sections 3.1 and 3.2, one step and one sequence at a time."""
    start = torch.zeros(mixer.hidden, dtype=x.dtype) if mixer.initial is None else act(mixer.initial, mixer.activation)
    outputs, lasts = [], []
    for b in range(x.shape[0]):
        h, rows = start if state is None else state[b], []
        for t in range(x.shape[1]):
            h = start if reset[b, t] else h
            gates = mixer.input.weight @ x[b, t] + mixer.input.bias
            if row.startswith("mingru"):
                z, candidate = 1 / (1 + torch.exp(-gates[: mixer.hidden])), gates[mixer.hidden :]
                h = (1 - z) * h + z * act(candidate, mixer.activation)
            else:
                forget, into, candidate = gates.view(3, mixer.hidden)
                f, i = 1 / (1 + torch.exp(-forget)), 1 / (1 + torch.exp(-into))
                f, i = (f / (f + i), i / (f + i)) if mixer.normalize else (f, i)
                h = f * h + i * act(candidate, mixer.activation)
            rows.append(mixer.output.weight @ h + mixer.output.bias)
        outputs.append(torch.stack(rows))
        lasts.append(h)
    return torch.stack(outputs), torch.stack(lasts)


def define_conv(mixer, x, reset):
    """Every output from the inputs of its own sequence, each looked up by its time."""
    kernel, rows = mixer.kernel, []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            begin = max(s for s in range(t + 1) if s == 0 or reset[b, s])
            mixed = sum(mixer.weight[kernel - 1 - lag] * x[b, t - lag] for lag in range(kernel) if t - lag >= begin)
            rows.append(mixer.output.weight @ mixed + mixer.output.bias)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("row", MINRNNS)
def test_minrnn_is_the_papers_recurrence(row, given_state):
    mixer, x, reset = make(row), series(3, 9), torch.rand(3, 9) < 0.3
    state = some_state(mixer, 3) if given_state else None
    inputs = [x, *mixer.parameters(), *([state] if given_state else [])]
    compare(mixer(x, state, reset=reset), define_minrnn(row, mixer, x, state, reset), inputs, x.dtype)


@pytest.mark.parametrize("row", ["conv", "conv-1"])
def test_conv_is_its_definition(row):
    mixer, x, reset = make(row), series(3, 9), torch.rand(3, 9) < 0.3
    (y, _), expected = mixer(x, reset=reset), define_conv(mixer, x, reset)
    compare((y, ()), (expected, ()), [x, *mixer.parameters()], x.dtype)


def test_conv_is_torchs_depthwise_then_pointwise_convolution():
    mixer, x = make("conv"), series(2, 11)
    depthwise, pointwise = nn.Conv1d(D, D, 4, groups=D, bias=False), nn.Conv1d(D, D, 1)
    depthwise.weight = nn.Parameter(mixer.weight.detach().T[:, None])
    pointwise.weight, pointwise.bias = nn.Parameter(mixer.output.weight.detach()[..., None]), mixer.output.bias
    expected = pointwise(depthwise(nn.functional.pad(x.mT, (3, 0)))).mT
    assert_close(mixer(x)[0], expected, x.dtype)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("row", ROWS)
def test_whole_chunked_and_stepped_agree(row, time):
    mixer, x = make(row), series(2, time)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("row", ROWS)
def test_resets_are_separate_sequences(row):
    mixer = make(row)
    check_resets(mixer, series(2, 17), list(mixer.parameters()))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), row=st.sampled_from(sorted(ROWS)), batch=st.integers(0, 3), time=st.integers(0, 12))
def test_any_chunks_with_any_resets(data, row, batch, time):
    mixer, x = make(row), series(batch, time)
    reset = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * time, max_size=batch * time)), dtype=bool)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    reset = reset.view(batch, time)
    compare(mixer(x, reset=reset), chunked(mixer, x, None, sizes, reset), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("row", ROWS)
def test_no_output_knows_a_later_input(row):
    mixer, x = make(row), series(2, 9)
    y, _ = mixer(x)
    for t in range(9):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, t] != 0).any()


@pytest.mark.parametrize("row", ROWS)
def test_strided_input(row):
    mixer, x = make(row), series(4, 9)
    for view in (x.transpose(0, 1), x[::2, 1::3], x[:1].expand(3, -1, -1)):
        compare(mixer(view), mixer(view.contiguous()), [x], x.dtype)


@pytest.mark.parametrize("row", ROWS)
def test_initial_state_is_where_sequences_begin(row):
    mixer, x = make(row), series(3, 6)
    state = mixer.initial_state(3)
    assert mixer.state_size == state[0].numel()
    compare(mixer(x, state), mixer(x), [x, *mixer.parameters()], x.dtype)
    y, after = mixer(x[:0])
    assert y.shape == (0, 6, D) and after.shape == (0, *state.shape[1:])
    y, after = mixer(x[:, :0], state)
    assert y.shape == (3, 0, D) and torch.equal(after, state)


def test_detach_state_cuts_the_graph_and_keeps_the_values():
    mixer, x = make("mingru"), series(2, 9)
    _, state = mixer(x[:, :5])
    kept = detach_state({"a": (state, None), "b": 3})
    assert kept["b"] == 3 and kept["a"][1] is None and torch.equal(kept["a"][0], state)
    y, _ = mixer(x[:, 5:], kept["a"][0])
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad[:, :5] == 0).all() and (grad[:, 5:] != 0).any()


@pytest.mark.parametrize("row", MINRNNS)
def test_bfloat16_carries_its_state_in_float32(row):
    mixer, x = make(row, torch.bfloat16), series(2, 40, torch.bfloat16)
    y, state = mixer(x)
    assert y.dtype == torch.bfloat16
    assert state.dtype == mixer.initial_state(2).dtype == torch.float32
    pieces, last = chunked(mixer, x, None, [1])
    assert_close(pieces, y, torch.bfloat16)
    assert_close(last, state, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = make(row, torch.float32)(x.float())
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "expected"), [("minlstm", [3.0] * D + [0.0] * 2 * D), ("mingru", [-3.0] * D + [0.0] * D)]
)
def test_forget_bias_leans_the_gates_towards_the_state(name, expected):
    torch.manual_seed(0)
    plain = make_mixer(name, D, {})
    torch.manual_seed(0)
    biased = make_mixer(name, D, {"forget_bias": 3.0})
    assert_close(biased.input.bias - plain.input.bias, torch.tensor(expected), torch.float32)
    assert all(torch.equal(biased.get_parameter(n), p) for n, p in plain.named_parameters() if n != "input.bias")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "x must be", lambda x, state, reset: (x[0], None, None)),
        (ValueError, "x must be", lambda x, state, reset: (x[..., 1:], None, None)),
        (TypeError, "x must be", lambda x, state, reset: (x.tolist(), None, None)),
        (ValueError, "state must be", lambda x, state, reset: (x, state[1:], None)),
        (ValueError, "state must be", lambda x, state, reset: (x, state[..., 1:], None)),
        (TypeError, "state must be", lambda x, state, reset: (x, (state,), None)),
        (ValueError, "reset must be", lambda x, state, reset: (x, state, reset[:, 1:])),
        (ValueError, "reset must be", lambda x, state, reset: (x, state, reset.T)),
        (TypeError, "reset must be", lambda x, state, reset: (x, state, reset.long())),
        (TypeError, "reset must be", lambda x, state, reset: (x, state, [[True]])),
    ],
)
def test_bad_arguments_are_named(row, error, name, change):
    mixer, x = make(row), series(2, 3)
    x, state, reset = change(x, mixer.initial_state(2), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(error, match=rf"{type(mixer).__name__}: {name} .*got"):
        mixer(x, state, reset=reset)


def test_the_table_builds_by_name_and_says_what_there_is():
    for name in ("mingru", "minlstm"):
        made = make_mixer(name, D, {"expansion": 2})
        assert type(made) is MIXERS[name].module and made.hidden == 2 * D
        assert mixer_config(name, {"expansion": 2}) == MIXERS[name].config(expansion=2)
    with pytest.raises(ValueError, match="one of mingru, minlstm, .*got 'nothing'"):
        make_mixer("nothing", D, {})
    with pytest.raises(
        ValueError, match="among expansion, activation, learn_initial_state, forget_bias, got 'normalize'"
    ):
        make_mixer("mingru", D, {"normalize": True})


@pytest.mark.parametrize(
    ("error", "options", "match"),
    [
        (ValueError, {"expansion": 0}, "expansion must be above 0"),
        (ValueError, {"expansion": math.nan}, "expansion must be above 0"),
        (ValueError, {"expansion": math.inf}, "expansion must be above 0"),
        (ValueError, {"expansion": 0.1}, "at least 1, got 0.1 x 5"),
        (ValueError, {"activation": "relu"}, "activation must be one of g.*got 'relu'"),
        (ValueError, {"forget_bias": math.nan}, "forget_bias must be finite, got nan"),
        (TypeError, {"expansion": "2"}, "expansion must be of type float, got '2'"),
        (TypeError, {"expansion": True}, "expansion must be of type float, got True"),
        (TypeError, {"learn_initial_state": 1}, "learn_initial_state must be of type bool, got 1"),
    ],
)
def test_bad_options_are_named(error, options, match):
    with pytest.raises(error, match=match):
        make_mixer("mingru", D, options)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MinGRUConfig().expansion = 2


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float16])
def test_a_learned_state_under_autocast_of_the_other_16_bits(name, model):
    mixer = make_mixer(name, D, {"learn_initial_state": True}).to(model)
    other = torch.float16 if model == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", other):
        y, state = mixer(torch.randn(2, 5, D), reset=torch.ones(2, 5, dtype=torch.bool))
    assert y.dtype == other and state.dtype == torch.float32 and y.isfinite().all()
