"""Every mixer of the table, by its name alone: one contract."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves, tree_map

from conftest import assert_close, process_group
from minrnn._shapes import accumulate_dtype
from minrnn.mixers import MIXERS, Mixer, detach_state, make_mixer
from minrnn.mixers.contract import Place, plain
from minrnn.models import BackboneConfig, LanguageModel, LanguageModelConfig, generate, load, parameter_groups, save
from parity import check_resets, chunked, compare

D = 8
CONSTANT = [name for name in MIXERS if make_mixer(name, D, {}).state_size is not None]


def make(name: str, dtype: torch.dtype = torch.float64) -> Mixer:
    """A mixer whose parameters have left their initial values, which are zero for some."""
    torch.manual_seed(0)
    mixer = make_mixer(name, D, {}, Place(1, 3)).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def assert_near(actual, expected, dtype):
    """Equal within the tolerance of `dtype`, as vectors: norms within a mixer make large what is small by accident."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert_close(error, torch.zeros(()), dtype)


def series(batch, time, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, D, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("name", MIXERS)
def test_whole_chunks_steps_and_resets_agree(name):
    mixer, x, reset = make(name), series(3, 19), torch.rand(3, 19) < 0.2
    inputs = [x, *mixer.parameters()]
    whole = mixer(x, reset=reset)
    for sizes in ([1], [2, 3], [7, 1, 64]):
        compare(whole, chunked(mixer, x, None, sizes, reset), inputs, x.dtype)
    check_resets(mixer, x, list(mixer.parameters()))


@pytest.mark.parametrize("name", MIXERS)
def test_float32_over_a_thousand_steps(name):
    mixer, exact, x = make(name, torch.float32), make(name), series(1, 1000, torch.float32)
    with torch.no_grad():
        for mine, wanted in zip(mixer.parameters(), exact.parameters(), strict=True):
            wanted.copy_(mine)
        y, _ = mixer(x)
        pieces, _ = chunked(mixer, x, None, [333, 1])
        wanted, _ = exact(x.double())
    scale = wanted.abs().max().item()  # of what rounding errors are made
    assert_close(y / scale, wanted / scale, torch.float32)
    assert_close(pieces / scale, wanted / scale, torch.float32)


@pytest.mark.parametrize("name", MIXERS)
def test_no_output_knows_a_later_input(name):
    mixer, x = make(name), series(2, 7)
    y, _ = mixer(x)
    for t in range(7):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        # An FFT mixes all times, to rounding: what is not there is 1e-16 of what is.
        assert (grad[:, t + 1 :].abs() <= 1e-12).all()
        assert (grad[:, t] != 0).any()


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_the_same_where_they_are_differentiated_again(name):
    mixer, x, reset = make(name), series(2, 7), torch.rand(2, 7) < 0.3
    y, _ = mixer(x, reset=reset)
    inputs = [x, *mixer.parameters()]
    wanted = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    for a, b in zip(torch.autograd.grad(y.square().sum(), inputs, create_graph=True), wanted, strict=True):
        assert_close(a, b, x.dtype)


# PyTorch itself refuses the others: the gradient of silu has no tangent, that of its attention kernel no gradient.
@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"mamba", "mlstm", "slstm", "attention"}))
def test_forward_mode_over_a_backward_pass(name):
    """The tangent of a gradient is the second derivative that going backward twice gives."""
    mixer, x, reset = make(name), series(2, 7), torch.rand(2, 7) < 0.3
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(mixer(x, reset=reset)[0].square().sum(), x, create_graph=True)
    (backward,) = torch.autograd.grad(gradient, x, direction)
    with forward_ad.dual_level():
        y, _ = mixer(forward_ad.make_dual(x, direction), reset=reset)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert_close(forward_ad.unpack_dual(gradient).tangent, backward, x.dtype)


@pytest.mark.parametrize("name", MIXERS)
def test_any_size_and_any_stride(name):
    mixer, x = make(name), series(3, 6)
    for view in (x.transpose(0, 1), x[::2, 1::3], x[:1].expand(3, -1, -1)):
        compare(mixer(view), mixer(view.contiguous()), [x], x.dtype)
    for batch, time in ((0, 4), (2, 0), (0, 0), (1, 1)):
        y, state = mixer(x[:batch, :time])
        assert y.shape == (batch, time, D)
        again, _ = mixer(x[:batch], state)
        assert again.shape == (batch, 6, D)
        again.sum().backward()


