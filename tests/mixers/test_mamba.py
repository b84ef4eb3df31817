"""S6 and Mamba: against other implementations, against loops over the equations, mode against mode."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from conftest import assert_close
from minrnn.mixers import S6, Mamba, Mixer, Place, S6Config, make_inner, make_mixer
from parity import check_chunks, check_resets, chunked, compare, gradients

D = 5
ROWS = {
    "s6": lambda: S6(D, S6Config(state=3)),
    "s6-rank": lambda: S6(D, S6Config(state=1, rank=2)),
    "mamba": lambda: make_mixer("mamba", D, {"inner_options": {"state": 3}}),
    "mamba-narrow": lambda: make_mixer("mamba", D, {"expansion": 0.5, "conv": 1, "inner_options": {"rank": 2}}),
}
OTHER_INNER = {"s4d": {"state": 4}, "s4": {"state": 4}, "hyena": {}}


def make(row, dtype=torch.float64) -> Mixer:
    torch.manual_seed(0)
    mixer = ROWS[row]()
    spread(mixer)
    return mixer.to(dtype)


def spread(mixer) -> None:
    """Channels that differ: A, D and the steps away from their beginnings."""
    core = mixer.inner if isinstance(mixer, Mamba) else mixer
    with torch.no_grad():
        core.A_log += torch.randn_like(core.A_log) / 4
        core.D += torch.randn_like(core.D) / 2
        core.step_bias += torch.rand_like(core.step_bias) * 4


def series(batch, time, dtype=torch.float64, width=D):
    torch.manual_seed(1)
    return torch.randn(batch, time, width, dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=torch.float64))
    return tree_map(lambda leaf: leaf.requires_grad_(), state)


def softplus(x):
    return torch.log(1 + torch.exp(x))


def silu(x):
    return x / (1 + torch.exp(-x))


def define_s6(layer, x, h):
    """One sequence (T, E), one step after the other, from h; the outputs, and the state after them."""
    rank, size, _ = layer.sizes
    rows = []
    for x_t in x:
        inner = layer.input.weight @ x_t
        step = softplus(layer.step.weight @ inner[:rank] + layer.step_bias)
        into, out = inner[rank : rank + size], inner[rank + size :]
        h = torch.exp(-step[:, None] * torch.exp(layer.A_log)) * h + torch.outer(step * x_t, into)
        rows.append(h @ out + layer.D * x_t)
    return torch.stack(rows), h


def define_mamba(mixer, x, tail, h):
    """The same of the whole mixer, from the last inputs of its convolution and h."""
    inputs, kernel = torch.cat([tail, x @ mixer.input.weight.T]), mixer.conv.kernel
    mixed = [sum(mixer.conv.weight[k] * inputs[t + k] for k in range(kernel)) for t in range(len(x))]
    y, h = define_s6(mixer.inner, silu(torch.stack(mixed) + mixer.conv.bias), h)
    return (y * silu(x @ mixer.gate.weight.T)) @ mixer.output.weight.T, inputs[len(x) :], h


@pytest.mark.parametrize("row", ROWS)
def test_it_is_its_equation(row):
    mixer, x = make(row), series(2, 9)
    state = some_state(mixer, 2)
    if isinstance(mixer, Mamba):
        y, *after = zip(*(define_mamba(mixer, *one) for one in zip(x, *state, strict=True)), strict=True)
    else:
        y, *after = zip(*(define_s6(mixer, *one) for one in zip(x, state, strict=True)), strict=True)
    expected = torch.stack(y), tuple(map(torch.stack, after))
    y, after = mixer(x, state)
    compare((y, tuple(tree_leaves(after))), expected, [x, *tree_leaves(state), *mixer.parameters()], x.dtype)


def pairs(ours: Mamba, theirs: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter of theirs with ours, in their layout and as functions of our parameters."""
    inner = ours.inner
    return [
        (theirs.in_proj.weight, torch.cat([ours.input.weight, ours.gate.weight])),
        (theirs.conv1d.weight, ours.conv.weight.T[:, None]),
        (theirs.conv1d.bias, ours.conv.bias),
        (theirs.x_proj.weight, inner.input.weight),
        (theirs.dt_proj.weight, inner.step.weight),
        (theirs.dt_proj.bias, inner.step_bias),
        (theirs.A_log, inner.A_log),
        (theirs.D, inner.D),
        (theirs.out_proj.weight, ours.output.weight),
    ]


def mambapy_block(width):
    mamba = pytest.importorskip("mambapy.mamba")
    return mamba.MambaBlock(mamba.MambaConfig(d_model=width, n_layers=1, pscan=True))


def transformers_mixer(width):
    configuration = pytest.importorskip("transformers.models.mamba.configuration_mamba")
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    return modeling.MambaMixer(configuration.MambaConfig(hidden_size=width), layer_idx=0)


