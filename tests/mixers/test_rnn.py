"""GRU and LSTM: against torch.nn's layers and cells, against their equations, and mode against mode."""

import pytest
import torch
from torch import nn

from conftest import assert_close
from minrnn.mixers import GRULoop, GRUState, LSTMLoop, LSTMState, make_mixer
from parity import check_chunks, check_resets, chunked, compare

D = 5
NAMES = ("gru", "lstm", "gru_loop", "lstm_loop")
ROWS = [("gru", 1.0), ("lstm", 0.6), ("gru_loop", 0.6), ("lstm_loop", 1.0)]
LAYERS = {"gru": nn.GRU, "lstm": nn.LSTM}


def make(name, expansion=1.0, dtype=torch.float64):
    torch.manual_seed(0)
    return make_mixer(name, D, {"expansion": expansion}).to(dtype)


def series(batch, time, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=torch.float64))
    return type(state)(*(part.requires_grad_() for part in state))


def define(name, mixer, x, state, reset):
    """The equations of the layers' documentation and of Feng et al. (2024), one step and one sequence at a time."""

    def sigmoid(v):
        return 1 / (1 + torch.exp(-v))

    own, size, rows = mixer.rnn, mixer.hidden, []
    lasts = []
    for b in range(x.shape[0]):
        before = [part[b] for part in state]
        for t in range(x.shape[1]):
            before = [torch.zeros_like(part) for part in before] if reset[b, t] else before
            h, v = before[0], x[b, t]
            if name == "gru_loop":
                gates = own.gates.weight @ torch.cat([v, h]) + own.gates.bias
                z, r = sigmoid(gates[:size]), sigmoid(gates[size:])
                before = [
                    (1 - z) * h + z * torch.tanh(own.candidate.weight @ torch.cat([v, r * h]) + own.candidate.bias)
                ]
            elif name == "gru":
                r, z, n = (own.weight_ih_l0 @ v + own.bias_ih_l0).view(3, size)
                r_h, z_h, n_h = (own.weight_hh_l0 @ h + own.bias_hh_l0).view(3, size)
                z = sigmoid(z + z_h)
                before = [z * h + (1 - z) * torch.tanh(n + sigmoid(r + r_h) * n_h)]
            else:
                if name == "lstm":
                    gates = own.weight_ih_l0 @ v + own.bias_ih_l0 + own.weight_hh_l0 @ h + own.bias_hh_l0
                else:
                    gates = own.gates.weight @ torch.cat([v, h]) + own.gates.bias
                i, f, g, o = gates.view(4, size)
                c = sigmoid(f) * before[1] + sigmoid(i) * torch.tanh(g)
                before = [sigmoid(o) * torch.tanh(c), c]
            rows.append(mixer.output(before[0]))
        lasts.append(before)
    return torch.stack(rows).view_as(x), type(state)(*(torch.stack(parts) for parts in zip(*lasts, strict=True)))


