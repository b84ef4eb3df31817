"""replace_rnn: what is swapped, what is kept, what is left."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset

from conftest import process_group
from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell
from minrnn.replace import replace_rnn

D, H = 3, 4
PAIRS = {nn.GRU: MinGRU, nn.LSTM: MinLSTM, nn.GRUCell: MinGRUCell, nn.LSTMCell: MinLSTMCell}


class OwnGRU(nn.GRU):
    """Somebody's variation."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, D)
        self.rnn = nn.GRU(D, H, batch_first=True)
        self.head = nn.Linear(H, 10)

    def forward(self, tokens):
        output, h_n = self.rnn(self.embedding(tokens))
        return self.head(output), h_n


@pytest.mark.parametrize(
    "module",
    [
        nn.GRU(D, H),
        nn.GRU(D, H, 3, bias=False, batch_first=True, dropout=0.2, bidirectional=True),
        nn.LSTM(D, H, 2, proj_size=2),
        nn.LSTM(D, H, bidirectional=True),
        nn.GRUCell(D, H),
        nn.LSTMCell(D, H, bias=False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
def test_settings_are_kept(module, inside):
    model = nn.ModuleDict({"deep": nn.Sequential(nn.ReLU(), module)}) if inside else module
    new = replace_rnn(model)
    assert (new is model) == inside
    new = new["deep"][1] if inside else new
    assert type(new) is PAIRS[type(module)]
    assert repr(new) == "Min" + repr(module)


def test_device_dtype_mode_and_frozen_parameters_are_kept():
    model = nn.Sequential(nn.GRU(D, H, device="meta"), nn.LSTM(D, H, proj_size=2).double(), nn.GRUCell(D, H).bfloat16())
    model[1].eval()
    model[1].weight_ih_l0.requires_grad_(False)
    model[2].requires_grad_(False)
    replace_rnn(model)
    assert all(p.is_meta for p in model[0].parameters()) and model[0].training
    assert {p.dtype for p in model[1].parameters()} == {torch.float64} and not model[1].training
    assert {name: p.requires_grad for name, p in model[1].named_parameters()} == {
        "weight_ih_l0": False,
        "bias_ih_l0": True,
        "weight_hr_l0": True,
    }
    assert {(p.dtype, p.requires_grad) for p in model[2].parameters()} == {(torch.bfloat16, False)}


def test_weights_that_are_computed_from_others_are_not_frozen():
    gru = nn.utils.weight_norm(nn.GRU(D, H), "weight_ih_l0")
    gru.bias_ih_l0.requires_grad_(False)
    with torch.no_grad():
        gru(torch.randn(3, 2, D))
    trained = {name for name, p in replace_rnn(gru).named_parameters() if p.requires_grad}
    assert trained == {"weight_ih_l0"}


def test_a_module_used_twice_stays_one_module():
    shared = nn.GRU(D, D)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, shared]), "c": nn.GRU(D, D)})
    model["d"] = model["b"]
    replace_rnn(model)
    assert isinstance(model["a"], MinGRU)
    assert model["b"][0] is model["b"][1] is model["a"] is model["d"][0]
    assert model["c"] is not model["a"]


