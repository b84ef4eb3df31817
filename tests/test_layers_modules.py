"""MinGRU, MinLSTM and their cells as modules: how parameters begin, copies, files, devices, dropout, unusual shapes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from conftest import TOL
from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

D, H, B, T = 3, 4, 2, 5
ALL = [MinGRU, MinLSTM, MinGRUCell, MinLSTMCell]
STACKS = [MinGRU, MinLSTM]


def results(module):
    """Everything that a module returns for one fixed input."""
    torch.manual_seed(5)
    x = torch.randn(T, B, D) if isinstance(module, tuple(STACKS)) else torch.randn(B, D)
    return torch.utils._pytree.tree_leaves(module(x))


def assert_equal(ours, theirs):
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_parameters_begin_as_those_of_linear(kind):
    torch.manual_seed(1)
    ours = kind(D, H)
    torch.manual_seed(1)
    linear = nn.Linear(D, H * (2 if "GRU" in kind.__name__ else 3))
    for mine, other in zip(ours.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **TOL[mine.dtype])


@pytest.mark.parametrize("kind", [MinLSTM, MinLSTMCell])
def test_forget_bias_is_added_to_the_forget_gates_bias_alone(kind):
    torch.manual_seed(1)
    default = kind(D, H)
    torch.manual_seed(1)
    shifted = kind(D, H, forget_bias=3.0)
    for (name, mine), other in zip(shifted.named_parameters(), default.parameters(), strict=True):
        offset = torch.zeros_like(mine)
        if "bias" in name:
            offset[:H] = 3
        torch.testing.assert_close(mine, other + offset, **TOL[mine.dtype])


@pytest.mark.parametrize("kind", STACKS)
def test_initial_states_are_learned_per_layer_and_direction(kind):
    rnn = kind(D, 2000, 2, bidirectional=True, learn_initial_state=True)
    learned = [name for name, _ in rnn.named_parameters() if name.startswith("initial")]
    assert learned == ["initial_l0", "initial_l0_reverse", "initial_l1", "initial_l1_reverse"]
    assert 0.9 < rnn.initial_l1.std() < 1.1  # drawn from N(0, 1)
    _, states = rnn(torch.randn(0, B, D))
    for state in states if kind is MinLSTM else (states,):
        assert (state > 0).all()  # and passed through g


@pytest.mark.parametrize("kind", ALL)
def test_copies_give_the_same_results(kind, tmp_path):
    module = kind(D, H, learn_initial_state=True)
    expected = results(module)
    assert_equal(results(copy.deepcopy(module)), expected)
    assert_equal(results(pickle.loads(pickle.dumps(module))), expected)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other = kind(D, H, learn_initial_state=True)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_equal(results(other), expected)


@pytest.mark.parametrize("kind", ALL)
def test_meta_device(kind):
    module = kind(D, H, device="meta", dtype=torch.float64, learn_initial_state=True)
    assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
    x = torch.empty(*((T, B, D) if kind in STACKS else (B, D)), device="meta", dtype=torch.float64)
    output = module(x)
    assert (output if isinstance(output, torch.Tensor) else output[0]).is_meta
    module = module.to_empty(device="cpu").float()
    for parameter in module.parameters():
        nn.init.constant_(parameter, float("nan"))
    module.reset_parameters()
    assert all(result.isfinite().all() for result in results(module))
    torch.nn.utils.skip_init(kind, D, H)


def weight_name(module):
    return "weight_ih_l0" if isinstance(module, tuple(STACKS)) else "weight_ih"


@pytest.mark.parametrize("kind", ALL)
def test_parametrisations_are_computed_once_a_forward(kind):
    class Doubled(nn.Module):
        calls = 0

        def forward(self, weight):
            Doubled.calls += 1
            return 2 * weight

    module = kind(D, H)
    name = weight_name(module)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        getattr(expected, name).mul_(2)
    parametrize.register_parametrization(module, name, Doubled())
    Doubled.calls = 0
    assert_equal(results(module), results(expected))
    assert Doubled.calls == 1
    sum(result.sum() for result in results(module)).backward()
    assert module.parametrizations[name].original.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ALL)
def test_weight_norm(kind):
    module = kind(D, H)
    expected = results(module)
    nn.utils.parametrizations.weight_norm(module, weight_name(module))
    for mine, other in zip(results(module), expected, strict=True):
        torch.testing.assert_close(mine, other, **TOL[mine.dtype])


@pytest.mark.parametrize("kind", STACKS)
def test_dropout_lies_between_layers_and_only_in_training(kind):
    torch.manual_seed(0)
    rnn = kind(D, H, 2, dropout=0.5)
    first, second = kind(D, H), kind(H, H)
    first.load_state_dict({k: v for k, v in rnn.state_dict().items() if "_l0" in k})
    second.load_state_dict({k.replace("_l1", "_l0"): v for k, v in rnn.state_dict().items() if "_l1" in k})
    x = torch.randn(T, B, D)
    for rnn_mode in (rnn.train(), rnn.eval()):
        torch.manual_seed(7)
        output, _ = rnn_mode(x)
        torch.manual_seed(7)
        expected, _ = second(nn.functional.dropout(first(x)[0], 0.5, rnn_mode.training))
        assert torch.equal(output, expected)


@pytest.mark.parametrize("kind", STACKS)
def test_a_seed_fixes_dropout_bit_by_bit(kind):
    """Ten times the same, gradients too, while PyTorch is asked for deterministic algorithms."""
    rnn, x = kind(D, H, 3, dropout=0.5, bidirectional=True), torch.randn(T, B, D)
    torch.use_deterministic_algorithms(True)
    first = None
    for _ in range(10):
        torch.manual_seed(7)
        output = rnn(x)[0]
        found = [output, *torch.autograd.grad(output.square().sum(), list(rnn.parameters()))]
        first = first or found
        assert_equal(found, first)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize(("time", "batch", "hidden"), [(0, 2, 4), (5, 0, 4), (0, 0, 1), (1, 1, 1), (7, 3, 1)])
def test_any_size(kind, time, batch, hidden, bidirectional):
    rnn = kind(D, hidden, 2, bidirectional=bidirectional)
    directions = 2 if bidirectional else 1
    x = torch.randn(time, batch, D, requires_grad=True)
    state = torch.randn(2 * directions, batch, hidden, requires_grad=True)
    for lengths in (None, [time] * batch):
        output, states = rnn(x, state if kind is MinGRU else (state, state), lengths=lengths)
        assert output.shape == (time, batch, directions * hidden)
        carried = states if kind is MinGRU else states[1]
        assert carried.shape == state.shape
        if time == 0:
            assert torch.equal(carried, state)
        (output.sum() + carried.sum()).backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("kind", STACKS)
def test_a_million_steps(kind):
    rnn = kind(1, 1)
    x = torch.randn(1_000_000, 1, 1, requires_grad=True)
    output, _ = rnn(x)
    output.mean().backward()
    assert output.isfinite().all() and x.grad.isfinite().all()


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every second": lambda x: torch.stack([x, x.neg()], 1).flatten(0, 1)[::2],
    "padded channels": lambda x: nn.functional.pad(x, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_any_strides(kind, batch_first, layout):
    rnn = kind(D, H, 2, batch_first=batch_first, bidirectional=True)
    x = torch.randn(T, B, D)
    strided = LAYOUTS[layout](x)
    assert strided.stride() != x.stride() and torch.equal(strided, x)
    for mine, other in zip(rnn(strided)[0], rnn(x)[0], strict=True):
        torch.testing.assert_close(mine, other, **TOL[x.dtype])


@pytest.mark.parametrize("kind", STACKS)
def test_expanded_input_and_state(kind):
    rnn = kind(D, H)
    x, state = torch.randn(T, 1, D), torch.randn(1, 1, H).expand(1, B, H)
    hx = state if kind is MinGRU else (state, state)
    whole = state.clone() if kind is MinGRU else (state.clone(), state.clone())
    torch.testing.assert_close(rnn(x.expand(T, B, D), hx)[0], rnn(x.repeat(1, B, 1), whole)[0], **TOL[x.dtype])


@pytest.mark.parametrize("kind", [MinLSTM, MinLSTMCell])
def test_states_of_minlstm_do_not_share_memory(kind):
    module = kind(D, H)
    *_, h, c = results(module)
    before = c.clone()
    h.data.zero_()
    assert torch.equal(c, before)


def test_h_0_of_minlstm_is_not_used():
    rnn = MinLSTM(D, H)
    x, c_0 = torch.randn(T, B, D), torch.randn(1, B, H)
    assert_equal([rnn(x, (torch.randn(1, B, H), c_0))[0]], [rnn(x, (torch.zeros(1, B, H), c_0))[0]])


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_lengths_of_any_kind(kind, dtype):
    rnn, x = kind(D, H, bidirectional=True), torch.randn(T, B, D)
    expected = torch.utils._pytree.tree_leaves(rnn(x, lengths=[5, 2]))
    for lengths in (torch.tensor([5, 2], dtype=dtype), (5, 2), torch.tensor([5, 2]).numpy()):
        assert_equal(torch.utils._pytree.tree_leaves(rnn(x, lengths=lengths)), expected)
    single = torch.utils._pytree.tree_leaves(rnn(x[:, 1], lengths=2))
    assert_equal(single[:1], [expected[0][:, 1]])
