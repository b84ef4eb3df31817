"""mLSTM: against its equations step by step, against the authors' package, and mode against mode."""

import pytest
import torch
import torch.nn.functional as F
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple, recurrent_step_stabilized_simple
from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig

from conftest import TOL, assert_close
from minrnn.mixers import MLSTM, MLSTMConfig, MLSTMState, Place, make_mixer
from minrnn.mixers.headwise import HeadwiseLinear, HeadwiseNorm
from minrnn.ops.mlstm import mlstm
from parity import check_chunks, check_resets, chunked, compare, gradients

D = 6
B, H, SIZE = 2, 2, 5


def make(dtype=torch.float64, **options) -> MLSTM:
    """Gates far from where they begin, so that they depend on the input and often open and shut."""
    torch.manual_seed(0)
    mixer = MLSTM(D, MLSTMConfig(**options)).to(dtype)
    with torch.no_grad():
        mixer.gates.weight.normal_(std=0.5)
        mixer.gates.bias.normal_(std=2)
        for part in (mixer.up, mixer.query, mixer.key, mixer.value):
            part.weight.normal_(std=0.7)
    return mixer


def series(batch, time, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


def some_state(mixer, batch):
    """A state from the middle of other sequences."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 7, D, dtype=mixer.up.weight.dtype))
    return MLSTMState(*(part.requires_grad_() for part in state))


def operands(time, begun, dtype=torch.float64):
    """q, k, v, i, f, C, n, m."""
    inputs = [torch.randn(B, time, H, SIZE, dtype=dtype) for _ in range(3)]
    inputs += [torch.randn(B, time, H, dtype=dtype) * 3, torch.randn(B, time, H, dtype=dtype) * 2 + 1]
    matrix, normalizer = torch.zeros(B, H, SIZE, SIZE, dtype=dtype), torch.zeros(B, H, SIZE, dtype=dtype)
    level = torch.full((B, H), -torch.inf, dtype=dtype)
    if begun:
        matrix, normalizer, level = matrix.normal_(), normalizer.normal_(), level.normal_()
    return [x.requires_grad_() for x in (*inputs, matrix, normalizer, level)]


def define(q, k, v, into, forget, matrix, normalizer, level, reset=None):
    """The recurrence as it is written, one step at a time."""
    rows = []
    for t in range(q.shape[1]):
        if reset is not None:
            matrix = torch.where(reset[:, t, None, None, None], 0, matrix)
            normalizer = torch.where(reset[:, t, None, None], 0, normalizer)
            level = torch.where(reset[:, t, None], -torch.inf, level)
        log_f = F.logsigmoid(forget[:, t])
        new = torch.maximum(log_f + level, into[:, t])
        a, b = torch.exp(log_f + level - new), torch.exp(into[:, t] - new) / q.shape[-1] ** 0.5
        level = new
        matrix = a[..., None, None] * matrix + b[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        normalizer = a[..., None] * normalizer + b[..., None] * k[:, t]
        below = torch.maximum((normalizer * q[:, t]).sum(-1).abs(), torch.exp(-level)) + 1e-6
        rows.append((matrix * q[:, t, :, :, None]).sum(-2) / below[..., None])
    return torch.stack(rows, 1), (matrix, normalizer, level)


def compute(*arguments):
    h, *carried = mlstm(*arguments)
    return h, tuple(carried)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("often", [None, 0.0, 0.02, 0.3])
@pytest.mark.parametrize("time", [1, 64, 150])
def test_recurrence_is_its_definition(time, often, begun, dtype):
    inputs = operands(time, begun, dtype)
    if dtype == torch.float32:  # gates as models have them: others make n · q a difference of large numbers
        inputs[4] = (inputs[4].detach() + 3).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in inputs]
    reset = None if often is None else torch.rand(B, time) < often
    actual, expected = compute(*inputs, reset), define(*wide, reset)
    assert_close(actual[0], expected[0], dtype)
    for a, b in zip(actual[1], expected[1], strict=True):
        assert_close(a, b, dtype)
    if dtype == torch.float64:
        compare(actual, define(*inputs, reset), inputs, dtype)
    else:
        for a, b in zip(gradients(*actual, inputs), gradients(*expected, wide), strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5


def test_recurrence_is_the_authors_parallel_form():
    inputs = operands(150, begun=False)
    theirs = parallel_stabilized_simple(
        *(x.transpose(1, 2) for x in inputs[:3]), *(x.transpose(1, 2)[..., None] for x in inputs[3:5])
    )
    compare((mlstm(*inputs)[0], ()), (theirs.transpose(1, 2), ()), inputs[:5], torch.float64)


def test_recurrence_is_the_authors_step():
    inputs = operands(9, begun=True)
    q, k, v, into, forget, matrix, normalizer, level = inputs
    state, rows = (matrix, normalizer[..., None], level[..., None, None]), []
    for t in range(9):
        step = [x[:, t, :, None].clone() for x in (q, k, v)] + [x[:, t, :, None, None] for x in (into, forget)]
        h, state = recurrent_step_stabilized_simple(*state, *step)
        rows.append(h[:, :, 0])
    last = state[0], state[1][..., 0], state[2][..., 0, 0]
    compare(compute(*inputs), (torch.stack(rows, 1), last), inputs, torch.float64)


def test_recurrence_differentiates_twice_and_under_transforms():
    inputs = operands(5, begun=True)
    wide = inputs[:5]
    assert torch.autograd.gradgradcheck(lambda *x: mlstm(*x, *inputs[5:])[0], wide, atol=1e-4)
    row = lambda *x: mlstm(*(part[None] for part in x))[0][0]  # noqa: E731
    assert_close(torch.vmap(row)(*inputs), mlstm(*inputs)[0], torch.float64)


def test_autocast_does_not_reach_its_second_derivative():
    inputs = operands(70, begun=True, dtype=torch.float32)
    total = mlstm(*inputs)[0].square().sum()
    wanted = torch.autograd.grad(total, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(total, inputs, create_graph=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("time", [1, 70])
def test_the_operator_keeps_its_promises(time):
    inputs = operands(time, begun=True)
    inputs[5], inputs[6] = (x.detach().transpose(1, -1).contiguous().transpose(1, -1) for x in inputs[5:7])
    for reset in (None, torch.rand(B, time) < 0.2):
        torch.library.opcheck(torch.ops.minrnn.mlstm.default, (*inputs, reset))


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_gates_of_any_size_are_finite(shift):
    inputs = operands(70, begun=False, dtype=torch.float32)
    inputs[3] = (inputs[3].detach() + shift).requires_grad_()
    h, carried = compute(*inputs)
    assert h.isfinite().all() and all(x.isfinite().all() for x in carried)
    assert all(g.isfinite().all() for g in torch.autograd.grad(h.square().sum(), inputs))


def theirs_with(mixer, width, time):
    """The authors' layer with the weights of ours; and pairs of a parameter of ours and how theirs is read as it."""
    layer = mLSTMLayer(mLSTMLayerConfig(embedding_dim=width, context_length=time, num_heads=mixer.heads)).double()
    cell = layer.mlstm_cell
    pairs = [
        (mixer.up.weight, layer.proj_up.weight, lambda w: w),
        (mixer.conv.weight, layer.conv1d.conv.weight, lambda w: w.T[:, None]),
        (mixer.conv.bias, layer.conv1d.conv.bias, lambda w: w),
        *((getattr(mixer, f"{n}").weight, getattr(layer, f"{n[0]}_proj").weight, lambda w: w) for n in QKV),
        (mixer.gates.weight, (cell.igate.weight, cell.fgate.weight), None),
        (mixer.gates.bias, (cell.igate.bias, cell.fgate.bias), None),
        (mixer.norm.weight, cell.outnorm.weight, lambda w: w - 1),
        (mixer.skip, layer.learnable_skip, lambda w: w),
        (mixer.down.weight, layer.proj_down.weight, lambda w: w),
    ]
    with torch.no_grad():
        for ours, theirs, change in pairs:
            if change is None:
                for part, target in zip(ours.chunk(2), theirs, strict=True):
                    target.copy_(part)
            else:
                theirs.copy_(change(ours))
    return layer, pairs


QKV = ("query", "key", "value")


def test_layer_is_the_authors():
    mixer, x = make(), series(2, 70)
    with torch.no_grad():
        mixer.norm.weight.normal_()
        mixer.skip.normal_()
    layer, pairs = theirs_with(mixer, D, 70)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in mixer.parameters())
    y, expected = mixer(x)[0], layer(x)
    assert_close(y, expected, x.dtype)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), [x, *(pair[0] for pair in pairs)])
    flat = [part for _, theirs, change in pairs for part in (theirs if change is None else (theirs,))]
    theirs = iter(torch.autograd.grad((expected * weight).sum(), [x, *flat]))
    assert_close(ours[0], next(theirs), x.dtype)
    for found, (parameter, _, change) in zip(ours[1:], pairs, strict=True):
        wanted = torch.cat([next(theirs), next(theirs)]) if change is None else next(theirs)
        wanted = wanted[:, 0].T if parameter is mixer.conv.weight else wanted
        assert_close(found, wanted, x.dtype)