@pytest.mark.parametrize(("name", "expansion"), ROWS)
def test_every_step_is_the_equation(name, expansion):
    mixer, x, reset = make(name, expansion), series(3, 9), torch.rand(3, 9) < 0.3
    state = some_state(mixer, 3)
    expected = define(name, mixer, x, state, reset)
    compare(mixer(x, state, reset=reset), expected, [x, *mixer.parameters(), *state], x.dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_the_mixer_is_torchs_layer(name):
    mixer, x = make(name), series(3, 20)
    state = some_state(mixer, 3)
    before = tuple(part[None] for part in state)
    y, after = mixer.rnn(x, before if name == "lstm" else before[0])
    after = after if name == "lstm" else (after,)
    expected = y, type(state)(*(part[0] for part in after))
    compare(mixer(x, state), expected, [x, *mixer.parameters(), *state], x.dtype)
    torch.manual_seed(0)
    for mine, theirs in zip(mixer.rnn.parameters(), LAYERS[name](D, D).parameters(), strict=True):
        assert torch.equal(mine, theirs.double())


def test_the_lstm_loop_is_torchs_cell():
    loop, cell = LSTMLoop(D, 7).double(), nn.LSTMCell(D, 7).double()
    with torch.no_grad():
        loop.gates.weight.copy_(torch.cat([cell.weight_ih, cell.weight_hh], 1))
        loop.gates.bias.copy_(cell.bias_ih + cell.bias_hh)
    x, state, outputs = series(3, 12), None, []
    for x_t in x.unbind(1):
        state = cell(x_t, state)
        outputs.append(state[0])
    compare(loop(x), (torch.stack(outputs, 1), LSTMState(*state)), [x], x.dtype)


def test_the_gru_loop_is_torchs_cell_where_the_two_definitions_meet():
    """They differ in what z means, and in r only where U_n is not diagonal or has a bias."""
    loop, cell, diagonal = GRULoop(D, 7).double(), nn.GRUCell(D, 7).double(), torch.randn(7).double()
    with torch.no_grad():
        cell.weight_hh[14:], cell.bias_hh[14:] = diagonal.diag(), 0
        (r_x, z_x, n_x), (r_h, z_h, n_h) = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
        r, z, n = (cell.bias_ih + cell.bias_hh).chunk(3)
        loop.gates.weight.copy_(torch.cat([torch.cat([-z_x, -z_h], 1), torch.cat([r_x, r_h], 1)]))
        loop.gates.bias.copy_(torch.cat([-z, r]))
        loop.candidate.weight.copy_(torch.cat([n_x, n_h], 1))
        loop.candidate.bias.copy_(n)
    x, h, outputs = series(3, 12), None, []
    for x_t in x.unbind(1):
        h = cell(x_t, h)
        outputs.append(h)
    compare(loop(x), (torch.stack(outputs, 1), GRUState(h)), [x], x.dtype)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize(("name", "expansion"), ROWS)
def test_whole_chunked_and_stepped_agree(name, expansion, time):
    mixer, x = make(name, expansion), series(2, time)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("time", [0, 1, 2, 17])
@pytest.mark.parametrize(("name", "expansion"), ROWS)
def test_resets_are_separate_sequences(name, expansion, time):
    mixer = make(name, expansion)
    check_resets(mixer, series(2, time), list(mixer.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_float32_over_many_steps_with_resets_of_every_row(name):
    mixer, exact, x = make(name, dtype=torch.float32), make(name), series(3, 200, torch.float32)
    reset = torch.rand(3, 200) < torch.tensor([[0.0], [0.01], [0.9]])
    y, state = mixer(x, reset=reset)
    expected, last = exact(x.double(), reset=reset)
    assert_close(y, expected, torch.float32)
    for mine, wanted in zip(state, last, strict=True):
        assert_close(mine, wanted, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_spoiled_state_ends_at_a_reset(name):
    """In its values and in gradients, for the rows with a reset; the others carry it on."""
    mixer, x, reset = make(name), series(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    state = some_state(mixer, 2)
    spoiled = type(state)(*(torch.full_like(part, torch.nan).requires_grad_() for part in state))
    for step in (0, 3):
        reset[0] = False
        reset[0, step] = True
        y, last = mixer(x, spoiled, reset=reset)
        assert_close(y[0, step:], mixer(x[:1, step:])[0][0], x.dtype)
        assert not any(part[0].isnan().any() for part in last)
        assert y[1].isnan().all() and y[0, :step].isnan().all()
        into_x, *into_state = torch.autograd.grad(y[0, step:].sum(), [x, *spoiled])
        assert not into_x[0, step:].isnan().any()
        assert step > 0 or all((grad[0] == 0).all() for grad in into_state)


@pytest.mark.parametrize(("name", "expansion"), ROWS)
def test_sixteen_bits_carry_their_state_in_float32(name, expansion):
    mixer, x = make(name, expansion, torch.bfloat16), series(2, 40, torch.bfloat16)
    y, state = mixer(x)
    assert y.dtype == torch.bfloat16
    assert {part.dtype for part in (*state, *mixer.initial_state(2))} == {torch.float32}
    y.sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in mixer.parameters())
    pieces, last = chunked(mixer, x, None, [1])
    assert_close(pieces, y, torch.bfloat16)
    exact = make(name, expansion)
    with torch.no_grad():
        for mine, wanted in zip(mixer.parameters(), exact.parameters(), strict=True):
            wanted.copy_(mine)
    expected, wanted = exact(x.double())
    assert_close(y, expected, torch.bfloat16)
    for part, other in zip(last, wanted, strict=True):
        assert_close(part, other, torch.bfloat16 if "loop" in name else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            y, state = make(name, expansion, torch.float32)(x.to(dtype))
            assert y.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    mixer = make_mixer(name, 10, {"expansion": 1.7})
    parts = 2 if "lstm" in name else 1
    assert mixer.state_size == 17 * parts and [p.shape for p in mixer.initial_state(3)] == [(3, 17)] * parts
    assert mixer.output.weight.shape == (10, 17)
    assert isinstance(make(name).output, nn.Identity)
    assert make(name).tuning() == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "state.h must be", lambda state: type(state)(*(part[1:] for part in state))),
        (ValueError, "state.h must be", lambda state: type(state)(*(part[:, 1:] for part in state))),
        (ValueError, "state must be of type (GRU|LSTM)State, .*got Tensor", lambda state: state[0]),
        (TypeError, "state.h must be a torch.Tensor, got list", lambda state: state._replace(h=[])),
    ],
)
def test_a_state_that_does_not_fit_is_named(name, error, match, change):
    mixer = make(name)
    with pytest.raises(error, match=rf"{type(mixer).__name__}: {match}"):
        mixer(series(2, 3), change(mixer.initial_state(2)))


def test_a_state_of_the_other_kind_is_named():
    with pytest.raises(ValueError, match="GRUMixer: state must be of type GRUState, .*got LSTMState"):
        make("gru")(series(2, 3), make("lstm").initial_state(2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("error", "expansion", "match"),
    [
        (ValueError, 0.0, "expansion must be above 0 and finite, got 0.0"),
        (ValueError, float("nan"), "expansion must be above 0 and finite, got nan"),
        (ValueError, float("inf"), "expansion must be above 0 and finite, got inf"),
        (ValueError, 0.1, "expansion x width must be at least 1, got 0.1 x 5"),
        (TypeError, "1", "expansion must be of type float, got '1'"),
    ],
)
def test_bad_options_are_named(name, error, expansion, match):
    with pytest.raises(error, match=match):
        make_mixer(name, D, {"expansion": expansion})
