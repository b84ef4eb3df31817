"""MinGRU, MinLSTM and their cells behave as nn.GRU, nn.LSTM and theirs, which run beside them wherever they can."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from minrnn.layers import ArgumentError, MinGRU, MinGRUCell, MinLSTM, MinLSTMCell

D, H, B, T = 3, 4, 2, 5
TWINS = [(nn.GRU, MinGRU), (nn.LSTM, MinLSTM)]
CELLS = [(nn.GRUCell, MinGRUCell), (nn.LSTMCell, MinLSTMCell)]
ALL = [MinGRU, MinLSTM, MinGRUCell, MinLSTMCell]
SHAPES = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"batch_first": True, "bidirectional": True, "num_layers": 2},
    {"bias": False, "batch_first": True},
]
WITH_PROJECTION = [(nn.LSTM, MinLSTM, {**options, "proj_size": 2}) for options in SHAPES]


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


def initial(rnn, batch):
    states = rnn.num_layers * (2 if rnn.bidirectional else 1)
    carried = torch.randn(states, *batch, H)
    return (torch.randn(states, *batch, rnn.proj_size or H), carried) if "LSTM" in type(rnn).__name__ else carried


@pytest.mark.parametrize("form", ["batched", "unbatched", "packed", "packed-sorted"])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize(
    ("theirs", "ours", "options"), [(*t, o) for t in TWINS for o in SHAPES] + WITH_PROJECTION, ids=str
)
def test_shapes_orders_and_counts_of_what_is_returned(theirs, ours, options, with_hx, form):
    theirs, ours = theirs(D, H, **options), ours(D, H, **options)
    x = {
        "batched": torch.randn(*((B, T) if theirs.batch_first else (T, B)), D),
        "unbatched": torch.randn(T, D),
        "packed": pack_sequence([torch.randn(n, D) for n in (2, 5)], enforce_sorted=False),
        "packed-sorted": pack_sequence([torch.randn(n, D) for n in (5, 2)]),
    }[form]
    hx = initial(theirs, () if form == "unbatched" else (B,)) if with_hx else None
    (expected, expected_states), (output, states) = theirs(x, hx), ours(x, hx)
    if isinstance(x, PackedSequence):
        assert isinstance(output, PackedSequence)
        for mine, other in zip(output[1:], expected[1:], strict=True):
            assert mine is other is None or torch.equal(mine, other)
        output, expected = output.data, expected.data
    assert output.shape == expected.shape and output.dtype == expected.dtype
    assert output.is_contiguous()
    assert type(states) is type(expected_states)
    assert [s.shape for s in as_tuple(states)] == [s.shape for s in as_tuple(expected_states)]
    assert len({s.data_ptr() for s in as_tuple(states)}) == len(as_tuple(states))


@pytest.mark.parametrize("shape", [(B, D), (D,)], ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize(("theirs", "ours"), CELLS)
def test_cells_return_the_same_shapes(theirs, ours, with_hx, shape):
    x, h = torch.randn(shape), torch.randn(*shape[:-1], H)
    hx = ((h, h) if theirs is nn.LSTMCell else h) if with_hx else None
    expected, states = theirs(D, H)(x, hx), ours(D, H)(x, hx)
    assert type(states) is type(expected)
    assert [s.shape for s in as_tuple(states)] == [s.shape for s in as_tuple(expected)]


@pytest.mark.parametrize(
    ("theirs", "ours", "options"), [(*t, o) for t in TWINS for o in SHAPES] + WITH_PROJECTION, ids=str
)
def test_parameters_are_named_and_ordered_as_theirs_without_the_recurrent_ones(theirs, ours, options):
    theirs, ours = theirs(D, H, **options), ours(D, H, **options)
    assert list(ours.state_dict()) == [name for name in theirs.state_dict() if "_hh_" not in name]
    blocks = 2 if isinstance(ours, MinGRU) else 3
    for name, parameter in ours.named_parameters():
        other = getattr(theirs, name)
        rows = other.shape[0] if "hr" in name else blocks * H
        assert parameter.shape == (rows, *other.shape[1:])
    names = {id(p): name for name, p in ours.named_parameters()}
    expected = [[n for n in group if "_hh_" not in n] for group in theirs._all_weights]
    assert [[names[id(p)] for p in group] for group in ours.all_weights] == expected
    assert ours.flatten_parameters() is None
    assert repr(ours) == "Min" + repr(theirs)


@pytest.mark.parametrize(("theirs", "ours"), CELLS)
def test_parameters_and_repr_of_cells(theirs, ours):
    for bias in (True, False):
        assert repr(ours(D, H, bias)) == "Min" + repr(theirs(D, H, bias))
        names = [name for name in theirs(D, H, bias).state_dict() if "_hh" not in name]
        assert list(ours(D, H, bias).state_dict()) == names


def test_own_options_show_in_the_repr():
    assert repr(MinGRU(3, 4, activation="tanh", learn_initial_state=True)) == (
        "MinGRU(3, 4, activation=tanh, learn_initial_state=True)"
    )
    assert repr(MinLSTMCell(3, 4, normalize=False, forget_bias=3.0)) == (
        "MinLSTMCell(3, 4, normalize=False, forget_bias=3.0)"
    )


def test_positions_of_arguments_are_those_of_torch():
    assert repr(MinGRU(3, 4, 2, False, True, 0.1, True, "cpu", torch.float64)) == "Min" + repr(
        nn.GRU(3, 4, 2, False, True, 0.1, True)
    )
    assert repr(MinLSTM(3, 4, 2, False, True, 0.1, True, 2, "cpu", torch.float64)) == "Min" + repr(
        nn.LSTM(3, 4, 2, False, True, 0.1, True, 2)
    )
    assert MinLSTMCell(3, 4, False, "meta", torch.float64).weight_ih.dtype == torch.float64


# --- errors: whoever catches theirs catches ours ---

CONSTRUCTIONS = [
    {"input_size": 0},
    {"input_size": -1},
    {"input_size": 3.0},
    {"input_size": "3"},
    {"hidden_size": 0},
    {"hidden_size": -4},
    {"hidden_size": 4.0},
    {"hidden_size": None},
    {"num_layers": 0},
    {"num_layers": -1},
    {"num_layers": 1.5},
    {"bias": 1},
    {"batch_first": "yes"},
    {"dropout": -0.1},
    {"dropout": 1.5},
    {"dropout": float("nan")},
    {"dropout": True},
    {"dropout": "0.5"},
    {"dropout": "half"},
    {"dropout": None},
    {"dtype": torch.int64},
]
PROJECTIONS = [{"proj_size": -1}, {"proj_size": H}, {"proj_size": H + 1}, {"proj_size": 1.5}]


def assert_same_error(theirs, ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as expected:
            theirs()
        with pytest.raises(expected.type) as caught:
            ours()
    return caught.value


@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [(*t, o) for t in TWINS for o in CONSTRUCTIONS] + [(*TWINS[1], o) for o in PROJECTIONS],
    ids=str,
)
def test_construction_refuses_what_theirs_refuses(theirs, ours, options):
    options = {"input_size": D, "hidden_size": H} | options
    assert_same_error(lambda: theirs(**options), lambda: ours(**options))


@pytest.mark.parametrize("options", [{"hidden_size": -4}, {"hidden_size": 4.0}, {"input_size": "3"}], ids=str)
@pytest.mark.parametrize(("theirs", "ours"), CELLS)
def test_construction_of_cells_refuses_what_theirs_refuses(theirs, ours, options):
    options = {"input_size": D, "hidden_size": H} | options
    assert_same_error(lambda: theirs(**options), lambda: ours(**options))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"activation": "relu"}, "activation must be one of .*'g'.*, got 'relu'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ],
)
def test_construction_errors_say_what_was_wanted(kind, options, text):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {text}"):
        kind(**({"input_size": D, "hidden_size": H} | options))


@pytest.mark.parametrize("kind", [MinLSTM, MinLSTMCell])
def test_a_forget_bias_needs_a_bias(kind):
    with pytest.raises(ValueError, match=r"forget_bias must be 0 without a bias, got 3\.0"):
        kind(D, H, bias=False, forget_bias=3.0)


@pytest.mark.parametrize(("theirs", "ours"), TWINS)
def test_dropout_with_one_layer_warns_as_theirs(theirs, ours):
    for kind in (theirs, ours):
        with pytest.warns(UserWarning, match="num_layers") as caught:
            kind(D, H, dropout=0.5)
    assert caught[0].filename == __file__  # ours, which came last, points at the caller


X = torch.zeros(T, B, D)
STATE = torch.zeros(1, B, H)
CALLS = {
    "1-D input": (torch.zeros(D), None),
    "4-D input": (X[None], None),
    "input size": (X[..., 1:], None),
    "integer input": (X.long(), None),
    "float64 input": (X.double(), None),
    "float16 input": (X.half(), None),
    "input on another device": (X.to("meta"), None),
    "2-D hx": (X, STATE[0]),
    "3-D hx for one sequence": (X[:, 0], STATE),
    "hx of another batch": (X, STATE[:, :1]),
    "hx of more layers": (X, STATE.expand(2, B, H)),
    "hx of another width": (X, STATE[..., 1:]),
    "float64 hx": (X, STATE.double()),
    "bfloat16 hx": (X, STATE.bfloat16()),
    "integer hx": (X, STATE.long()),
    "hx on another device": (X, STATE.to("meta")),
    "packed input size": (pack_sequence([X[:, 0, 1:], X[:2, 1, 1:]]), None),
    "packed float64 input": (pack_sequence([X[:, 0].double()]), None),
    "packed, hx of another batch": (pack_sequence([X[:, 0], X[:2, 1]]), STATE[:, :1]),
    "packed unsorted, hx of another batch": (pack_sequence([X[:2, 0], X[:, 1]], enforce_sorted=False), STATE[:, :1]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("theirs", "ours"), TWINS)
def test_calls_refuse_what_theirs_refuse(theirs, ours, call):
    x, hx = CALLS[call]
    if hx is not None and theirs is nn.LSTM:
        hx = (hx, hx)
    error = assert_same_error(lambda: theirs(D, H)(x, hx), lambda: ours(D, H)(x, hx))
    assert isinstance(error, ArgumentError)
    assert f"{ours.__name__}: {'hx' if 'hx' in call else 'input'}" in str(error) and ", got " in str(error)


def test_packed_input_refuses_a_2d_state_as_theirs():  # (nn.LSTM stumbles over an IndexError there)
    packed = pack_sequence([X[:, 0], X[:2, 1]])
    assert_same_error(lambda: nn.GRU(D, H)(packed, STATE[0]), lambda: MinGRU(D, H)(packed, STATE[0]))


CELL_CALLS = {
    "3-D input": (X, None),
    "input size": (X[0, :, 1:], None),
    "integer input": (X[0].long(), None),
    "float64 input": (X[0].double(), None),
    "3-D hx": (X[0], STATE),
    "1-D hx for a batch": (X[0], STATE[0, 0]),
    "2-D hx for one": (X[0, 0], STATE[0, :1]),
    "hx of another batch": (X[0], STATE[0, :1].expand(3, H)),
    "hx of another width": (X[0], STATE[0, :, 1:]),
    "float64 hx": (X[0], STATE[0].double()),
}


@pytest.mark.parametrize("call", CELL_CALLS)
@pytest.mark.parametrize(("theirs", "ours"), CELLS)
def test_calls_of_cells_refuse_what_theirs_refuse(theirs, ours, call):
    x, hx = CELL_CALLS[call]
    if hx is not None and theirs is nn.LSTMCell:
        hx = (hx, hx)
    error = assert_same_error(lambda: theirs(D, H)(x, hx), lambda: ours(D, H)(x, hx))
    assert f"{ours.__name__}: {'hx' if 'hx' in call else 'input'}" in str(error)


@pytest.mark.parametrize("rnn", [MinLSTM(D, H, proj_size=2), MinLSTM(D, H)], ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_both_states_of_minlstm_are_checked(rnn, index):
    states = [torch.zeros(1, B, rnn.proj_size or H), torch.zeros(1, B, H)]
    states[index] = torch.zeros(1, B, 3)
    with pytest.raises(RuntimeError, match=rf"MinLSTM: hx\[{index}\] must be of shape \(1, 2, .\), got \(1, 2, 3\)"):
        rnn(X, tuple(states))


@pytest.mark.parametrize("hx", [STATE, "state", [STATE], [STATE] * 3, (STATE, None)], ids=["1", "2", "3", "4", "5"])
def test_minlstm_wants_a_pair(hx):
    with pytest.raises((TypeError, ValueError), match=r"MinLSTM: hx.* must be a (pair|torch.Tensor).*, got"):
        MinLSTM(D, H)(X, hx)


@pytest.mark.parametrize("kind", [MinGRU, MinGRUCell])
def test_mingru_wants_tensors(kind):
    for arguments in [("text",), ([1.0],), (X[0, 0] if kind is MinGRUCell else X, (STATE,))]:
        with pytest.raises(TypeError, match=f"{kind.__name__}: (input|hx) must be a torch.Tensor, got "):
            kind(D, H)(*arguments)


MARKS = torch.zeros(T, B, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lengths": [1, -1]}, ValueError, r"lengths must be between 0 and T = 5, got \[1, -1\]"),
        ({"lengths": torch.tensor([6, 1])}, ValueError, r"lengths must be between 0 and T = 5, got \[6, 1\]"),
        ({"lengths": [1, 2, 3]}, ValueError, r"lengths must be of shape \(2,\), got \(3,\)"),
        ({"lengths": 3}, ValueError, r"lengths must be of shape \(2,\), got \(\)"),
        ({"lengths": [1.0, 2.0]}, TypeError, "lengths must be integers, got torch.float32"),
        ({"lengths": [1, None]}, TypeError, r"lengths must be a tensor or a sequence of integers, got \[1, None\]"),
        ({"lengths": [2**63, 1]}, TypeError, r"lengths must be a tensor or a sequence of integers, got \[9223"),
        ({"lengths": torch.tensor([True, False])}, TypeError, "lengths must be integers, got torch.bool"),
        ({"reset": MARKS.long()}, TypeError, "reset must be torch.bool, got torch.int64"),
        ({"reset": MARKS.T}, ValueError, r"reset must be of shape \(5, 2\), the input's, got \(2, 5\)"),
        ({"reset": [False]}, TypeError, "reset must be a torch.Tensor, got list"),
        ({"reset": MARKS.to("meta")}, ValueError, "reset must be on cpu as the input is, got one on meta"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_lengths_and_reset_are_checked(kind, options, error, text):
    with pytest.raises(error, match=f"{kind.__name__}: {text}"):
        kind(D, H)(X, **options)


def test_lengths_in_a_list_are_checked_whatever_the_default_device():
    rnn = MinGRU(D, H)
    with torch.device("meta"):
        assert torch.equal(rnn(X, lengths=[5, 2])[0], rnn(X, lengths=torch.tensor([5, 2], device="cpu"))[0])
        with pytest.raises(ValueError, match="lengths must be between 0 and T = 5"):
            rnn(X, lengths=[5, 6])


@pytest.mark.parametrize("options", [{"lengths": [5, 5]}, {"reset": MARKS}], ids=["lengths", "reset"])
def test_packed_input_has_its_lengths_and_no_resets(options):
    with pytest.raises(ValueError, match="MinGRU: lengths and reset must be None with a PackedSequence"):
        MinGRU(D, H)(pack_sequence([X[:, 0], X[:, 1]]), **options)