def test_layer_begins_as_the_authors():
    torch.manual_seed(0)
    mixer = MLSTM(128, MLSTMConfig(), Place(1, 3))
    assert mixer.inner == 256 and MLSTM(5, MLSTMConfig()).inner == 64
    assert not mixer.gates.weight.any()
    into, forget = mixer.gates.bias.detach().chunk(2)
    assert torch.equal(forget, torch.linspace(3, 6, 4)) and 0 < into.std() < 0.3
    assert (mixer.skip == 1).all() and (mixer.norm.weight == 1).all()
    for weight in (mixer.up.weight, *(getattr(mixer, name).weight for name in QKV)):
        assert weight.std().item() == pytest.approx((2 / (5 * 128)) ** 0.5, rel=0.1)
    assert mixer.down.weight.std().item() == pytest.approx(2 / 3 / 128**0.5, rel=0.1)


@pytest.mark.parametrize("time", [0, 1, 2, 63])
def test_whole_chunked_and_stepped_agree(time):
    mixer, x = make(), series(2, time)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("options", [{"heads": 1}, {"heads": 8, "block": 1}, {"conv": 1, "block": 16}])
def test_other_sizes_agree(options):
    mixer, x = make(**options), series(2, 9)
    check_chunks(mixer, x, some_state(mixer, 2), list(mixer.parameters()))