@pytest.mark.parametrize("name", MIXERS)
def test_nothing_is_where_sequences_begin(name):
    mixer, x = make(name), series(3, 6)
    compare(mixer(x, mixer.initial_state(3)), mixer(x), [x, *mixer.parameters()], x.dtype)


def refilled(mixer, state, batch):
    """An initial state into whose tensors those of another one were written."""
    slots = mixer.initial_state(batch)
    with torch.no_grad():
        for slot, leaf in zip(tree_leaves(slots), tree_leaves(state), strict=True):
            slot.copy_(leaf)
    return slots


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_state_can_be_written_into_an_initial_one(name, learned):
    if learned and name not in ("mingru", "minlstm"):
        pytest.skip("begins with nothing learned")
    torch.manual_seed(0)
    options = {"learn_initial_state": True, "activation": "identity"} if learned else {}
    for batch, time in ((1, 2), (3, 40)):
        mixer, x = make_mixer(name, D, options).double(), series(batch, 20 + time)
        before = {key: value.clone() for key, value in mixer.state_dict().items()}
        with torch.no_grad():
            _, state = mixer(x[:, :20])
            for steps in (1, time):
                wanted, _ = mixer(x[:, 20 : 20 + steps], state)
                assert_close(mixer(x[:, 20 : 20 + steps], refilled(mixer, state, batch))[0], wanted, x.dtype)
        leaves = tree_leaves(mixer.initial_state(batch))
        spans = sorted((leaf.data_ptr(), leaf.data_ptr() + leaf.nbytes) for leaf in leaves if leaf.numel())
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert all(torch.equal(value, before[key]) for key, value in mixer.state_dict().items())


@pytest.mark.parametrize("time", [3, 12])
@pytest.mark.parametrize("name", MIXERS)
def test_a_state_that_a_reset_ends_is_in_no_gradient(name, time):
    mixer, x = make(name), series(2, 5 + time)
    _, state = mixer(x[:, :5].detach())
    spoiled = tree_map(torch.clone, detach_state(state))
    for leaf in tree_leaves(spoiled):
        if leaf.is_floating_point() or leaf.is_complex():
            leaf[1] = torch.nan
    reset = torch.zeros(2, time, dtype=torch.bool)
    reset[1, 0] = True
    inputs = [x, *mixer.parameters()]
    y, _ = mixer(x[:, 5:], detach_state(state), reset=reset)
    wanted = torch.autograd.grad(y.square().sum(), inputs)
    got, _ = mixer(x[:, 5:], spoiled, reset=reset)
    assert_close(got, y, x.dtype)
    for a, b in zip(torch.autograd.grad(got.square().sum(), inputs), wanted, strict=True):
        assert_close(a, b, x.dtype)


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXERS)
def test_a_state_may_be_kept_in_another_precision(name, model, kept):
    """What follows is as exact as the numbers that were kept, and comes in the usual dtypes."""
    mixer, x = make(name, model), series(2, 9, model)
    _, state = mixer(x[:, :4])

    def cast(leaf):
        return leaf.to(kept).to(leaf.dtype) if leaf.is_floating_point() else leaf

    rounded = tree_map(cast, detach_state(state))
    stored = tree_map(lambda leaf: leaf.to(kept) if leaf.is_floating_point() else leaf, detach_state(state))
    y, after = mixer(x[:, 4:], rounded)
    got, afterwards = mixer(x[:, 4:], stored)
    assert got.dtype == y.dtype
    assert [leaf.dtype for leaf in tree_leaves(afterwards)] == [leaf.dtype for leaf in tree_leaves(after)]
    assert_near(got, y, model)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_cast_with_their_parameters(name):
    mixer = make(name, torch.float32)
    mixer(series(2, 9, torch.float32))[0].sum().backward()
    mixer.bfloat16()
    assert all(each.grad.dtype == each.dtype for each in mixer.parameters() if each.grad is not None)


