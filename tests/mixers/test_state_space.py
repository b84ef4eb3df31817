"""S4D, S4 and the S4 block around them: mode against mode, their lazy state, 16 bits, and what they refuse."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from conftest import assert_close
from minrnn.mixers.contract import Tuning, detach_state
from minrnn.mixers.inner import INNER, make_inner
from minrnn.mixers.s4_block import S4Block, S4BlockConfig, S4DBlockConfig
from parity import check_chunks, check_resets, chunked, compare

D = 5
ROWS = {
    "s4d": lambda: make_inner("s4d", D, {"state": 8}),
    "s4d-bilinear": lambda: make_inner("s4d", D, {"state": 6, "init": "legs", "discretization": "bilinear"}),
    "s4": lambda: make_inner("s4", D, {"state": 8}),
    "block-s4d": lambda: S4Block(D, S4DBlockConfig(inner_options={"state": 4})),
    "block-s4": lambda: S4Block(D, S4BlockConfig(inner_options={"state": 4})),
}
LAYERS = [row for row in ROWS if not row.startswith("block")]


def make(row, dtype=torch.float64):
    torch.manual_seed(0)
    return ROWS[row]().to(dtype)


def series(batch, time, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


def some_state(mixer, batch, dtype=torch.float64):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=dtype))
    return tree_map(lambda s: s.requires_grad_(), state)


@pytest.fixture(params=["usual", "convolution"])
def mode(request, monkeypatch):
    """With few steps by the recurrence, as usual; and with all but single steps a convolution by powers."""
    if request.param == "convolution":
        monkeypatch.setattr("minrnn.mixers.s4d.DiagonalSystem.few", 0)
        monkeypatch.setattr("minrnn.mixers.s4.LowRankSystem.few", 0)
        monkeypatch.setattr("minrnn.mixers.state_space.CARRIED", 1)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("row", ROWS)
def test_whole_chunked_and_stepped_agree(row, time, mode):
    mixer, x = make(row), series(2, time)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("row", LAYERS)
def test_how_many_sequences_there_are_changes_no_output(row):
    """One alone, in steps; among others, by a response that is followed in steps, then by one from powers."""
    mixer = make(row)
    few = mixer.discretize().few
    for time in (few // 4, few):
        x = series(few + 1, time)
        check = [x, *mixer.parameters()]
        y, state = mixer(x)
        alone = [mixer(x[:1]), mixer(x[1:])]
        joined = torch.cat([y for y, _ in alone]), torch.cat([each.tensor for _, each in alone])
        compare((y, state.tensor), joined, check, x.dtype)


@pytest.mark.parametrize("row", ROWS)
def test_resets_are_separate_sequences(row, mode):
    mixer = make(row)
    for time in (17, 50):
        check_resets(mixer, series(2, time), list(mixer.parameters()))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), row=st.sampled_from(LAYERS), batch=st.integers(0, 3), time=st.integers(0, 40))
def test_any_chunks_with_any_resets(data, row, batch, time):
    mixer, x = make(row), series(batch, time)
    often = data.draw(st.sampled_from([0.02, 0.3]))
    reset = torch.rand(batch, time) < often
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    compare(mixer(x, reset=reset), chunked(mixer, x, None, sizes, reset), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("row", ROWS)
def test_float32(row):
    mixer, x = make(row, torch.float32), series(2, 200, torch.float32)
    exact, _ = copy.deepcopy(mixer).double()(x.double())
    y, state = mixer(x)
    assert_close(y, exact, torch.float32)
    pieces, last = chunked(mixer, x, None, [1])
    assert_close(pieces, y, torch.float32)
    assert_close(last.tensor, state.tensor, torch.float32)
    assert state.tensor.dtype == last.tensor.dtype == torch.complex64


@pytest.mark.parametrize("row", ROWS)
def test_no_output_knows_a_later_input(row):
    mixer, x = make(row), series(2, 40)
    y, _ = mixer(x)
    for t in (0, 1, 17, 38, 39):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert_close(grad[:, t + 1 :], torch.zeros_like(grad[:, t + 1 :]), x.dtype)
        assert (grad[:, t].abs() > 1e-6).any()


@pytest.mark.parametrize("row", ROWS)
def test_strided_input(row):
    mixer, x = make(row), series(4, 40)
    for view in (x.transpose(0, 1), x[::2, 1::3], x[:1].expand(3, -1, -1)):
        compare(mixer(view), mixer(view.contiguous()), [x], x.dtype)


@pytest.mark.parametrize("row", ROWS)
def test_initial_state_is_where_sequences_begin(row):
    mixer, x = make(row), series(3, 40)
    state = mixer.initial_state(3)
    assert mixer.state_size == 2 * state.tensor[0].numel()
    zeros = tree_map(lambda s: s.clone(), state)
    for given_state in (state, zeros):
        compare(mixer(x, given_state), mixer(x), [x, *mixer.parameters()], x.dtype)
    y, after = mixer(x[:0])
    assert y.shape == (0, 40, D) and after.tensor.shape == (0, *state.shape[1:])
    y, after = mixer(x[:, :0], zeros)
    assert y.shape == (3, 0, D) and torch.equal(after.tensor, zeros.tensor)


@pytest.mark.parametrize("row", LAYERS)
def test_the_state_is_formed_when_it_is_looked_at(row, monkeypatch):
    mixer, x = make(row), series(2, 50)
    formed = []
    system = type(mixer.discretize())
    gather = system.gather
    monkeypatch.setattr(system, "gather", lambda *arguments: formed.append(1) or gather(*arguments))
    y, state = mixer(x)
    y.sum().backward()
    assert not formed
    leaves = tree_leaves(state)
    assert formed == [1] and tree_leaves(state)[0] is leaves[0] is state.tensor and formed == [1]
    assert torch.equal(pickle.loads(pickle.dumps(tree_map(torch.detach, state))).tensor, leaves[0])


@pytest.mark.parametrize("row", LAYERS)
def test_a_state_is_of_the_parameters_and_the_inputs_of_its_call(row):
    mixer, x = make(row), series(2, 50)
    with torch.no_grad():
        expected = mixer(x)[1].tensor
        _, state = mixer(x)
        for parameter in mixer.parameters():
            parameter.mul_(0.9)
    assert_close(state.tensor, expected, torch.float64)
    assert not state.tensor.requires_grad
    carried = detach_state(mixer(x, tree_map(lambda s: s, state))[1])
    assert carried.tensor.grad_fn is None
    buffer = x.detach().clone()
    _, state = mixer(buffer)
    buffer.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = state.tensor
    for mode in (torch.inference_mode, torch.no_grad, contextlib.nullcontext):
        mixer.requires_grad_(mode is not contextlib.nullcontext)  # of which nothing is recorded
        with mode():
            buffer = x.detach().clone()
            _, state = mixer(buffer)
            expected = mixer(buffer)[1].tensor
            buffer.numpy()[:] = 0  # unseen by the tensor's version
        assert_close(state.tensor, expected, torch.float64)


@pytest.mark.parametrize("row", LAYERS)
def test_a_state_looked_at_in_inference_mode_keeps_its_graph(row):
    mixer, x = make(row), series(2, 50)
    expected, looked_at = mixer(x), mixer(x)
    with torch.inference_mode():
        assert looked_at[1].tensor.isfinite().all()
    inputs = [x, *mixer.parameters()]
    compare(mixer(x, looked_at[1]), mixer(x, expected[1]), inputs, x.dtype)
    compare(looked_at, expected, inputs, x.dtype)


@pytest.mark.parametrize("row", LAYERS)
def test_compiled_as_one_graph(row):
    mixer, x = make(row), series(2, 40)
    torch.compiler.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    inputs = [x, *mixer.parameters()]
    compare(compiled(x), mixer(x), inputs, x.dtype)
    compare(compiled(x, compiled(x)[1]), mixer(x, mixer(x)[1]), inputs, x.dtype)
    with torch.no_grad():  # a state of the layer as it is, formed
        state = tree_map(lambda s: s, mixer(x)[1])
        assert_close(compiled(x[:, :1], state)[0], mixer(x[:, :1], state)[0], x.dtype)


@pytest.mark.parametrize("row", ROWS)
def test_16_bits(row):
    mixer, x = make(row, torch.bfloat16), series(2, 50, torch.bfloat16)
    y, state = mixer(x)
    assert y.dtype == torch.bfloat16
    assert state.tensor.dtype == mixer.initial_state(2).tensor.dtype == torch.complex64
    pieces, last = chunked(mixer, x, None, [1, 30])
    assert_close(pieces, y, torch.bfloat16)
    assert_close(last.tensor, state.tensor, torch.complex64)
    kept = {name for name, asks in mixer.tuning().items() if asks.keep_float32}
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == kept
    plain = make(row, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = plain(x.float())
        narrow, _ = plain(x)
        formed = state.tensor
    assert narrow.dtype == torch.bfloat16
    assert y.dtype == (torch.bfloat16 if row.startswith("block") else torch.float32)
    assert_close(formed, plain(x.float())[1].tensor, torch.complex64)


@pytest.mark.parametrize(
    ("row", "slow"),
    [
        ("s4d", {"log_step", "log_decay", "frequency"}),
        ("s4", {"log_step", "log_decay", "frequency", "P", "B"}),
    ],
)
def test_steps_and_transition_learn_slowly_and_do_not_decay(row, slow):
    asked = make(row).tuning()
    assert {name for name, asks in asked.items() if asks == Tuning(1.0, 1e-3, False, True)} == slow
    assert set(asked) - slow == {"C", "D"}
    assert make_inner("s4", D, {"lr_limit": 5e-4}).tuning()["B"].lr_limit == 5e-4
    block = make(f"block-{row}")
    assert block.tuning() == {f"inner.{name}": asks for name, asks in asked.items()}
    assert set(block.tuning()) == {name for name, _ in block.named_parameters() if not name.startswith("output")}


@pytest.mark.parametrize("name", ["s4d", "s4", "s6"])
def test_the_block_is_its_equation(name):
    torch.manual_seed(0)
    block, x = S4Block(D, S4BlockConfig(name, {"state": 4}, dropout=0.5)).double(), series(2, 9)
    u, v = block.output(F.gelu(block.inner(x)[0])).chunk(2, -1)
    compare(block.eval()(x), (u * v.sigmoid(), block.inner(x)[1]), [x, *block.parameters()], x.dtype)
    block.train()
    assert not torch.equal(block(x)[0], block(x)[0])


@pytest.mark.parametrize("name", INNER)
def test_the_block_goes_around_any_inner_layer(name):
    torch.manual_seed(0)
    block, x = S4Block(D, S4BlockConfig(name)).double(), series(2, 9)
    check_chunks(block, x, None, list(block.parameters()))
    with pytest.raises(ValueError, match="^S4Block: x must be .*got"):
        block(x[..., 1:])


@pytest.mark.parametrize("row", LAYERS)
@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "x must be", lambda x, state, reset: (x[0], None, None)),
        (ValueError, "x must be", lambda x, state, reset: (x[..., 1:], None, None)),
        (TypeError, "x must be", lambda x, state, reset: (x.tolist(), None, None)),
        (ValueError, "state must be", lambda x, state, reset: (x, tree_map(lambda s: s[1:], state), None)),
        (ValueError, "state must be", lambda x, state, reset: (x, tree_map(lambda s: s[..., 1:], state), None)),
        (ValueError, "state must be torch.complex128,", lambda x, state, reset: (x, tree_map(torch.real, state), None)),
        (
            ValueError,
            "state must be torch.complex128,",
            lambda x, state, reset: (x, tree_map(lambda s: s.to(torch.complex64), state), None),
        ),
        (ValueError, "state must be", lambda x, state, reset: (x, state.tensor, None)),
        (ValueError, "state must be", lambda x, state, reset: (x, (state,), None)),
        (TypeError, "state must be", lambda x, state, reset: (x, tree_map(lambda s: s.tolist(), state), None)),
        (ValueError, "reset must be", lambda x, state, reset: (x, state, reset[:, 1:])),
        (TypeError, "reset must be", lambda x, state, reset: (x, state, reset.long())),
    ],
)
def test_bad_arguments_are_named(row, error, name, change):
    mixer, x = make(row), series(2, 3)
    x, state, reset = change(x, mixer.initial_state(2), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(error, match=rf"{type(mixer).__name__}: {name} .*got"):
        mixer(x, state, reset=reset)


@pytest.mark.parametrize(
    ("error", "options", "match"),
    [
        (ValueError, {"inner": "s5"}, "inner layer: name must be one of s4d, s4.*, got 's5'"),
        (ValueError, {"inner_options": {"init": "lin"}}, "inner layer: options of s4 must be among state.*got 'init'"),
        (ValueError, {"inner_options": {"state": 1}}, "S4Config: state must be even"),
        (ValueError, {"dropout": 1.0}, r"S4BlockConfig: dropout must be in \[0, 1\), got 1.0"),
        (ValueError, {"dropout": math.nan}, "dropout must be in"),
        (TypeError, {"inner_options": []}, "S4BlockConfig: inner_options must be of type dict"),
    ],
)
def test_bad_options_are_named(error, options, match):
    with pytest.raises(error, match=match):
        S4BlockConfig(**options)
