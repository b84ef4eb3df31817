"""What MinGRU and MinLSTM compute: against the paper's equations in float64, against nn.GRU and nn.LSTM themselves with
their recurrent weights at zero, and against minGRU-pytorch."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from conftest import TOL
from layers_definition import (
    LENGTHS,
    STACKS,
    B,
    D,
    H,
    T,
    act,
    assert_same,
    data,
    define,
    flat,
    given,
    gradients,
    make,
    resets,
)
from minrnn.layers import MinGRU, MinLSTM


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("cut", [False, True], ids=["uncut", "reset"])
@pytest.mark.parametrize("name", STACKS)
def test_values_and_gradients_are_those_of_the_equations(name, cut, ragged, batch_first):
    rnn = make(name, batch_first=batch_first)
    series, state = data(rnn)
    expected = define(rnn, series, state, LENGTHS if ragged else None, resets() if cut else None)
    output, states = rnn(
        series.transpose(0, 1) if batch_first else series,
        given(rnn, state),
        lengths=LENGTHS if ragged else None,
        reset=resets(batch_first) if cut else None,
    )
    ours = flat(output.transpose(0, 1) if batch_first else output, states)
    assert_same(ours, expected)
    assert_same(gradients(ours, rnn, series, state), gradients(expected, rnn, series, state))


@pytest.mark.parametrize("name", STACKS)
def test_without_hx_sequences_begin_at_zeros_or_at_the_learned_state(name):
    rnn = make(name)
    series, state = data(rnn)
    begin = torch.zeros_like(state)
    if rnn.learn_initial_state:
        learned = [act(p, rnn.activation) for key, p in rnn.named_parameters() if key.startswith("initial")]
        begin = torch.stack(learned)[:, None].expand_as(state)
    ours, expected = flat(*rnn(series, lengths=LENGTHS)), define(rnn, series, begin, LENGTHS)
    assert_same(ours, expected)
    assert_same(gradients(ours, rnn, series), gradients(expected, rnn, series))


# --- nn.GRU and nn.LSTM as oracles: with recurrent weights of zero their gates do not see the state either ---


def without_recurrence(rnn):
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if "hh" in name:
                parameter.zero_()
    return rnn


def packed_and_padded():
    torch.manual_seed(3)
    sequences = [torch.randn(n, D, dtype=torch.float64) for n in (2, 7, 5)]
    return pack_sequence(sequences, enforce_sorted=False)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_mingru_with_negated_gate_is_gru_without_recurrence(num_layers, bidirectional, packed):
    # nn.GRU: h = (1 - z) n + z h. Here z writes: h = (1 - z) h + z n.
    gru = without_recurrence(nn.GRU(D, H, num_layers, bidirectional=bidirectional, dtype=torch.float64))
    ours = MinGRU(D, H, num_layers, bidirectional=bidirectional, activation="tanh", dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            _, keep, candidate = getattr(gru, name).split(H)
            parameter.copy_(torch.cat([-keep, candidate]))
    series = packed_and_padded() if packed else torch.randn(T, B, D, dtype=torch.float64)
    state = torch.randn(num_layers * (2 if bidirectional else 1), B, H, dtype=torch.float64)
    (output, h_n), (expected, expected_n) = ours(series, state), gru(series, state)
    if packed:
        torch.testing.assert_close(output.batch_sizes, expected.batch_sizes)
        torch.testing.assert_close(output.sorted_indices, expected.sorted_indices)
        torch.testing.assert_close(output.unsorted_indices, expected.unsorted_indices)
        output, expected = output.data, expected.data
    assert_same([output, h_n], [expected, expected_n])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_unnormalized_minlstm_carries_the_cell_of_lstm_without_recurrence(bidirectional, packed):
    lstm = without_recurrence(nn.LSTM(D, H, bidirectional=bidirectional, dtype=torch.float64))
    ours = MinLSTM(D, H, bidirectional=bidirectional, activation="tanh", normalize=False, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            into, forget, candidate, _ = getattr(lstm, name).split(H)
            parameter.copy_(torch.cat([forget, into, candidate]))
    series = packed_and_padded() if packed else torch.randn(T, B, D, dtype=torch.float64)
    state = torch.randn(2 if bidirectional else 1, B, H, dtype=torch.float64)
    _, (_, c_n) = ours(series, (state, state))
    _, (_, expected) = lstm(series, (torch.zeros_like(state), state))
    assert_same([c_n], [expected])


# --- minGRU-pytorch as an oracle of minGRU's outputs, and its defects ---


@pytest.mark.parametrize("time", [1, 2, 63])
def test_outputs_are_those_of_mingru_pytorch(time):
    peer = pytest.importorskip("minGRU_pytorch.minGRU").minGRU(D).double()
    ours = MinGRU(D, D, bias=False, batch_first=True, dtype=torch.float64)
    candidate, gate = peer.to_hidden_and_gate.weight.split(D)
    with torch.no_grad():
        ours.weight_ih_l0.copy_(torch.cat([gate, candidate]))
    series = torch.randn(B, time, D, dtype=torch.float64)
    begin = torch.rand(B, 1, D, dtype=torch.float64) + 0.1  # positive: others it cannot take in its parallel form
    assert_same([ours(series)[0]], [peer(series)])
    assert_same([ours(series, begin.transpose(0, 1))[0]], [peer(series, begin)])


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
@pytest.mark.parametrize("value", [-1.5, 0.0])
def test_any_initial_state_gives_finite_gradients_and_one_result_in_every_mode(kind, value):
    rnn = kind(D, H, dtype=torch.float64)
    series = torch.randn(T, B, D, dtype=torch.float64)
    state = torch.full((1, B, H), value, dtype=torch.float64, requires_grad=True)
    whole = flat(*rnn(series, given(rnn, state)))
    assert_same(whole, define(rnn, series, state))
    (grad,) = torch.autograd.grad(whole[0].sum(), state)
    assert grad.isfinite().all() and (grad > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_shut_gates_of_minlstm_share_equally(dtype):
    rnn = MinLSTM(1, H, activation="identity", dtype=dtype)
    with torch.no_grad():
        rnn.weight_ih_l0.zero_()
        rnn.bias_ih_l0.copy_(torch.tensor([-1e4] * (2 * H) + [1.0] * H))
    output, _ = rnn(torch.zeros(3, 1, 1, dtype=dtype))
    assert_same([output[:, 0, 0]], [torch.tensor([0.5, 0.75, 0.875], dtype=dtype)])
    assert all(grad.isfinite().all() for grad in gradients([output], rnn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_error_does_not_grow_with_length(kind, dtype):
    rnn = kind(1, 2, dtype=torch.float64)
    with torch.no_grad():  # exact in every dtype: what is compared is the recurrence alone
        for parameter in rnn.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).mul(4).round().div(4))
    series = torch.randint(-8, 8, (65_536, 1, 1), dtype=torch.float64) / 4
    expected, _ = rnn(series)
    output, _ = rnn.to(dtype)(series.to(dtype))
    torch.testing.assert_close(output[-1000:], expected[-1000:].to(dtype), **TOL[dtype])
