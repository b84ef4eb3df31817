"""Aaren: against PyTorch's attention with a constant query, and where scores are extreme."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close
from minrnn.mixers import MIXERS, Aaren, AarenConfig, AarenState, Place, make_mixer
from minrnn.mixers.table import Usual
from parity import check_chunks, check_resets, chunked, compare

D = 6
HEADS = [1, 2, 6]


def make(heads, dtype=torch.float64, width=D):
    """A mixer in the middle of its training, with scores of some size."""
    torch.manual_seed(0)
    mixer = Aaren(width, AarenConfig(heads=heads, bias=True))
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p))
    return mixer.to(dtype)


def series(batch, time, dtype=torch.float64, width=D):
    torch.manual_seed(1)
    return torch.randn(batch, time, width, dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=torch.float64))
    return AarenState(state.average.requires_grad_(), state.weight.requires_grad_(), state.max)


def attention(mixer, x, key_bias=None):
    """Causal attention of the learned token's query on all keys before."""

    def heads(y):
        return y.unflatten(-1, (mixer.heads, -1)).transpose(-2, -3)

    query = heads(mixer.query(mixer.token).expand(*x.shape))
    keys = heads(F.linear(x, mixer.key.weight, key_bias))
    mixed = F.scaled_dot_product_attention(query, keys, heads(mixer.value(x)), is_causal=True)
    return mixer.output(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", HEADS)
def test_it_is_attention_with_a_constant_query(heads):
    mixer, x = make(heads), series(3, 19)
    inputs = [x, *mixer.parameters()]
    compare((mixer(x)[0], ()), (attention(mixer, x), ()), inputs, x.dtype)
    # That is why the keys have no bias.
    compare((mixer(x)[0], ()), (attention(mixer, x, torch.randn(D).double()), ()), inputs, x.dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_it_is_the_softmax_of_all_scores_up_to_now(heads):
    mixer, x, reset = make(heads), series(2, 9), torch.rand(2, 9) < 0.3
    size, rows = D // heads, []
    for b in range(2):
        for t in range(9):
            begin = max(s for s in range(t + 1) if s == 0 or reset[b, s])
            seen = x[b, begin : t + 1]
            keys, values = seen @ mixer.key.weight.T, seen @ mixer.value.weight.T + mixer.value.bias
            query = mixer.query.weight @ mixer.token + mixer.query.bias
            mixed = []
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                scores = keys[:, own] @ query[own] / math.sqrt(size)
                mixed.append((scores.exp() / scores.exp().sum()) @ values[:, own])
            rows.append(mixer.output.weight @ torch.cat(mixed) + mixer.output.bias)
    expected = torch.stack(rows).view_as(x)
    compare((mixer(x, reset=reset)[0], ()), (expected, ()), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("heads", HEADS)
def test_whole_chunked_and_stepped_agree(heads, time):
    mixer, x = make(heads), series(2, time)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("time", [1, 2, 17])
@pytest.mark.parametrize("heads", HEADS)
def test_resets_are_separate_sequences(heads, time):
    mixer = make(heads)
    check_resets(mixer, series(2, time), list(mixer.parameters()))


def test_float32_over_200_steps():
    mixer, x = make(2, torch.float32), series(2, 200, torch.float32)
    check_chunks(mixer, x, None, [mixer.value.weight, mixer.output.weight])


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_long_and_extreme_in_float32(size):
    """Whole numbers, so that no score is rounded before its softmax."""
    mixer, x = make(2, torch.float32, width=8), torch.randint(-3, 4, (1, 4096, 8)).float().requires_grad_()
    with torch.no_grad():
        mixer.query.weight.copy_(torch.eye(8))
        for p in (mixer.token, mixer.query.bias, mixer.key.weight):
            p.copy_(p.sign())
        mixer.key.weight *= size
    assert mixer._scores(x).abs().max() > 4 * size
    y, state = mixer(x)
    assert_close(y, attention(mixer.double(), x.double()), torch.float32)
    mixer.float()
    for grad in torch.autograd.grad(mixer(x)[0].sum(), [x, *mixer.parameters()]):
        assert grad.isfinite().all()
    assert all(leaf.isfinite().all() for leaf in state)


@pytest.mark.parametrize("heads", HEADS)
def test_no_output_knows_a_later_input(heads):
    mixer, x = make(heads), series(2, 9)
    y, _ = mixer(x)
    for t in range(9):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all() and (grad[:, t] != 0).any()


def test_initial_state_is_where_sequences_begin():
    mixer, x = make(2), series(3, 6)
    state = mixer.initial_state(3)
    assert mixer.state_size == sum(leaf[0].numel() for leaf in state) == D + 4
    compare(mixer(x, state), mixer(x), [x, *mixer.parameters()], x.dtype)
    y, after = mixer(x[:0])
    assert y.shape == (0, 6, D) and after.average.shape == (0, D)
    y, after = mixer(x[:, :0], state)
    assert y.shape == (3, 0, D) and all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_bfloat16():
    mixer, x = make(2, torch.bfloat16), series(2, 40, torch.bfloat16)
    with torch.no_grad():
        mixer.output.weight /= 4
    y, state = mixer(x)
    assert y.dtype == torch.bfloat16
    assert {s.dtype for s in (*state, *mixer.initial_state(2))} == {torch.float32}
    pieces, _ = chunked(mixer, x, None, [1])
    assert_close(pieces, y, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = make(2, torch.float32)(x.float())
    assert y.dtype == torch.bfloat16 and {s.dtype for s in state} == {torch.float32}


def test_the_scores_are_float32_under_autocast():
    mixer, x = make(2, torch.float32), series(2, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = mixer._scores(x)
    assert torch.equal(scores, mixer._scores(x))


def test_it_begins_as_gpt():
    torch.manual_seed(0)
    mixer = Aaren(256, AarenConfig(bias=True), Place(3, 8))
    for layer, std in ((mixer.query, 0.02), (mixer.key, 0.02), (mixer.value, 0.02), (mixer.output, 0.02 / 4)):
        assert 0.97 * std < layer.weight.std() < 1.03 * std
        assert layer.bias is None or (layer.bias == 0).all()
    assert 0.8 < mixer.token.std() < 1.2
    assert mixer.tuning() == {}


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (5, 1), (64, 1), (192, 3), (200, 2), (256, 4)])
def test_heads_by_default(width, heads):
    assert make_mixer("aaren", width, {}).heads == heads


def test_the_row_of_the_table():
    assert MIXERS["aaren"].usual == Usual(mlp=4.0, mlp_kind="gelu", norm="layer")
    mixer = make_mixer("aaren", D, {"heads": 3})
    assert type(mixer) is Aaren and mixer.heads == 3
    assert [n for n, _ in mixer.named_parameters()] == [
        "token",
        *(f"{n}.weight" for n in ("query", "key", "value", "output")),
    ]


@pytest.mark.parametrize(
    ("error", "options", "match"),
    [
        (ValueError, {"heads": 0}, "AarenConfig: heads must be at least 1, got 0"),
        (ValueError, {"heads": 4}, "Aaren: heads must divide width = 6, got 4"),
        (TypeError, {"heads": 2.0}, "AarenConfig: heads must be of type int"),
        (TypeError, {"bias": 1}, "AarenConfig: bias must be of type bool"),
    ],
)
def test_bad_options_are_named(error, options, match):
    with pytest.raises(error, match=match):
        make_mixer("aaren", D, options)


def test_bad_arguments_are_named():
    mixer, x = make(2), series(2, 3)
    state, reset = mixer.initial_state(2), torch.zeros(2, 3, dtype=torch.bool)
    for error, match, args in (
        (ValueError, "x must be", (x[..., 1:], None, None)),
        (TypeError, "x must be", (x.tolist(), None, None)),
        (ValueError, "reset must be", (x, None, reset.T)),
        (TypeError, "reset must be", (x, None, reset.long())),
        (ValueError, "state must be of type AarenState,.*got Tensor", (x, state.average, None)),
        (ValueError, r"state.average must be \(B, D\)", (x, mixer.initial_state(3), None)),
        (ValueError, r"state.max must be \(B, H\)", (x, state._replace(max=state.max[:, 1:]), None)),
        (TypeError, "state.weight must be", (x, state._replace(weight=None), None)),
    ):
        with pytest.raises(error, match=f"Aaren: {match}"):
            mixer(args[0], args[1], reset=args[2])