@pytest.mark.parametrize("peer", [mambapy_block, transformers_mixer])
def test_it_is_the_block_of_other_libraries(peer):
    torch.manual_seed(0)
    width = 24  # a rank that is rounded up
    ours, theirs = make_mixer("mamba", width, {}), peer(width)
    spread(ours)
    with torch.no_grad():
        for theirs_own, own in pairs(ours, theirs):
            theirs_own.copy_(own)
    x, other = (series(2, 40, torch.float32, width) for _ in range(2))
    weight = torch.randn(2, 40, width)
    y, expected = ours(x)[0], theirs(other)
    assert_close(y, expected, torch.float32)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(x.grad, other.grad, torch.float32)
    for parameter in ours.parameters():
        parameter.data = parameter.grad  # so that the pairs are those of gradients
    for theirs_own, own in pairs(ours, theirs):
        scale = theirs_own.grad.abs().max()
        assert_close(own / scale, theirs_own.grad / scale, torch.float32)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("row", ROWS)
def test_whole_chunked_and_stepped_agree(row, time):
    mixer, x = make(row), series(2, time)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("row", ROWS)
def test_in_float32(row):
    mixer, x = make(row, torch.float32), series(2, 200, torch.float32)
    exact, wide = make(row), x.detach().double().requires_grad_()
    (y, state), (expected, end) = chunked(mixer, x, None, [7, 1, 64]), exact(wide)
    for a, b in zip((y, *tree_leaves(state)), (expected, *tree_leaves(end)), strict=True):
        assert_close(a, b, torch.float32)
    found = gradients(y, state, [x, *mixer.parameters()])
    for a, b in zip(found, gradients(expected, end, [wide, *exact.parameters()]), strict=True):
        scale = b.abs().max().clamp(min=1)
        assert_close(a / scale, b / scale, torch.float32)


@pytest.mark.parametrize("time", [1, 2, 17, 63])
@pytest.mark.parametrize("row", ROWS)
def test_resets_are_separate_sequences(row, time):
    mixer = make(row)
    check_resets(mixer, series(2, time), list(mixer.parameters()))


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
        assert (grad[:, : t + 1] != 0).any(2).any(0).all() or row == "mamba-narrow"


@pytest.mark.parametrize("row", ROWS)
def test_initial_state_is_where_sequences_begin(row):
    mixer, x = make(row), series(3, 6)
    state = mixer.initial_state(3)
    assert mixer.state_size == sum(leaf[0].numel() for leaf in tree_leaves(state))
    compare(mixer(x, state), mixer(x), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("inner", OTHER_INNER)
def test_other_inner_layers(inner):
    torch.manual_seed(0)
    mixer = make_mixer("mamba", 6, {"inner": inner, "inner_options": OTHER_INNER[inner]}).double()
    x = series(2, 12, width=6)
    y, _ = mixer(x)
    u = silu(mixer.conv(x @ mixer.input.weight.T)[0])
    expected = (mixer.inner(u)[0] * silu(x @ mixer.gate.weight.T)) @ mixer.output.weight.T
    assert_close(y, expected, torch.float64)
    pieces, _ = chunked(mixer, x, None, [5, 1])
    assert_close(pieces, y, torch.float64)
    assert type(mixer.inner) is type(make_inner(inner, 6, OTHER_INNER[inner]))
    assert {f"inner.{name}" for name in mixer.inner.tuning()} == set(mixer.tuning())
    sizes = mixer.inner.state_size
    assert mixer.state_size == (None if sizes is None else sizes + 3 * 12)


@pytest.mark.parametrize("row", ROWS)
def test_16_bit(row):
    x = series(2, 40, torch.bfloat16)
    mixer, exact = make(row, torch.bfloat16), make(row)
    y, state = mixer(x)
    recurrent = state.inner if isinstance(mixer, Mamba) else state
    begin = mixer.initial_state(2)
    assert y.dtype == torch.bfloat16
    assert recurrent.dtype == (begin.inner if isinstance(mixer, Mamba) else begin).dtype == torch.float32
    for name, parameter in mixer.named_parameters():
        kept = name.rsplit(".", 1)[-1] in ("A_log", "D", "step_bias")
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16)
    scale = exact(x.double())[0].abs().max()
    assert_close(y.double() / scale, exact(x.double())[0] / scale, torch.bfloat16)
    pieces, _ = chunked(mixer, x, None, [1])
    assert_close(pieces / scale, y / scale, torch.bfloat16)
    y.sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("row", ROWS)