def test_dropout_that_acts_nowhere_is_told_of_once():
    with pytest.warns(UserWarning, match="dropout"):
        gru = nn.GRU(D, H, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace_rnn(gru).dropout == 0.5


def test_subclasses_are_left_and_named():
    model = nn.ModuleDict({"own": OwnGRU(D, H), "plain": nn.GRU(D, H), "elman": nn.RNN(D, H)})
    with pytest.warns(UserWarning, match=r"left as they are, being subclasses: own \(OwnGRU\)$") as caught:
        replace_rnn(model)
    assert caught[0].filename == __file__
    assert type(model["own"]) is OwnGRU and type(model["plain"]) is MinGRU and type(model["elman"]) is nn.RNN
    alone = OwnGRU(D, H)
    with pytest.warns(UserWarning, match="the model itself"):
        assert replace_rnn(alone) is alone


def test_sizes_may_be_numpys():
    """torch takes them in a cell, and for the number of layers."""
    model = nn.ModuleList([nn.GRUCell(np.int64(D), np.int32(H)), nn.GRU(D, H, num_layers=np.int64(2))])
    cell, stack = replace_rnn(model)
    assert repr(cell) == f"MinGRUCell({D}, {H})" and repr(stack) == f"MinGRU({D}, {H}, num_layers=2)"
    assert cell(torch.randn(2, D)).shape == (2, H)


def test_a_model_that_cannot_be_replaced_stays_as_it_was():
    model = nn.ModuleList([nn.GRU(D, H), nn.GRUCell(D, H)])
    model[1].input_size = 0.5
    with pytest.raises(TypeError, match="input_size must be of type int, got float"):
        replace_rnn(model)
    assert type(model[0]) is nn.GRU


def test_what_was_compiled_by_itself_is_refused():
    model = nn.ModuleDict({"plain": nn.GRU(D, H), "deep": nn.Sequential(torch.compile(nn.GRU(D, H)))})
    with pytest.raises(
        ValueError, match=r"torch\.compile, .* called with, .*, got deep\.0\._orig_mod: replace it first"
    ):
        replace_rnn(model)
    assert type(model["plain"]) is nn.GRU
    compiled = torch.compile(nn.Sequential(nn.GRU(D, H)), backend="eager")
    assert replace_rnn(compiled) is compiled
    x = torch.randn(3, 2, D)
    assert torch.equal(compiled(x)[0], compiled._orig_mod[0](x)[0])
    assert type(compiled._orig_mod[0]) is MinGRU
    with pytest.raises(ValueError, match="got _orig_mod"):
        replace_rnn(torch.compile(nn.GRU(D, H)))
    inside = nn.Sequential(nn.GRU(D, H))
    inside[0].compile(backend="eager")
    with pytest.raises(ValueError, match="got 0: replace it first"):
        replace_rnn(inside)


@pytest.fixture
def two_ranks():
    with process_group(2):
        yield


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_is_distributed_is_refused(two_ranks):
    """Its gradients would no longer be shared."""
    model = nn.Sequential(nn.GRU(D, H), nn.Linear(H, 1))
    parallel = nn.parallel.DistributedDataParallel(model)
    sharded, used = (fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (2,))) for _ in range(2))
    used.unshard()  # as in a forward pass: its parameters look like any others
    alone = nn.Sequential(fully_shard(nn.GRU(D, H), mesh=init_device_mesh("cpu", (2,))), nn.GRU(H, H))
    original = FullyShardedDataParallel(copy.deepcopy(model), use_orig_params=True, device_id=torch.device("cpu"))
    for given, path in (
        (parallel, "module.0"),
        (sharded, "0"),
        (used, "0"),
        (alone, "0"),
        (original, "_fsdp_wrapped_module.0"),
        (nn.Sequential(nn.GRU(D, H), parallel), "1.module.0"),
    ):
        with pytest.raises(ValueError, match=f"or FSDP was called with, .*, got {path}: replace"):
            replace_rnn(given)
    functional = nn.GRU(D, H)
    for name in [name for name, _ in functional.named_parameters()]:
        weight = getattr(functional, name).detach()
        delattr(functional, name)
        setattr(functional, name, weight)
    with pytest.raises(ValueError, match="or that has no parameters, got the model itself"):
        replace_rnn(functional)
    own = fully_shard(type("Own", (nn.GRU,), {})(D, H), mesh=init_device_mesh("cpu", (2,)))
    with pytest.warns(UserWarning, match="being subclasses: 0"):
        assert isinstance(replace_rnn(nn.Sequential(own, nn.GRU(H, H)))[1], MinGRU)
    encoder = nn.ModuleDict({"enc": nn.parallel.DistributedDataParallel(nn.Linear(D, H)), "encoder": nn.GRU(D, H)})
    assert isinstance(replace_rnn(encoder)["encoder"], MinGRU)


def test_forget_biases_are_drawn_of_sharded_layers(two_ranks):
    layer = MinLSTM(4, 4, forget_bias=30.0, device="meta")
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    own = layer.bias_ih_l0.to_local()  # of 12 rows, 4 of the forget gate, the first 6
    assert own.shape == (6,) and (own[:4] > 29).all() and (own[4:] < 1).all()


def test_what_still_holds_a_replaced_module_is_named():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = nn.GRU(D, H), nn.Linear(D, H)
            self.layers, self.table, self.plain = [self.first], {"first": self.first}, [self.other, 1]

    with pytest.warns(UserWarning, match=r"what was replaced is still in 0\.layers, 0\.table$"):
        replace_rnn(nn.Sequential(Listed()))


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"replace_rnn: model must be a torch\.nn\.Module, got str"):
        replace_rnn("model")


def test_the_model_trains_on():
    torch.manual_seed(0)
    model = replace_rnn(Model())
    tokens = torch.arange(10).repeat(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        logits, _ = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_packed_input_passes_through_a_replaced_model():
    packed = pack_sequence([torch.randn(n, D) for n in (2, 5)], enforce_sorted=False)
    theirs = nn.LSTM(D, H, bidirectional=True)
    expected, (h, _) = theirs(packed)
    output, (h_n, _) = replace_rnn(theirs)(packed)
    assert output.data.shape == expected.data.shape and h_n.shape == h.shape


class Encoded(Dataset):
    """A data set that runs a model, as one with a feature extractor does."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.manual_seed(index)
        with torch.no_grad():
            return self.model(torch.randint(10, (2, 300)))[0]


@pytest.mark.timeout(120)
def test_a_replaced_model_runs_in_forked_workers_after_it_ran_here():
    torch.set_num_threads(2)
    model = replace_rnn(Model())
    model(torch.randint(10, (8, 2000)))[0].sum().backward()  # threads are up before the fork
    expected = torch.stack([Encoded(model)[i] for i in range(4)])
    loader = DataLoader(Encoded(model), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)
    model(torch.randint(10, (8, 2000)))[0].sum().backward()