@pytest.mark.parametrize("time", [1, 2, 63, 140])
def test_resets_are_separate_sequences(time):
    mixer = make()
    check_resets(mixer, series(2, time), list(mixer.parameters()))


def test_rows_with_resets_of_their_own_in_chunks():
    mixer, x = make(), series(4, 130)
    reset = torch.rand(4, 130) < torch.tensor([0.0, 0.01, 0.1, 0.9])[:, None]
    compare(mixer(x, reset=reset), chunked(mixer, x, None, [37], reset), [x, *mixer.parameters()], x.dtype)


@pytest.mark.parametrize("often", [0.0, 0.02])
def test_float32_whole_is_chunked(often):
    mixer, x = MLSTM(D, MLSTMConfig()), series(2, 200, torch.float32)
    reset = torch.rand(2, 200) < often
    wide, double = MLSTM(D, MLSTMConfig()).double(), x.detach().double()
    wide.load_state_dict(mixer.state_dict())
    expected, _ = wide(double, reset=reset)
    assert_close(mixer(x, reset=reset)[0], expected, torch.float32)
    assert_close(chunked(mixer, x, None, [70, 3], reset)[0], expected, torch.float32)


def test_no_output_knows_a_later_input():
    mixer, x = make(), series(2, 70)
    y, _ = mixer(x)
    for t in (0, 5, 63, 64, 68):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all() and (grad[:, : t + 1] != 0).any()


def test_initial_state_is_where_sequences_begin():
    mixer, x = make(), series(3, 6)
    state = mixer.initial_state(3)
    assert mixer.state_size == sum(part[0].numel() for part in state)
    compare(mixer(x, state), mixer(x), [x, *mixer.parameters()], x.dtype)
    assert mixer(x[:0])[0].shape == (0, 6, D)
    assert mixer(x[:0], reset=torch.zeros(0, 6, dtype=torch.bool))[0].shape == (0, 6, D)
    y, after = mixer(x[:, :0], state)
    assert y.shape == (3, 0, D) and all(map(torch.equal, after, state))