def test_autocast(row):
    mixer, x = make(row, torch.float32), series(2, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        _, state = mixer(x, state)
    assert y.dtype == (torch.bfloat16 if isinstance(mixer, Mamba) else torch.float32)  # S6 ends with no linear map
    assert (state.inner if isinstance(mixer, Mamba) else state).dtype == torch.float32
    scale = mixer(x)[0].abs().max()
    assert_close(y / scale, mixer(x)[0] / scale, torch.bfloat16)


def test_the_beginning():
    torch.manual_seed(0)
    width = 2000
    layer = S6(width, S6Config(state=4, dt_min=1e-3, dt_max=1e-1, dt_floor=2e-3))
    assert_close(-layer.A_log.exp(), -torch.arange(1.0, 5).repeat(width, 1), torch.float32)
    assert torch.equal(layer.D, torch.ones(width))
    step = softplus(layer.step_bias.detach().double())
    assert step.min() >= 2e-3 * (1 - 1e-4) and step.max() <= 1e-1 * (1 + 1e-4)
    assert abs((step < 1e-2).double().mean() - 0.5) < 0.05  # log-uniform: half below the geometric mean
    assert abs((step < 2.001e-3).double().mean() - math.log(2) / math.log(100)) < 0.05
    rank = layer.sizes[0]
    assert rank == 125 and layer.step.weight.abs().max() <= rank**-0.5 < 1.01 * layer.step.weight.abs().max()
    weights = [make_mixer("mamba", 8, {}, Place(0, layers)).output.weight for layers in (1, 16)]
    torch.manual_seed(0)
    first = make_mixer("mamba", 8, {}, Place(0, 1)).output.weight
    torch.manual_seed(0)
    assert_close(make_mixer("mamba", 8, {}, Place(0, 16)).output.weight * 4, first, torch.float32)
    assert all(weight.shape == (8, 16) for weight in weights)


def test_the_rank_is_a_16th_of_the_models_width():
    assert make_mixer("mamba", 40, {}).inner.sizes == [3, 16, 16]
    assert make_mixer("mamba", 40, {"expansion": 4, "inner_options": {"state": 8}}).inner.sizes == [3, 8, 8]
    assert make_mixer("mamba", 40, {"inner_options": {"rank": 7}}).inner.sizes == [7, 16, 16]
    assert S6(40, S6Config()).sizes == [3, 16, 16] and S6(3, S6Config()).sizes == [1, 16, 16]


def test_tuning():
    mixer = make("mamba")
    names = {name for name, asks in mixer.tuning().items() if asks.keep_float32 and not asks.decay}
    assert names == set(mixer.tuning()) == {"inner.A_log", "inner.D", "inner.step_bias"}
    assert names <= set(dict(mixer.named_parameters()))


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "MambaConfig: expansion must be above 0 and finite, got 0", {"expansion": 0}),
        (ValueError, "MambaConfig: expansion must be above 0 and finite, got nan", {"expansion": math.nan}),
        (ValueError, "Mamba: expansion x width must be at least 1, got 0.1 x 5", {"expansion": 0.1}),
        (ValueError, "MambaConfig: conv must be at least 1, got 0", {"conv": 0}),
        (ValueError, "name must be one of .*s6.*, got 's7'", {"inner": "s7"}),
        (ValueError, "options of s6 must be among state, .*, got 'size'", {"inner_options": {"size": 4}}),
        (ValueError, "S6Config: state must be at least 1, got 0", {"inner_options": {"state": 0}}),
        (ValueError, "S6Config: rank must be at least 1, .* got -1", {"inner_options": {"rank": -1}}),
        (ValueError, "S6Config: dt_min must be above 0 .* got 0.2, 0.1", {"inner_options": {"dt_min": 0.2}}),
        (ValueError, "S6Config: dt_floor must be above 0 .* got 0", {"inner_options": {"dt_floor": 0}}),
        (TypeError, "MambaConfig: conv must be of type int, got 4.0", {"conv": 4.0}),
    ],
)
def test_bad_options_are_named(error, match, options):
    with pytest.raises(error, match=match):
        make_mixer("mamba", D, options)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "state must be .*MambaState", lambda state: tuple(state)),
        (ValueError, r"state.conv must be \(B, K-1, E\)", lambda state: state._replace(conv=state.conv[1:])),
        (TypeError, "state.conv must be a torch.Tensor", lambda state: state._replace(conv=None)),
        (ValueError, r"state must be \(B, E, N\)", lambda state: state._replace(inner=state.inner[..., 1:])),
        (TypeError, "state must be a torch.Tensor", lambda state: state._replace(inner=[1])),
    ],
)
def test_bad_states_are_named(error, match, change):
    mixer = make("mamba")
    with pytest.raises(error, match=f": {match}.*got"):
        mixer(series(2, 3), change(mixer.initial_state(2)))


@pytest.mark.parametrize("row", ROWS)
def test_bad_series_are_named(row):
    mixer, x = make(row), series(2, 3)
    for bad in (x[0], x[..., 1:]):
        with pytest.raises(ValueError, match=f"{type(mixer).__name__}: x must be .*got"):
            mixer(bad)
    with pytest.raises(ValueError, match=f"{type(mixer).__name__}: reset must be .*got"):
        mixer(x, reset=torch.zeros(2, 4, dtype=torch.bool))
