"""RWKV-4: against the transformers library's modules and the equations of the paper, and where it begins."""

import math

import pytest
import torch
from torch import nn

from conftest import assert_close
from minrnn.mixers import MIXERS, RWKV4, ChannelMix, Place, RWKV4Config, RWKV4State, make_mixer
from minrnn.mixers.contract import Tuning
from minrnn.mixers.table import Usual
from parity import check_chunks, check_resets, chunked, compare, gradients

D, HIDDEN, PLACE = 6, 10, Place(1, 3)


def make(kind, dtype=torch.float64, width=D):
    """A mixer in the middle of its training: where it begins, its output is zero."""
    torch.manual_seed(0)
    mixer = RWKV4(width, RWKV4Config(), PLACE) if kind is RWKV4 else ChannelMix(width, HIDDEN, PLACE)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p) / p.shape[1] ** 0.5 if p.dim() == 2 else p + torch.randn_like(p) / 5)
    return mixer.to(dtype)


def series(batch, time, dtype=torch.float64, width=D):
    torch.manual_seed(1)
    return torch.randn(batch, time, width, dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=torch.float64))
    if isinstance(state, RWKV4State):
        return RWKV4State(*(x.requires_grad_() for x in state[:3]), state.max)
    return state.requires_grad_()


def define(mixer, x, reset):
    """The equations, one step and one sequence at a time; the sums as they are, divided by nothing."""
    rows = []
    for b in range(x.shape[0]):
        before = num = den = torch.zeros(D, dtype=x.dtype)
        for t in range(x.shape[1]):
            if reset[b, t]:
                before = num = den = torch.zeros(D, dtype=x.dtype)

            def mixed(share, now=x[b, t], before=before):
                return share * now + (1 - share) * before

            k, r = mixer.key.weight @ mixed(mixer.mix_key), mixer.receptance.weight @ mixed(mixer.mix_receptance)
            if isinstance(mixer, RWKV4):
                v, w, now = mixer.value.weight @ mixed(mixer.mix_value), mixer.decay.exp(), (mixer.bonus + k).exp()
                average = (num + now * v) / (den + now)
                num, den = (-w).exp() * num + k.exp() * v, (-w).exp() * den + k.exp()
                rows.append(mixer.output.weight @ (average / (1 + (-r).exp())))
            else:
                rows.append(mixer.value.weight @ k.clamp(min=0) ** 2 / (1 + (-r).exp()))
            before = x[b, t]
    return torch.stack(rows).view_as(x)


def theirs(mixer):
    """The module of transformers with the weights of `mixer`."""
    rwkv = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    sizes = {"hidden_size": D, "attention_hidden_size": D, "intermediate_size": HIDDEN, "num_hidden_layers": 3}
    config = rwkv.RwkvConfig(**sizes, vocab_size=5)
    other = (rwkv.RwkvSelfAttention if isinstance(mixer, RWKV4) else rwkv.RwkvFeedForward)(config, PLACE.layer)
    rwkv.RwkvPreTrainedModel._init_weights(rwkv.RwkvModel(config), other)
    names = {"decay": "time_decay", "bonus": "time_first", "mix_key": "time_mix_key", "mix_value": "time_mix_value"}
    names |= {"mix_receptance": "time_mix_receptance"}
    pairs = {n: (p, other.get_parameter(names.get(n, n))) for n, p in mixer.named_parameters()}
    return other, pairs