@pytest.mark.parametrize("name", MIXERS)
def test_a_reset_on_another_device_is_named(name):
    with pytest.raises(ValueError, match="reset must be on cpu as the input is, got meta"):
        make(name)(series(2, 9), reset=torch.zeros(2, 9, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_on_another_device_is_named(name):
    mixer, x = make(name), series(2, 3)
    with pytest.raises(ValueError, match=": x must be on cpu as the weights are, got meta"):
        mixer(x.to("meta"))
    if name not in ("s4", "s4d", "h3"):  # their states are formed late
        _, state = mixer(x)
        with pytest.raises(ValueError, match=r": state.* must be on cpu as the weights are, got meta"):
            mixer(x, tree_map(lambda leaf: leaf.to("meta"), state))


@pytest.mark.parametrize("name", CONSTANT)
def test_the_state_has_the_size_it_says(name):
    mixer = make(name)
    for state in (mixer.initial_state(2), mixer(series(2, 9))[1]):
        numbers = sum(leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in tree_leaves(state))
        assert numbers == 2 * mixer.state_size


@pytest.mark.parametrize("name", sorted(MIXERS.keys() - set(CONSTANT)))
def test_a_state_that_grows_says_so_and_does(name):
    mixer = make(name)
    sizes = [sum(leaf.numel() for leaf in tree_leaves(mixer(series(1, time))[1])) for time in (5, 10, 20)]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_keep_decays_in_float32(name, dtype):
    mixer = make(name, dtype)
    for parameter, asks in mixer.tuning().items():
        assert mixer.get_parameter(parameter).dtype == (torch.float32 if asks.keep_float32 else dtype)
    x = series(2, 40, dtype)
    y, _ = mixer(x)
    assert y.dtype == dtype and y.isfinite().all()
    y.float().sum().backward()
    assert x.grad.isfinite().all()
    assert (
        make(name).to(dtype).double().get_parameter(next(iter(dict(mixer.named_parameters())))).dtype == torch.float64
    )
    widened = copy.deepcopy(mixer).float()
    wanted, _ = widened(x.float())
    assert_near(y, wanted, torch.bfloat16)
    assert {leaf.dtype for leaf in tree_leaves(mixer.initial_state(1)) if leaf.is_floating_point()} <= {
        dtype,
        accumulate_dtype(dtype),
    }


@pytest.mark.parametrize("name", MIXERS)
def test_sixteen_bits_may_be_the_default(name):
    torch.manual_seed(0)
    wanted = make_mixer(name, D, {}).to(torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        mixer = make_mixer(name, D, {})
        assert torch.get_default_dtype() == torch.bfloat16
        mixer(torch.randn(1, 3, D))
    finally:
        torch.set_default_dtype(before)
    for (own, tensor), (other, like) in zip(mixer.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert own == other and tensor.dtype == like.dtype and torch.equal(tensor, like)


class Adapted(torch.nn.Module):
    """A linear map with something added, as adapters of low rank are put in a layer's place."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.mT @ self.up.mT


@pytest.mark.parametrize(("name", "part"), [("aaren", "key"), ("mlstm", "gates")])
def test_an_adapter_acts_as_its_weights_would(name, part):
    mixer, x = make(name), series(2, 30)
    adapted = copy.deepcopy(mixer)
    setattr(adapted, part, layer := Adapted(getattr(adapted, part)))
    with torch.no_grad():
        getattr(mixer, part).weight += layer.up @ layer.down
    assert_close(adapted(x)[0], mixer(x)[0], torch.float64)
    adapted(x)[0].sum().backward()
    assert layer.up.grad is not None and layer.up.grad.any()


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "part"), [("aaren", "key"), ("mlstm", "gates"), ("gru", "rnn"), ("lstm", "rnn")])
def test_parametrized_layers_follow_what_they_are_made_from(name, part, dtype):
    mixer, x = make(name, dtype), series(2, 30, dtype)
    weight = "weight_hh_l0" if part == "rnn" else "weight"
    made = copy.deepcopy(mixer)
    parametrize.register_parametrization(getattr(made, part), weight, Doubled())
    with torch.no_grad():
        getattr(getattr(mixer, part), weight).mul_(2)
    assert torch.equal(made(x)[0], mixer(x)[0])


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("name", "part"), [("aaren", "key"), ("mlstm", "gates"), ("gru", "rnn"), ("lstm", "rnn")])
def test_layers_with_hooks_run_in_16_bits(name, part, resets):
    mixer, x = make(name, torch.bfloat16), series(2, 9, torch.bfloat16)
    reset, seen = torch.rand(2, 9) < 0.3 if resets else None, []
    wanted = mixer(x, reset=reset)[0]
    getattr(mixer, part).register_forward_hook(lambda *_: seen.append(True))
    y, state = mixer(x, reset=reset)
    assert seen and y.dtype == torch.bfloat16
    assert_near(y, wanted, torch.bfloat16)
    assert [each.dtype for each in tree_leaves(state)] == [each.dtype for each in tree_leaves(mixer.initial_state(2))]


def test_compiled_layers_are_known_as_plain_as_eager_ones_are():
    """If not, they are called, and the gates of mLSTM rounded to 16 bits on the way."""
    layer, x = nn.Linear(2, 2), torch.ones(3)
    hooked, own = copy.deepcopy(layer), copy.deepcopy(layer)
    hooked.register_forward_hook(lambda *_: None)
    own.forward = lambda x: x
    for each, wanted in ((layer, 1), (hooked, -1), (own, -1)):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, each=each: x if plain(each, nn.Linear) else -x, backend="eager", fullgraph=True
        )
        assert torch.equal(compiled(x), wanted * x)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("name", "part"), [("aaren", "key"), ("mlstm", "gates"), ("gru", "rnn"), ("lstm", "rnn")])
def test_pruned_layers_follow_what_they_are_made_from(name, part, resets):
    mixer, x = make(name), series(2, 30)
    reset = torch.rand(2, 30) < 0.2 if resets else None
    pruned = copy.deepcopy(mixer)
    weight = "weight_hh_l0" if part == "rnn" else "weight"
    prune.l1_unstructured(getattr(pruned, part), weight, amount=0.5)
    mask = getattr(getattr(pruned, part), f"{weight}_mask")
    with torch.no_grad():
        getattr(getattr(pruned, part), f"{weight}_orig").mul_(2)
        getattr(getattr(mixer, part), weight).mul_(2 * mask)
    for own, wanted in zip(tree_leaves(pruned(x, reset=reset)), tree_leaves(mixer(x, reset=reset)), strict=True):
        assert_close(own, wanted, torch.float64)
    for _ in range(2):  # as in training: the graph is made anew
        pruned(x, reset=reset)[0].sum().backward()


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_gives_what_linear_gives(name):
    mixer, x = make(name, torch.float32), series(2, 30, torch.float32)
    wanted, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = mixer(x)
        pieces, _ = chunked(mixer, x, None, [7, 1])
    assert y.dtype == torch.bfloat16
    assert_near(y, wanted, torch.bfloat16)
    assert_near(pieces, wanted, torch.bfloat16)
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


@pytest.mark.parametrize("name", MIXERS)
def test_copies_give_the_same(name):
    mixer, x = make(name), series(2, 9)
    for copied in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(copied(x)[0], mixer(x)[0])
    fresh = make_mixer(name, D, {}, Place(1, 3)).double()
    fresh.load_state_dict(mixer.state_dict())
    assert torch.equal(fresh(x)[0], mixer(x)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_without_its_graph_goes_on(name):
    mixer, x = make(name), series(2, 9)
    _, state = mixer(x[:, :5])
    y, _ = mixer(x[:, 5:], detach_state(state))
    assert_close(y, mixer(x)[0][:, 5:], x.dtype)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad[:, :5] == 0).all()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "x must be", lambda x, state, reset: (x[0], None, None)),
        (ValueError, "x must be", lambda x, state, reset: (x[..., 1:], None, None)),
        (TypeError, "x must be", lambda x, state, reset: (x.tolist(), None, None)),
        (ValueError, "state", lambda x, state, reset: (x[:1], state, None)),
        ((ValueError, TypeError), "state", lambda x, state, reset: (x, "state", None)),
        ((ValueError, TypeError), "state", lambda x, state, reset: (x, (1, 2), None)),
        ((ValueError, TypeError), "state", lambda x, state, reset: (x, torch.zeros(2, 3), None)),
        (ValueError, "reset must be", lambda x, state, reset: (x, None, reset[:, 1:])),
        (TypeError, "reset must be", lambda x, state, reset: (x, None, reset.long())),
    ],
)
def test_bad_arguments_are_named(name, error, match, change):
    mixer, x = make(name), series(2, 3)
    x, state, reset = change(x, mixer(x)[1], torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(error, match=rf": {match}.*got"):
        mixer(x, state, reset=reset)


@pytest.mark.parametrize("name", MIXERS)
def test_other_dtypes_are_refused(name):
    mixer, x = make(name, torch.float32), series(2, 12, torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        for time in (1, 12):
            with pytest.raises(ValueError, match=rf": x must be torch.float32.*got {dtype}"):
                mixer(x[:, :time].to(dtype))
    _, state = copy.deepcopy(mixer).double()(x.double())
    with pytest.raises(ValueError, match=r": state.* must be torch\.\w+, got torch\.\w+"):
        mixer(x, state)


@pytest.mark.parametrize("name", MIXERS)
def test_the_table_builds_and_describes_it(name):
    entry = MIXERS[name]
    made = make_mixer(name, 64, {})
    assert isinstance(made, Mixer) and isinstance(entry.config(), entry.config)
    assert entry.equation and entry.parallel and entry.cost
    assert "Source" in (type(made).__doc__ or "") and entry.config.__doc__
    assert all(field.name in entry.config.__doc__ for field in dataclasses.fields(entry.config))
    with pytest.raises(ValueError, match=f"options of {name} must be among .*, got 'nothing'"):
        make_mixer(name, D, {"nothing": 1})


@pytest.mark.parametrize("name", MIXERS)
def test_a_language_model_learns_generates_and_is_stored(name, tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(5, BackboneConfig(16, 2, name, dropout=0.0)))
    tokens = torch.arange(64).remainder(5).expand(4, -1)
    optimizer, losses = torch.optim.AdamW(parameter_groups(model, 3e-3, 0.1)), []
    for _ in range(15):
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    made = list(generate(model, [0, 1, 2], max_new_tokens=12, temperature=0))
    so_far = [0, 1, 2]
    with torch.no_grad():
        for token in made:
            logits = model(torch.tensor([so_far]))[0][0, -1]
            assert logits[token] >= logits.max() - 1e-4
            so_far.append(token)
    save(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_parameters_get_the_rates_that_they_ask_for(name):
    model = LanguageModel(LanguageModelConfig(5, BackboneConfig(16, 2, name)))
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, 1e-2, 0.1)
        for p in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    few = torch.optim.AdamW(parameter_groups(model, 1e-6, 0.1))  # below all limits; a checkpoint's rate may change
    few.load_state_dict(torch.optim.AdamW(parameter_groups(model, 1e-2, 0.1)).state_dict())
    for mixer in model.modules():
        if isinstance(mixer, Mixer):
            for parameter, asks in mixer.tuning().items():
                rate, decay = rates[id(mixer.get_parameter(parameter))]
                assert rate == min(1e-2 * asks.lr_scale, asks.lr_limit)
                assert decay == 0 or asks.decay


class Scaled(torch.nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


@pytest.mark.parametrize("name", MIXERS)
def test_a_parametrized_parameter_asks_for_the_same(name):
    mixer = make(name)
    asked = mixer.tuning()
    for path in asked:
        place, _, own = path.rpartition(".")
        parametrize.register_parametrization(mixer.get_submodule(place), own, Scaled())
    assert sorted(mixer.tuned().values()) == sorted(asked.values())
    rates = {id(p): group["lr"] for group in parameter_groups(mixer, 1e-2, 0.1) for p in group["params"]}
    mixer.bfloat16()
    for parameter, asks in mixer.tuned().items():
        assert rates[id(parameter)] == min(1e-2 * asks.lr_scale, asks.lr_limit)
        assert parameter.dtype == (torch.float32 if asks.keep_float32 else torch.bfloat16)


@pytest.mark.parametrize(("width", "expansion", "hidden"), [(50, 2.3, 115), (100, 1.15, 115), (10, 0.77, 7)])
def test_a_width_is_no_less_than_its_product(width, expansion, hidden):
    """2.3 times 50 is 114.99999999999999 for a processor."""
    for name in ("mingru", "gru"):
        assert make_mixer(name, width, {"expansion": expansion}).hidden == hidden
    assert make_mixer("mamba", width, {"expansion": expansion}).input.out_features == hidden
    assert make_mixer("mlstm", 1600, {"expansion": 2.2}).inner == 3520


def test_a_place_that_is_none_is_refused():
    for place in (Place(3), Place(-1, 2), Place(2, 2)):
        with pytest.raises(ValueError, match=r"place must have a layer from 0 to below its layers, got Place"):
            make_mixer("rwkv4", D, {}, place)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MIXERS)
def test_blocks_may_be_sharded_one_by_one(name):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(5, BackboneConfig(8, 2, name, conv=2))).eval()
    tokens = torch.randint(5, (2, 9))
    wanted, _ = model(tokens)
    with process_group(1):
        for part in (*model.backbone.blocks, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        assert_close(model(tokens)[0], wanted, torch.float32)