def test_16_bit_models_carry_their_memory_in_float32():
    mixer, x = MLSTM(D, MLSTMConfig()).bfloat16(), series(2, 40, torch.bfloat16)
    assert mixer.gates.bias.dtype == torch.float32 and mixer.up.weight.dtype == torch.bfloat16
    y, state = mixer(x)
    assert y.dtype == torch.bfloat16
    for kept in (state, mixer.initial_state(2)):
        assert [part.dtype for part in kept] == [torch.bfloat16] + [torch.float32] * 3
    wide = MLSTM(D, MLSTMConfig()).double()
    wide.load_state_dict(mixer.state_dict())
    expected = wide(x.detach().double())[0]
    for found in (y, chunked(mixer, x, None, [1])[0]):  # the norms amplify the rounding of small h
        assert (found - expected).norm() < TOL[torch.bfloat16]["rtol"] * expected.norm()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in mixer.parameters())


def test_autocast():
    mixer, x = MLSTM(D, MLSTMConfig()), series(2, 40, torch.float32)
    expected, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        again, _ = mixer(x, state)
    assert y.dtype == again.dtype == torch.bfloat16 and {part.dtype for part in state[1:]} == {torch.float32}
    assert (y - expected).norm() < TOL[torch.bfloat16]["rtol"] * expected.norm()
    y.float().sum().backward()
    assert mixer.gates.weight.grad.dtype == torch.float32


def test_what_the_optimiser_is_told():
    asks = make().tuning()["gates.bias"]
    assert asks.keep_float32 and not asks.decay


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 0}, "MLSTMConfig: heads must be at least 1, got 0"),
        ({"conv": 0}, "MLSTMConfig: conv must be at least 1, got 0"),
        ({"block": -1}, "MLSTMConfig: block must be at least 1, got -1"),
        ({"expansion": 0.0}, "MLSTMConfig: expansion must be above 0"),
        ({"expansion": float("inf")}, "MLSTMConfig: expansion must be above 0"),
        ({"heads": 3}, "MLSTM: heads must divide the inner width 64, got 3"),
        ({"block": 5}, "MLSTM: block must divide the inner width 64, got 5"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        make_mixer("mlstm", D, options)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "MLSTM: x must be", lambda x, state: (x[..., 1:], None)),
        (ValueError, "MLSTM: state must be of type MLSTMState,.*got tuple", lambda x, state: (x, tuple(state))),
        (ValueError, "MLSTM: state.conv must be", lambda x, state: (x, state._replace(conv=state.conv[1:]))),
        (ValueError, "MLSTM: state.matrix must be", lambda x, state: (x, state._replace(matrix=state.matrix[:1]))),
        (ValueError, "MLSTM: state.normalizer must be", lambda x, state: (x, state._replace(normalizer=state.level))),
        (TypeError, "MLSTM: state.level must be", lambda x, state: (x, state._replace(level=0.0))),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    mixer, x = make(), series(2, 3)
    with pytest.raises(error, match=match):
        mixer(*change(x, mixer.initial_state(2)))


@pytest.mark.parametrize(("width", "blocks"), [(12, 3), (512, 128), (130, 26), (7, 1), (8, 8)])
def test_headwise_linear_is_block_diagonal(width, blocks):
    linear, x = HeadwiseLinear(width, blocks).double(), torch.randn(2, 3, width, dtype=torch.float64)
    assert_close(linear(x), x @ torch.block_diag(*linear.weight).T, x.dtype)


def test_headwise_norm_is_a_norm_of_each_head():
    norm, x = HeadwiseNorm(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.normal_()
    heads = [
        (part - part.mean(-1, keepdim=True)) / (part.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        for part in x.split(4, -1)
    ]
    assert_close(norm(x), torch.cat(heads, -1) * norm.weight, x.dtype)


@pytest.mark.parametrize("part", [HeadwiseLinear, HeadwiseNorm])
def test_heads_must_divide_the_width(part):
    with pytest.raises(ValueError, match="must divide width = 6, got 4"):
        part(6, 4)