@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_it_is_the_papers_recurrence(kind):
    mixer, x, reset = make(kind), series(3, 9), torch.rand(3, 9) < 0.3
    compare((mixer(x, reset=reset)[0], ()), (define(mixer, x, reset), ()), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_it_is_that_of_transformers(kind):
    mixer, x = make(kind, torch.float32), series(2, 20, torch.float32)
    other, pairs = theirs(mixer)
    with torch.no_grad():
        for ours, its in pairs.values():
            its.copy_(ours.view_as(its))
    y, expected = mixer(x)[0], other(x)[0]
    assert_close(y, expected, torch.float32)
    ours = gradients(y, (), [x, *(a for a, _ in pairs.values())])
    its = gradients(expected, (), [x, *(b for _, b in pairs.values())])
    for a, b in zip(ours, its, strict=True):
        assert_close(a, b.view_as(a), torch.float32)


def test_transformers_goes_on_from_its_state():
    mixer, x = make(RWKV4, torch.float32), series(2, 20, torch.float32).detach()
    other, pairs = theirs(mixer)
    with torch.no_grad():
        for ours, its in pairs.values():
            its.copy_(ours.view_as(its))
        whole, _ = mixer(x)
        _, state = mixer(x[:, :8])
        sums = state.previous, state.average * state.weight, state.weight, state.max
        given = [torch.zeros(2, D, 3) for _ in range(5)]
        for to, what in zip(given[1:], sums, strict=True):
            to[..., PLACE.layer] = what
        rest, _ = other(x[:, 8:], state=given, use_cache=True)
    assert_close(rest, whole[:, 8:], torch.float32)


@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_it_begins_as_its_authors(kind):
    mixer = RWKV4(D, RWKV4Config(), PLACE) if kind is RWKV4 else ChannelMix(D, HIDDEN, PLACE)
    _, pairs = theirs(mixer)
    for name, (ours, its) in pairs.items():
        if "mix" in name or name == "decay":  # their port has another bonus, ones
            assert_close(ours, its.view_as(ours), torch.float32)
    free = mixer.value.weight if kind is RWKV4 else mixer.key.weight
    size = 1 if kind is RWKV4 else HIDDEN / D
    assert_close(free.T @ free, size * torch.eye(D), torch.float32)
    assert all(p is free or (p == 0).all() for p in mixer.parameters() if p.dim() == 2)


def test_the_bonus_goes_in_threes():
    bonus = RWKV4(7, RWKV4Config()).bonus
    zigzag = torch.tensor([0.0, 0.5, -0.5, 0.0, 0.5, -0.5, 0.0])
    assert_close(bonus, math.log(0.3) + zigzag, torch.float32)


def test_one_layer_and_one_channel_begin_as_the_first_of_many():
    alone, first = RWKV4(D, RWKV4Config(), Place(0, 1)), RWKV4(D, RWKV4Config(), Place(0, 5))
    for name in ("decay", "bonus", "mix_key", "mix_value", "mix_receptance"):
        assert torch.equal(alone.get_parameter(name), first.get_parameter(name))
    assert alone.decay[0] == -5 and alone.decay[-1] == 3
    narrow = RWKV4(1, RWKV4Config(), Place(2, 3))
    assert narrow.decay.tolist() == [-5] and narrow.mix_key.tolist() == [0]
    y, _ = narrow(torch.randn(2, 5, 1))
    assert y.isfinite().all()


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_whole_chunked_and_stepped_agree(kind, time):
    mixer, x = make(kind), series(2, time)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("time", [1, 2, 17])
@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_resets_are_separate_sequences(kind, time):
    mixer = make(kind)
    check_resets(mixer, series(2, time), list(mixer.parameters()))


@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_float32_over_200_steps(kind):
    mixer, x = make(kind, torch.float32), series(2, 200, torch.float32)
    check_chunks(mixer, x, None, [mixer.key.weight, mixer.mix_key])
    expected, _ = make(kind)(x.double())
    assert_close(mixer(x)[0], expected, torch.float32)


@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_no_output_knows_a_later_input(kind):
    mixer, x = make(kind), series(2, 9)
    y, _ = mixer(x)
    for t in range(9):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all() and (grad[:, t] != 0).any()


@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_initial_state_is_where_sequences_begin(kind):
    mixer, x = make(kind), series(3, 6)
    state = mixer.initial_state(3)
    leaves = state if kind is RWKV4 else [state]
    assert mixer.state_size == sum(leaf[0].numel() for leaf in leaves)
    compare(mixer(x, state), mixer(x), [x, *mixer.parameters()], x.dtype)
    y, after = mixer(x[:0])
    assert y.shape == (0, 6, D)
    y, after = mixer(x[:, :0], state)
    assert y.shape == (3, 0, D)
    assert all(torch.equal(a, b) for a, b in zip(after if kind is RWKV4 else [after], leaves, strict=True))


@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_bfloat16(kind):
    mixer, x = make(kind, torch.bfloat16), series(2, 40, torch.bfloat16)
    y, state = mixer(x)
    assert y.dtype == torch.bfloat16
    if kind is RWKV4:
        assert [s.dtype for s in state] == [s.dtype for s in mixer.initial_state(2)]
        assert [s.dtype for s in state] == [torch.bfloat16] + [torch.float32] * 3
        assert mixer.decay.dtype == mixer.bonus.dtype == torch.float32
        assert mixer.mix_key.dtype == mixer.key.weight.dtype == torch.bfloat16
    pieces, _ = chunked(mixer, x, None, [1])
    assert_close(pieces, y, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = make(kind, torch.float32)(x.float())
    assert y.dtype == torch.bfloat16
    assert kind is ChannelMix or {s.dtype for s in state} == {torch.float32}


def test_what_the_parameters_ask_for():
    asked = make(RWKV4).tuning()
    assert asked == {
        "decay": Tuning(2, decay=False, keep_float32=True),
        "bonus": Tuning(3, decay=False, keep_float32=True),
    }
    assert make(ChannelMix).tuning() == {}


def test_the_row_of_the_table():
    assert MIXERS["rwkv4"].usual == Usual(mlp=4.0, mlp_kind="channel_mix", norm="layer")
    assert type(make_mixer("rwkv4", D, {}, PLACE)) is RWKV4


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "x must be", lambda x, state, reset: (x[..., 1:], None, None)),
        (TypeError, "x must be", lambda x, state, reset: (x.tolist(), None, None)),
        (ValueError, "reset must be", lambda x, state, reset: (x, state, reset.T)),
        (TypeError, "reset must be", lambda x, state, reset: (x, state, reset.long())),
    ],
)
@pytest.mark.parametrize("kind", [RWKV4, ChannelMix])
def test_bad_arguments_are_named(kind, error, match, change):
    mixer, x = make(kind), series(2, 3)
    x, state, reset = change(x, mixer.initial_state(2), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(error, match=f"{kind.__name__}: {match} .*got"):
        mixer(x, state, reset=reset)


def test_bad_states_are_named():
    mixer, x = make(RWKV4), series(2, 3)
    state = mixer.initial_state(2)
    for error, match, given in (
        (ValueError, "state must be of type RWKV4State,.*got Tensor", state.previous),
        (ValueError, r"state.previous must be \(B, D\)", mixer.initial_state(3)),
        (ValueError, r"state.weight must be \(B, D\)", state._replace(weight=state.weight[:, 1:])),
        (TypeError, "state.max must be", state._replace(max=None)),
    ):
        with pytest.raises(error, match=f"RWKV4: {match}"):
            mixer(x, given)
    mixer = make(ChannelMix)
    for error, given in ((ValueError, mixer.initial_state(3)), (TypeError, (mixer.initial_state(2),))):
        with pytest.raises(error, match="ChannelMix: state must be"):
            mixer(x, given)


def test_it_learns_from_where_it_begins():
    """W_out begins at zero, but not its gradient."""
    torch.manual_seed(0)
    mixer = RWKV4(D, RWKV4Config())
    optimizer = torch.optim.SGD(mixer.parameters(), 1.0)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(mixer(series(2, 9, torch.float32))[0], torch.ones(2, 9, D)).backward()
        optimizer.step()
    assert all((p != 0).any() for p in mixer.parameters())
