"""One mode of MinGRU and MinLSTM against another: chunks, cells, packed, padded, cut; and what must not leak."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_map

from layers_definition import (
    CAUSAL,
    LENGTHS,
    STACKS,
    B,
    D,
    H,
    T,
    act,
    assert_same,
    at,
    data,
    flat,
    given,
    gradients,
    make,
    resets,
)
from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell
from parity import check_chunks, check_lengths, check_resets


@pytest.mark.parametrize("cut", [False, True], ids=["uncut", "reset"])
@pytest.mark.parametrize("sizes", [[1] * T, [4, 5], [0, 8, 0, 1]], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_chunks_with_carried_state_are_the_whole(name, sizes, cut):
    rnn = make(name)
    series, state = data(rnn)
    marks = resets() if cut else torch.zeros(T, B, dtype=torch.bool)
    whole = flat(*rnn(series, given(rnn, state), reset=marks))
    carried, outputs = given(rnn, state), []
    for chunk, mark in zip(series.split(sizes), marks.split(sizes), strict=True):
        output, carried = rnn(chunk, carried, reset=mark)
        outputs.append(output)
    chunked = flat(torch.cat(outputs), carried)
    assert_same(chunked, whole)
    assert_same(gradients(chunked, rnn, series, state), gradients(whole, rnn, series, state))


@pytest.mark.parametrize("name", ["gru", "gru-identity-no-bias", "lstm", "lstm-plain", "lstm-learned-forget"])
@pytest.mark.parametrize("begin", ["given", "default"])
def test_stepping_a_cell_is_the_layer(name, begin):
    rnn = make(name)
    kind, options = STACKS[name]
    cell = (MinGRUCell if kind is MinGRU else MinLSTMCell)(D, H, dtype=torch.float64, **options)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in rnn.state_dict().items()})
    series, state = data(rnn)
    hx = given(rnn, state) if begin == "given" else None
    whole = flat(*rnn(series, hx))
    carried = None if hx is None else at(hx, 0)
    outputs = []
    for x in series:
        carried = cell(x, carried)
        outputs.append(carried if kind is MinGRU else carried[0])
    final = [carried] if kind is MinGRU else carried
    stepped = [torch.stack(outputs), *(part[None] for part in final)]
    assert_same(stepped, whole)
    inputs = (series, state) if begin == "given" else (series,)
    assert_same(gradients(stepped, cell, *inputs), gradients(whole, rnn, *inputs))


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("name", STACKS)
def test_packed_and_padded_sequences_are_each_alone(name, enforce_sorted):
    rnn = make(name)
    lengths = [9, 5, 1] if enforce_sorted else [1, 9, 5]
    series, state = data(rnn)
    sequences = [series[:n, b] for b, n in enumerate(lengths)]
    alone = [flat(*rnn(x, at(given(rnn, state), (slice(None), b)))) for b, x in enumerate(sequences)]
    outputs, *states = zip(*alone, strict=True)
    expected = [torch.cat(outputs), *(torch.stack(parts, 1) for parts in states)]

    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    output, carried = rnn(packed, given(rnn, state))
    assert (output.sorted_indices is None) == enforce_sorted
    ours = flat(torch.cat(nn.utils.rnn.unpack_sequence(output)), carried)
    assert_same(ours, expected)
    assert_same(gradients(ours, rnn, series, state), gradients(expected, rnn, series, state))

    for dtype in (torch.int32, torch.uint16):
        output, carried = rnn(series, given(rnn, state), lengths=torch.tensor(lengths, dtype=dtype))
        assert_same(flat(torch.cat([output[:n, b] for b, n in enumerate(lengths)]), carried), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_that_cut_nothing_change_no_bit(batch_first, dtype):
    rnn, x = MinGRU(32, 48, 2, batch_first=batch_first, dtype=dtype), torch.randn(64, 16, 32, dtype=dtype)
    batch, time = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    for ours, plain in zip(rnn(x, lengths=[time] * batch), rnn(x), strict=True):
        assert torch.equal(ours, plain) and ours.stride() == plain.stride()


@pytest.mark.parametrize("name", STACKS)
def test_resets_are_separate_sequences(name):
    # A sequence of one batch entry that is cut at 3 and 7: the outer segments see hx, each at its own end.
    rnn = make(name)
    series, state = data(rnn, batch=1)
    marks = torch.zeros(T, 1, dtype=torch.bool)
    marks[[3, 7]] = True
    whole = flat(*rnn(series, given(rnn, state), reset=marks))

    fresh = torch.zeros_like(state)
    if rnn.learn_initial_state:
        fresh = torch.stack([act(p, rnn.activation) for k, p in rnn.named_parameters() if k.startswith("initial")])[
            :, None
        ]
    backward = torch.arange(len(state)) % 2 == 1 if rnn.bidirectional else torch.zeros(len(state), dtype=torch.bool)
    backward = backward[:, None, None]
    segments = series.split([3, 4, 2])
    begins = [torch.where(backward, fresh, state), fresh, torch.where(backward, state, fresh)]
    results = [flat(*rnn(x, given(rnn, h))) for x, h in zip(segments, begins, strict=True)]
    outputs, *states = zip(*results, strict=True)
    separate = [torch.cat(outputs), *(torch.where(backward, parts[0], parts[-1]) for parts in states)]
    assert_same(separate, whole)
    assert_same(gradients(separate, rnn, series, state), gradients(whole, rnn, series, state))


@pytest.mark.parametrize("name", STACKS)
def test_no_gradient_crosses_a_cut(name):
    rnn = make(name)
    series, state = data(rnn)
    marks = torch.zeros(T, B, dtype=torch.bool)
    marks[[3, 7]] = True
    output, _ = rnn(series, given(rnn, state), reset=marks)
    by_series, by_state = torch.autograd.grad(output[3:7].sum(), [series, state])
    assert (by_series[:3] == 0).all() and (by_series[7:] == 0).all() and (by_series[3:7] != 0).any(-1).all()
    assert (by_state == 0).all()


# --- what padding and broken sequences hold stays there ---


@pytest.mark.parametrize("name", STACKS)
def test_nothing_in_the_padding_changes_anything(name):
    rnn = make(name)
    series, state = data(rnn)
    padding = torch.arange(T)[:, None] >= torch.tensor(LENGTHS)
    results = []
    for filling in (0.0, float("nan"), float("inf")):
        filled = series.detach().masked_fill(padding[..., None], filling).requires_grad_()
        ours = flat(*rnn(filled, given(rnn, state), lengths=LENGTHS, reset=resets()))
        results.append((ours, gradients(ours, rnn, filled, state)))
    for ours, grads in results:
        assert (ours[0][padding] == 0).all() and (grads[0][padding] == 0).all()
        for mine, clean in zip([*ours, *grads], [*results[0][0], *results[0][1]], strict=True):
            assert torch.equal(mine, clean)


@pytest.mark.parametrize("name", STACKS)
def test_a_nan_stays_in_its_sequence_and_ends_at_a_reset(name):
    rnn = make(name)
    series, state = data(rnn)
    broken = series.detach().clone()
    broken[4, 1] = float("nan")
    marks = torch.zeros(T, B, dtype=torch.bool)
    marks[[2, 6]] = True
    output, states = rnn(broken, given(rnn, state), reset=marks)
    clean, clean_states = rnn(series, given(rnn, state), reset=marks)
    affected = torch.zeros(T, B, dtype=torch.bool)
    affected[2 if rnn.bidirectional else 4 : 6, 1] = True
    assert torch.equal(output[~affected], clean[~affected]) and output[4, 1].isnan().any()
    for mine, other in zip(flat(output, states)[1:], flat(clean, clean_states)[1:], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_a_nan_stays_in_its_channel(kind):
    rnn = kind(H, H, dtype=torch.float64)
    with torch.no_grad():
        rnn.bias_ih_l0[0] = float("nan")
    output, _ = rnn(torch.randn(T, B, H, dtype=torch.float64))
    assert output[..., 0].isnan().all() and output[..., 1:].isfinite().all()


# --- rows of the parity harness ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("time", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("name", ["gru", "lstm-learned-forget", "gru-bi-2-learned"])
def test_parity(name, time, dtype):
    rnn = make(name, batch_first=True).to(dtype)

    def run(x, state, *, reset=None, lengths=None):  # the harness keeps states batch first
        hx = None if state is None else tree_map(lambda s: s.transpose(0, 1), state)
        output, states = rnn(x, hx, reset=reset, lengths=lengths)
        return output, tree_map(lambda s: s.transpose(0, 1), states)

    series, state = torch.randn(5, time, D, dtype=dtype, requires_grad=True), torch.randn(len(rnn.all_weights), 5, H)
    state = tree_map(lambda s: s.transpose(0, 1), given(rnn, state.to(dtype).requires_grad_()))
    parameters = list(rnn.parameters())
    check_lengths(run, series, state, parameters)
    if name in CAUSAL:
        check_chunks(run, series, state, parameters)
        check_resets(run, series, parameters)
