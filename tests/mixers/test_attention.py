"""Attention: against its definition, against transformers' GPT-2 and Llama, and mode against mode."""

import math

import pytest
import torch
from torch import nn

from conftest import assert_close
from minrnn.mixers import AttentionState, Place, make_mixer
from parity import check_chunks, check_resets, chunked, compare

D, HEADS = 12, 3
POSITIONS = ("learned", "rotary", "none")


def make(positions, dtype=torch.float64, **options):
    """A mixer far from uniform attention, with every parameter that there is."""
    torch.manual_seed(0)
    mixer = make_mixer("attention", D, {"heads": HEADS, "positions": positions, "bias": True, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.3)
    return mixer.to(dtype)


def series(batch, time, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences, of different lengths."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=torch.float64), reset=torch.rand(batch, 7) < 0.3)
    return AttentionState(state.keys.requires_grad_(), state.values.requires_grad_(), state.length)


def rotated(vectors, position):
    """Every pair of channels (i, i + d/2) as a complex number, turned."""
    half = vectors.shape[1] // 2
    turns = torch.tensor([position * 10000 ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(*vectors.split(half, 1)) * torch.exp(1j * turns)
    return torch.cat([turned.real, turned.imag], 1)


def define(mixer, x, reset):
    """Softmax over the steps of its own sequence, for every step, head and sequence alone."""
    size, rows = D // HEADS, []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            begin = max(s for s in range(t + 1) if s == 0 or reset[b, s])
            keys, values, own, q = [], [], 0.0, None
            for s in range(begin, t + 1):
                own = 0.0 if mixer.table is None else mixer.table[s - begin]
                q, k, v = (mixer.input.weight @ (x[b, s] + own) + mixer.input.bias).view(3, HEADS, size)
                if mixer.positions == "rotary":
                    q, k = rotated(q, s - begin), rotated(k, s - begin)
                keys.append(k)
                values.append(v)
            heads = []
            for head in range(HEADS):
                weights = torch.stack([torch.exp(q[head] @ k[head] / size**0.5) for k in keys])
                heads.append((weights[:, None] * torch.stack([v[head] for v in values])).sum(0) / weights.sum())
            rows.append(mixer.output.weight @ torch.cat(heads) + mixer.output.bias + own)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_step_is_the_definition(positions):
    mixer, x, reset = make(positions), series(2, 8), torch.rand(2, 8) < 0.2
    (y, _), expected = mixer(x, reset=reset), define(mixer, x, reset)
    compare((y, ()), (expected, ()), [x, *mixer.parameters()], x.dtype)


def test_it_is_the_attention_of_gpt_2():
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = gpt2.GPT2Config(n_embd=D, n_head=HEADS, attn_pdrop=0, resid_pdrop=0, attn_implementation="eager")
    mixer, theirs, x = make("none"), gpt2.GPT2Attention(config, layer_idx=0).double(), series(2, 9)
    theirs.c_attn.weight, theirs.c_attn.bias = nn.Parameter(mixer.input.weight.T.detach()), mixer.input.bias
    theirs.c_proj.weight, theirs.c_proj.bias = nn.Parameter(mixer.output.weight.T.detach()), mixer.output.bias
    hidden = torch.full((9, 9), -torch.inf, dtype=x.dtype).triu(1)
    expected = theirs(x, attention_mask=hidden[None, None])[0]
    compare((mixer(x)[0], ()), (expected, ()), [x, mixer.input.bias, mixer.output.bias], x.dtype)


def test_rotary_positions_are_those_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    mixer, x, time, size = make("rotary"), series(2, 9), 9, D // HEADS
    angles = torch.arange(time)[:, None] * 10000 ** (-torch.arange(0, size, 2).double() / size)
    angles = torch.cat([angles, angles], -1)[None]
    q, k, v = (part.unflatten(2, (HEADS, size)).transpose(1, 2) for part in mixer.input(x).chunk(3, -1))
    q, k = llama.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    hidden = torch.full((time, time), -torch.inf, dtype=x.dtype).triu(1)
    mixed = torch.softmax(q @ k.mT / size**0.5 + hidden, -1) @ v
    expected = mixer.output(mixed.transpose(1, 2).flatten(2))
    y, state = mixer(x)
    compare((y, ()), (expected, ()), [x, *mixer.parameters()], x.dtype)
    assert_close(state.keys, k, x.dtype)


def test_learned_positions_reach_every_layer_by_the_residual_stream():
    """With the residual connection, the first layer is one without positions over x + p, and hands that on."""
    first, plain, x = make("learned"), make("none"), series(2, 9)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(first.get_parameter(name))
    placed = x + first.table[:9]
    assert_close(x + first(x)[0], placed + plain(placed)[0], x.dtype)
    assert make_mixer("attention", D, {}, Place(1, 2)).table is None


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("positions", POSITIONS)
def test_whole_chunked_and_stepped_agree(positions, time):
    mixer, x = make(positions), series(3, time)
    check_chunks(mixer, x, some_state(mixer, 3), list(mixer.parameters()))


@pytest.mark.parametrize("time", [0, 1, 2, 63])
@pytest.mark.parametrize("positions", POSITIONS)
def test_resets_are_separate_sequences(positions, time):
    mixer = make(positions)
    check_resets(mixer, series(2, time), list(mixer.parameters()))


@pytest.mark.parametrize("positions", POSITIONS)
def test_float32_over_many_steps(positions):
    mixer, exact, x = make(positions, torch.float32), make(positions), series(3, 200, torch.float32)
    reset = torch.rand(3, 200) < torch.tensor([[0.0], [0.01], [0.9]])
    y, _ = mixer(x, reset=reset)
    assert_close(y, exact(x.double(), reset=reset)[0], torch.float32)
    assert_close(chunked(mixer, x, None, [64, 1, 30], reset)[0], y, torch.float32)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_spoiled_cache_ends_at_a_reset(positions):
    """In values and in gradients, for the rows with a reset; the others carry it on."""
    mixer, x, reset = make(positions), series(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    state = some_state(mixer, 2)
    spoiled = AttentionState(*(torch.full_like(part, torch.nan).requires_grad_() for part in state[:2]), state.length)
    for step in (0, 3):
        reset[0] = False
        reset[0, step] = True
        y, last = mixer(x, spoiled, reset=reset)
        assert_close(y[0, step:], mixer(x[:1, step:])[0][0], x.dtype)
        assert not last.keys[0].isnan().any() and not last.values[0].isnan().any()
        assert y[1].isnan().all() and y[0, :step].isnan().all()
        into_x, *into_cache = torch.autograd.grad(y[0, step:].sum(), [x, *spoiled[:2]])
        assert not into_x[0, step:].isnan().any()
        assert step > 0 or all((grad[0] == 0).all() for grad in into_cache)


def test_the_cache_forgets_what_no_sequence_needs():
    mixer, x, reset = make("rotary"), series(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    _, state = mixer(x)
    assert state.keys.shape == state.values.shape == (2, HEADS, 9, D // HEADS) and mixer.state_size is None
    reset[0, 7], reset[1, 4] = True, True
    _, state = mixer(x, state, reset=reset)
    assert state.length.tolist() == [2, 5] and state.keys.shape[2] == 5
    assert (state.keys[0, :, :3] == 0).all() and (state.values[0, :, :3] == 0).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_sixteen_bits(positions):
    mixer, x = make(positions, torch.bfloat16), series(2, 40, torch.bfloat16)
    y, state = mixer(x)
    assert y.dtype == state.keys.dtype == state.values.dtype == torch.bfloat16
    exact = make(positions)
    with torch.no_grad():
        for mine, wanted in zip(mixer.parameters(), exact.parameters(), strict=True):
            wanted.copy_(mine)
    expected, _ = exact(x.double())
    # Rounding errors are those of the largest numbers: of p + y, and of all channels that W_out sums.
    scale = expected.abs().max().item()
    assert_close(y / scale, expected / scale, torch.bfloat16)
    assert_close(chunked(mixer, x, None, [1])[0] / scale, y / scale, torch.bfloat16)
    y.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in mixer.parameters())
    mixer = make(positions, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x.float())
        again, _ = mixer(x, state)
    assert y.dtype == again.dtype == state.keys.dtype == torch.bfloat16


def test_it_begins_as_gpt():
    torch.manual_seed(0)
    mixer = make_mixer("attention", 192, {"bias": True}, Place(0, 8))
    for tensor, std in ((mixer.input.weight, 0.02), (mixer.table, 0.02), (mixer.output.weight, 0.02 / 4)):
        assert abs(tensor.std().item() / std - 1) < 0.02 and abs(tensor.mean().item()) < std / 20
    assert not mixer.input.bias.any() and not mixer.output.bias.any()
    assert mixer.table.shape == (1024, 192) and mixer.tuning() == {}
    plain = make_mixer("attention", 192, {})
    assert plain.input.bias is None and plain.output.bias is None


@pytest.mark.parametrize(("width", "heads"), [(5, 1), (64, 1), (127, 1), (130, 2), (384, 6), (768, 12), (1600, 25)])
def test_heads_have_at_least_64_channels_by_default(width, heads):
    assert make_mixer("attention", width, {"max_length": 1}).heads == heads


def test_dropout_is_for_training_alone():
    mixer, x = make("none", dropout=0.5), series(2, 9)
    y, _ = mixer.train()(x)
    assert (y == 0).any() and (y != 0).any()
    torch.manual_seed(5)
    other, _ = mixer(x)
    assert not torch.equal(y, other)
    assert_close(mixer.eval()(x)[0], make("none")(x)[0], x.dtype)


def test_learned_positions_end_and_others_do_not():
    mixer, x = make("learned", max_length=8), series(2, 9)
    match = "AttentionMixer: a sequence with learned positions must be at most max_length = 8 long, got 9"
    with pytest.raises(ValueError, match=match):
        mixer(x)
    _, state = mixer(x[:, :8])
    with pytest.raises(ValueError, match=match):
        mixer(x[:, :1], state)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    assert mixer(x, reset=reset)[0].shape == x.shape
    for positions in ("rotary", "none"):
        assert make(positions, max_length=8)(x)[0].shape == x.shape


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "state.length must be", lambda s: s._replace(length=s.length[1:])),
        (ValueError, "state.keys must be", lambda s: s._replace(keys=s.keys[1:])),
        (ValueError, "state.keys must be", lambda s: s._replace(keys=s.keys[..., 1:])),
        (ValueError, "state.keys must be", lambda s: s._replace(keys=s.keys[0, 0])),
        (ValueError, "state.values must be", lambda s: s._replace(values=s.values[:, :, 1:])),
        (ValueError, "state must be of type AttentionState, .*got tuple", tuple),
        (TypeError, "state.keys must be a torch.Tensor, got list", lambda s: s._replace(keys=[])),
        (TypeError, "state.length must be a torch.Tensor, got int", lambda s: s._replace(length=3)),
    ],
)
def test_a_state_that_does_not_fit_is_named(error, match, change):
    mixer, x = make("rotary"), series(2, 3)
    with pytest.raises(error, match=f"AttentionMixer: {match}"):
        mixer(x, change(mixer(x)[1]))


@pytest.mark.parametrize(
    ("error", "options", "match"),
    [
        (ValueError, {"heads": 0}, "heads must be at least 1, got 0"),
        (ValueError, {"heads": 5}, "heads must divide width = 12, got 5"),
        (ValueError, {"heads": 4, "positions": "rotary"}, "rotary positions need width / heads to be even, got 12 / 4"),
        (ValueError, {"positions": "sine"}, "positions must be one of learned.*got 'sine'"),
        (ValueError, {"max_length": 0}, "max_length must be at least 1, got 0"),
        (ValueError, {"dropout": 1.0}, "dropout must be in"),
        (ValueError, {"dropout": math.nan}, "dropout must be in"),
        (TypeError, {"heads": 2.0}, "heads must be of type"),
        (TypeError, {"bias": 1}, "bias must be of type bool, got 1"),
    ],
)
def test_bad_options_are_named(error, options, match):
    with pytest.raises(error, match=match):
        make_mixer("attention", D, options)
