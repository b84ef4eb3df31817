"""MinGRU, MinLSTM and their cells under torch.compile, torch.func, gradcheck and autocast."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from conftest import TOL
from layers_definition import STACKS, B, D, H, T, assert_same, data, flat, given, make
from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

SOME = ["gru", "gru-bi-2-learned", "lstm-bi-2-proj-learned"]
CELLS = [MinGRUCell, MinLSTMCell]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("name", SOME)
def test_compiles_whole_and_once_for_all_lengths(name):
    rnn = make(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rnn, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for time in (7, 5, 12):
        series, state = data(rnn, time)
        lengths = torch.tensor([time, 0, 3])
        reset = torch.rand(time, B) < 0.3
        arguments = (series, given(rnn, state))
        ours = flat(*compiled(*arguments, lengths=lengths, reset=reset))
        theirs = flat(*rnn(*arguments, lengths=lengths, reset=reset))
        assert_same(ours, theirs)
        wanted = [series, state, *rnn.parameters()]
        assert_same(
            torch.autograd.grad(sum(r.square().sum() for r in ours), wanted),
            torch.autograd.grad(sum(r.square().sum() for r in theirs), wanted),
        )
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1


def test_lists_of_lengths_compile_once():
    layer, counter = MinGRU(3, 4, batch_first=True), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([5, 2], [3, 4], [1, 7], (0, 6), [9, 9], [2, 2], [8, 1], [4, 3], [6, 5], [7, 0]):
        x = torch.randn(2, 9, 3)
        assert_same(compiled(x, lengths=lengths), layer(x, lengths=lengths))
    assert counter.frame_count <= 3


class Chosen(nn.Module):
    """A batch, or time steps, whose number the data decide."""

    def __init__(self, batch_first):
        super().__init__()
        self.rnn = MinGRU(3, 4, batch_first=batch_first)

    def forward(self, x, chosen, lengths):
        if self.rnn.batch_first:
            return self.rnn(x[chosen], lengths=lengths[chosen])[0]
        return self.rnn(x[:, chosen])[0]


@pytest.mark.parametrize("batch_first", [False, True])
def test_exports_with_a_batch_that_the_data_decide(batch_first):
    module, x, lengths = Chosen(batch_first), torch.randn(6, 6, 3), torch.tensor([6, 2, 4, 1, 5, 3])
    chosen = torch.tensor([True, False, True, True, False, False])
    program = torch.export.export(module, (x, chosen, lengths)).module()
    for rows in (chosen, ~chosen & (lengths > 2), lengths > 10):
        assert_same([program(x, rows, lengths)], [module(x, rows, lengths)])


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_compiled_layers_keep_tangents(grad_mode, compilable):
    rnn, x = MinGRU(D, H).double(), torch.randn(T, B, D, dtype=torch.double)
    compiled, tangent = torch.compile(rnn, backend="eager", fullgraph=True), torch.randn_like(x)
    (_, expected), (_, tangent_expected) = jvp(rnn, (x,), (tangent,))
    with grad_mode():
        for _ in range(2):  # and the graphs without tangents between
            with forward_ad.dual_level():
                _, dual = compiled(forward_ad.make_dual(x, tangent))
                assert_same(forward_ad.unpack_dual(dual), (expected, tangent_expected))
            assert_same([compiled(x)[1]], [expected])


def test_compiles_with_inductor_under_autocast():
    rnn = MinGRU(D, H, batch_first=True)
    series, state = torch.randn(B, T, D), torch.randn(1, B, H)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = torch.compile(rnn, fullgraph=True)(series, state)
        expected, expected_n = rnn(series, state)
    assert output.dtype == expected.dtype == h_n.dtype == torch.bfloat16
    assert_same([output, h_n], [expected, expected_n])


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_lengths_can_be_mapped(kind):
    rnn, series = kind(D, H, batch_first=True), torch.randn(4, B, T, D)
    lengths = torch.randint(0, T + 1, (4, B))
    mapped = vmap(lambda x, ends: rnn(x, lengths=ends)[0])(series, lengths)
    for each, x, ends in zip(mapped, series, lengths, strict=True):
        assert_same([each], [rnn(x, lengths=ends)[0]])


def test_a_traced_layer_gives_what_the_layer_gives():
    rnn = MinGRU(D, H, 2, bidirectional=True)
    with torch.no_grad():
        traced = torch.jit.trace(rnn, torch.randn(T, B, D))
        series = torch.randn(T, B, D)
        assert_same(flat(*traced(series)), flat(*rnn(series)))


def test_autocast_leaves_float64_alone_and_so_do_layers():
    for weights, input in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        rnn = MinGRU(D, H, dtype=weights)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="input must be torch.float"):
            rnn(torch.randn(T, B, D, dtype=input))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_trains_with_inductor_in_either_layout(kind, batch_first):
    rnn = kind(D, H, 2, batch_first=batch_first)
    series = torch.randn(*((B, T) if batch_first else (T, B)), D, requires_grad=True)
    wanted, found = [series, *rnn.parameters()], []
    for module in (torch.compile(rnn, fullgraph=True), rnn):
        output, state = module(series)
        loss = output.square().sum() + sum(s.sum() for s in (state if kind is MinLSTM else (state,)))
        found.append([output, *torch.autograd.grad(loss, wanted)])
    assert_same(*found)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_compile_whole(kind):
    cell = kind(D, H, dtype=torch.float64)
    x = torch.randn(B, D, dtype=torch.float64)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    assert_same(tree_leaves(compiled(x)), tree_leaves(cell(x)))


@pytest.mark.parametrize("name", SOME)
def test_gradients_per_sample_are_those_of_a_loop(name):
    rnn = make(name)
    series, _ = data(rnn)
    parameters = {key: p.detach() for key, p in rnn.named_parameters()}

    def loss(parameters, x):
        output, _ = functional_call(rnn, parameters, (x,))
        return output.square().sum()

    mapped = vmap(grad(loss), in_dims=(None, 1))(parameters, series.detach())
    for b in range(B):
        single = grad(loss)(parameters, series[:, b].detach())
        assert_same([mapped[key][b] for key in single], single.values())
        rnn.zero_grad()
        rnn(series[:, b].detach())[0].square().sum().backward()
        assert_same(single.values(), [p.grad for p in rnn.parameters()])


def test_a_mapped_ensemble_is_a_loop_over_its_members():
    members = [MinLSTM(D, H, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    series = torch.randn(T, B, D, dtype=torch.float64)
    output, (_, c_n) = vmap(lambda p, b: functional_call(members[0], (p, b), (series,)))(parameters, buffers)
    for i, member in enumerate(members):
        expected, (_, expected_n) = member(series)
        assert_same([output[i], c_n[i]], [expected, expected_n])


@pytest.mark.parametrize("name", SOME)
def test_forward_mode_is_the_transpose_of_backward(name):
    rnn = make(name)
    series, state = data(rnn)
    reset = torch.rand(T, B) < 0.3
    tangents = torch.randn_like(series), torch.randn_like(state)

    def run(x, h):
        return flat(*rnn(x, given(rnn, h), lengths=[4, 0, T], reset=reset))

    results, moved = jvp(run, (series, state), tangents)
    weights = [torch.randn_like(result) for result in results]
    forward = sum((w * m).sum() for w, m in zip(weights, moved, strict=True))
    grads = torch.autograd.grad(results, [series, state], weights)
    backward = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    assert_same([forward], [backward])


@pytest.mark.parametrize("name", STACKS)
def test_gradcheck(name):
    rnn = make(name)
    series, state = data(rnn, 4, 2)
    reset = torch.tensor([[False, True], [True, False], [False, False], [False, True]])
    names, parameters = zip(*rnn.named_parameters(), strict=True)

    def run(x, h, *values):
        options = {"lengths": [4, 3], "reset": reset}
        return tuple(flat(*functional_call(rnn, dict(zip(names, values, strict=True)), (x, given(rnn, h)), options)))

    assert torch.autograd.gradcheck(run, (series, state, *parameters), check_forward_ad=True, fast_mode=True)
    if rnn.num_layers == 1:  # more of them take half a minute
        assert torch.autograd.gradgradcheck(run, (series, state, *parameters), fast_mode=True)


@pytest.mark.parametrize("kind", CELLS)
def test_gradcheck_of_cells(kind):
    cell = kind(D, H, dtype=torch.float64, learn_initial_state=True)
    x, h = torch.randn(B, D, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    x.requires_grad_()
    h.requires_grad_()

    names, parameters = zip(*cell.named_parameters(), strict=True)

    def run(x, h, *values):
        weights = dict(zip(names, values, strict=True))
        hx = h if kind is MinGRUCell else (h, h)
        begun, carried = functional_call(cell, weights, (x,)), functional_call(cell, weights, (x, hx))
        return (begun, carried) if kind is MinGRUCell else (begun[1], carried[0])

    assert torch.autograd.gradcheck(run, (x, h, *parameters), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, h, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_autocast(name, state_dtype, dtype):
    rnn = make(name).float()
    reference = make(name)
    series, state = data(rnn)
    hx = None if state_dtype is None else given(rnn, state.to(state_dtype))
    exact = None if state_dtype is None else given(reference, state.to(state_dtype).double())
    with torch.autocast("cpu", dtype):
        ours = flat(*rnn(series.float(), hx, lengths=[4, 0, T]))
        linear = nn.functional.linear(series.float(), rnn.weight_ih_l0)
    assert {result.dtype for result in ours} == {linear.dtype} == {dtype}
    for mine, expected in zip(ours, flat(*reference(series, exact, lengths=[4, 0, T])), strict=True):
        torch.testing.assert_close(mine.double(), expected, **TOL[torch.bfloat16])
    sum(result.float().sum() for result in ours).backward()
    grads = [p.grad for p in rnn.parameters() if p.grad is not None]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", CELLS)
def test_autocast_of_cells_carries_its_own_state(kind):
    cell, x = kind(D, H), torch.randn(B, D)
    with torch.autocast("cpu", torch.bfloat16):
        states = cell(x, cell(x))
    assert {s.dtype for s in (states if kind is MinLSTMCell else [states])} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_16_bit_modules(name, dtype):
    rnn, reference = make(name).to(dtype), make(name)
    reference.load_state_dict({key: value.double() for key, value in rnn.state_dict().items()})
    series, state = (tensor.detach().to(dtype) for tensor in data(reference))
    ours = flat(*rnn(series, given(rnn, state)))
    for mine, expected in zip(ours, flat(*reference(series.double(), given(reference, state.double()))), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), expected, **TOL[dtype])
