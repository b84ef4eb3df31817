"""sLSTM as a mixer: against xLSTM's own layer, mode against mode, how it begins, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close
from minrnn.mixers.contract import Place
from minrnn.mixers.slstm import SLSTM, SLSTMConfig, SLSTMMixerState
from minrnn.ops import SLSTMState, slstm_scan
from parity import check_chunks, check_resets, chunked, compare

ROWS = {"plain": (8, {"heads": 2}), "no-conv": (6, {"heads": 1, "conv": 0}), "two-channel-heads": (6, {"heads": 3})}


def make(row, dtype=torch.float64):
    """A mixer whose recurrent weights and biases are no zeros."""
    torch.manual_seed(0)
    width, options = ROWS[row]
    mixer = SLSTM(width, SLSTMConfig(**options), Place(1, 3))
    with torch.no_grad():
        mixer.recurrent.normal_(std=0.5)
        mixer.bias += 0.3 * torch.randn_like(mixer.bias)
    return mixer.to(dtype)


def series(mixer, batch, time, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, mixer.bias.shape[1], dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(series(mixer, batch, 7))
    return SLSTMMixerState(*(x.requires_grad_(name != "m") for name, x in zip(state._fields, state, strict=True)))


def theirs(mixer, heads, conv):
    """xLSTM's layer with the mixer's weights. Of its two gates that read the convolution, `fgate` is what enters i."""
    layers = pytest.importorskip("xlstm.blocks.slstm.layer")
    options = {"embedding_dim": mixer.bias.shape[1], "num_heads": heads, "conv1d_kernel_size": conv}
    layer = layers.sLSTMLayer(layers.sLSTMLayerConfig(**options, backend="vanilla", dtype="float32")).double()
    pairs = (("fgate", "into"), ("igate", "forget"), ("zgate", "candidate"), ("ogate", "output"))
    for name, mine in pairs:
        getattr(layer, name).weight.data = getattr(mixer, mine).weight.data.clone()
    if conv:
        layer.conv1d.conv.weight.data = mixer.conv.weight.data.T[:, None].clone()
        layer.conv1d.conv.bias.data = mixer.conv.bias.data.clone()
    layer.slstm_cell._recurrent_kernel_.data = mixer.recurrent.data.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    layer.slstm_cell._bias_.data = mixer.bias.data.flatten()
    layer.group_norm.weight.data = mixer.norm.weight.data - 1
    return layer


@pytest.mark.parametrize(("heads", "conv"), [(1, 4), (4, 4), (2, 0)])
def test_it_is_the_authors_layer(heads, conv):
    torch.manual_seed(0)
    mixer = SLSTM(16, SLSTMConfig(heads, conv), Place(1, 3)).double()
    with torch.no_grad():
        for parameter in (mixer.recurrent, mixer.bias, mixer.norm.weight):
            parameter += 0.4 * torch.randn_like(parameter)
    layer, x = theirs(mixer, heads, conv), series(mixer, 3, 23)
    weight = torch.randn_like(x)
    (y, _), expected = mixer(x), layer(x)
    assert_close(y, expected, x.dtype)
    cell = layer.slstm_cell
    mine = [x, mixer.into.weight, mixer.forget.weight, mixer.candidate.weight, mixer.output.weight, mixer.norm.weight]
    their = [x, layer.fgate.weight, layer.igate.weight, layer.zgate.weight, layer.ogate.weight, layer.group_norm.weight]
    mine, their = [*mine, mixer.recurrent, mixer.bias], [*their, cell._recurrent_kernel_, cell._bias_]
    if conv:
        mine, their = [*mine, mixer.conv.bias], [*their, layer.conv1d.conv.bias]
    mine, their = torch.autograd.grad((y * weight).sum(), mine), torch.autograd.grad((expected * weight).sum(), their)
    for a, b in zip((*mine[:6], *mine[7:]), (*their[:6], *their[7:]), strict=True):
        assert_close(a, b.view(a.shape), x.dtype)
    assert_close(mine[6].permute(0, 2, 3, 1).flatten(1, 2), their[6], x.dtype)


def test_it_is_its_parts():
    """The equation of the docstring, each map written out; the scan has a definition in its own test."""
    mixer = make("plain")
    x, heads = series(mixer, 2, 9), 2
    padded = F.pad(x, (0, 0, 3, 0))
    mixed = F.silu(mixer.conv.bias + sum(mixer.conv.weight[k] * padded[:, k : k + 9] for k in range(4)))

    def by_head(layer, x):
        return torch.cat([x[..., 4 * k : 4 * k + 4] @ layer.weight[k].T for k in range(heads)], -1)

    gates = by_head(mixer.into, mixed), by_head(mixer.forget, mixed), by_head(mixer.candidate, x)
    h, _ = slstm_scan(*gates, by_head(mixer.output, x), mixer.recurrent, mixer.bias)
    parts = h.unflatten(-1, (heads, 4))
    mean, variance = parts.mean(-1, keepdim=True), parts.var(-1, correction=0, keepdim=True)
    expected = ((parts - mean) / (variance + 1e-5).sqrt()).flatten(2) * mixer.norm.weight
    compare((mixer(x)[0], ()), (expected, ()), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("row", ROWS)
def test_whole_chunked_and_stepped_agree(row, time):
    mixer = make(row)
    check_chunks(mixer, series(mixer, 2, time), some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("row", ROWS)
def test_resets_are_separate_sequences(row):
    mixer = make(row)
    check_resets(mixer, series(mixer, 2, 17), list(mixer.parameters()))


def test_long_float32_chunks_with_resets_of_each_row():
    mixer = make("plain", torch.float32)
    x, reset = series(mixer, 3, 200, torch.float32), torch.rand(3, 200) < 0.05
    compare(mixer(x, reset=reset), chunked(mixer, x, None, [7, 1, 64], reset), [x, *mixer.parameters()], x.dtype)
    exact, _ = make("plain")(x.double(), reset=reset)
    assert_close(mixer(x, reset=reset)[0], exact, x.dtype)


def test_no_output_knows_a_later_input():
    mixer = make("plain")
    x = series(mixer, 2, 9)
    y, _ = mixer(x)
    for t in range(9):
        (grad,) = torch.autograd.grad(y[:, t, 0].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all() and (grad[:, t] != 0).any()


@pytest.mark.parametrize("row", ROWS)
def test_initial_state_is_where_sequences_begin(row):
    mixer = make(row)
    x, state = series(mixer, 3, 6), mixer.initial_state(3)
    assert mixer.state_size == sum(part[0].numel() for part in state)
    compare(mixer(x, state), mixer(x), [x, *mixer.parameters()], x.dtype)
    y, after = mixer(x[:0])
    assert y.shape == x[:0].shape and all(a.shape == s[:0].shape for a, s in zip(after, state, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_carry_float32(dtype):
    mixer = make("plain", dtype)
    x = series(mixer, 2, 30, dtype)
    y, state = mixer(x)
    assert y.dtype == mixer.recurrent.dtype == state.conv.dtype == dtype
    assert mixer.bias.dtype == torch.float32
    for each in (state, mixer.initial_state(2)):
        assert all(part.dtype == torch.float32 for part in each[1:])
    pieces, last = chunked(mixer, x, None, [1])
    assert_close(pieces, y, dtype)
    assert_close(last.c / last.n, state.c / state.n, dtype)


def test_autocast():
    mixer = make("plain", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(series(mixer, 2, 30, torch.float32))
    assert y.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in state[1:])


def test_how_it_begins():
    torch.manual_seed(0)
    layers = pytest.importorskip("xlstm.blocks.slstm.layer")
    for place in (Place(0, 1), Place(0, 4), Place(3, 4)):
        mixer = SLSTM(256, SLSTMConfig(), place)
        options = {"embedding_dim": 256, "backend": "vanilla", "_block_idx": place.layer, "_num_blocks": place.layers}
        layer = layers.sLSTMLayer(layers.sLSTMLayerConfig(**options))
        layer.reset_parameters()
        assert_close(mixer.bias.flatten(), layer.slstm_cell._bias_, torch.float32)
        assert (mixer.recurrent == 0).all() and (layer.slstm_cell._recurrent_kernel_ == 0).all()
        for mine, their in ((mixer.into, layer.fgate), (mixer.output, layer.ogate)):
            assert mine.weight.shape == their.weight.shape
            for weight in (mine.weight, their.weight):
                assert abs(weight.std().item() / math.sqrt(2 / (5 * 256)) - 1) < 0.05


def test_its_own_parameters_do_not_decay():
    asks = SLSTM(8, SLSTMConfig()).tuning()
    assert asks.keys() == {"recurrent", "bias"} and not any(ask.decay for ask in asks.values())
    assert asks["bias"].keep_float32 and not asks["recurrent"].keep_float32


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "SLSTMConfig: heads must be at least 1", lambda: SLSTMConfig(heads=0)),
        (ValueError, "SLSTMConfig: conv must be at least 0", lambda: SLSTMConfig(conv=-1)),
        (TypeError, "SLSTMConfig: conv must be of type int", lambda: SLSTMConfig(conv=4.0)),
        (ValueError, "SLSTM: heads must divide width = 6, got 4", lambda: SLSTM(6, SLSTMConfig())),
        (ValueError, "SLSTM: heads must leave each at least 2 .* got 4", lambda: SLSTM(4, SLSTMConfig())),
    ],
)
def test_bad_options_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "x must be", lambda x, state, reset: (x[..., 1:], None, None)),
        (TypeError, "x must be", lambda x, state, reset: (x.tolist(), None, None)),
        (ValueError, "state must be", lambda x, state, reset: (x, SLSTMState(*state[1:]), None)),
        (ValueError, "state.conv must be", lambda x, state, reset: (x, state._replace(conv=state.conv[:, 1:]), None)),
        (ValueError, "state.n must be", lambda x, state, reset: (x, state._replace(n=state.n[1:]), None)),
        (TypeError, "state.m must be", lambda x, state, reset: (x, state._replace(m=None), None)),
        (ValueError, "reset must be", lambda x, state, reset: (x, state, reset[:, 1:])),
        (TypeError, "reset must be", lambda x, state, reset: (x, state, reset.long())),
    ],
)
def test_bad_arguments_are_named(error, message, change):
    mixer = make("plain")
    x, state, reset = change(series(mixer, 2, 4), some_state(mixer, 2), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(error, match=f"SLSTM: {message}"):
        mixer(x, state, reset=reset)
