"""Other packages' minGRUs, from their weights: minGRU-pytorch itself, the others by their equations."""

import pytest
import torch
from torch import nn

from conftest import assert_close
from minrnn import MinGRU, convert_mingru

D, H = 5, 7
LAYER = {"to_hidden_and_gate.weight": torch.zeros(4, 3)}


def g(x):
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def written(gate, candidate, h):
    """h_t = (1 - z_t) h_{t-1} + z_t g(v_t), z_t = sigmoid(k_t): z writes."""
    rows = []
    for k, v in zip(gate.unbind(1), candidate.unbind(1), strict=True):
        z = torch.sigmoid(k)
        h = (1 - z) * h + z * g(v)
        rows.append(h)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("expansion", [1.0, 2.0])
def test_lucidrains(expansion):
    from minGRU_pytorch.minGRU import minGRU

    theirs, x = minGRU(D, expansion).double(), torch.randn(3, 11, D, dtype=torch.double)
    ((rnn, rest),) = convert_mingru(theirs.state_dict())
    y, _ = rnn(x)
    assert set(rest) == ({"output"} if expansion != 1 else set())
    assert_close(y @ rest["output"].T if rest else y, theirs(x), x.dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_cheind(bias):
    layers = [nn.Linear(D, 2 * H, bias), nn.Linear(H, 2 * D, bias)]
    weights = {f"gate_hidden_layers.{i}.{n}": p for i, m in enumerate(layers) for n, p in m.named_parameters()}
    weights["align_layers.0.weight"] = torch.randn(H, D)
    x = torch.randn(3, 11, D)
    expected = y = x
    for (rnn, rest), layer, width in zip(convert_mingru(weights), layers, (H, D), strict=True):
        gate, candidate = layer(expected).chunk(2, -1)
        expected = written(gate, candidate, torch.full((3, width), 0.5))
        y, _ = rnn(y)
        assert set(rest) == ({"align.weight"} if width == H else set())
    assert_close(y, expected, x.dtype)


def test_pufferlib():
    layers = [nn.Linear(H, 3 * H, bias=False) for _ in range(11)]  # more than nine: in order by number
    weights = {f"layers.{i}.weight": layer.weight for i, layer in enumerate(layers)}
    expected = y = torch.randn(3, 6, H)
    for (rnn, rest), layer in zip(convert_mingru(weights), layers, strict=True):
        candidate, gate, highway = layer(expected).chunk(3, -1)
        share = torch.sigmoid(highway)
        expected = share * written(gate, candidate, torch.zeros(3, H)) + (1 - share) * expected
        share = torch.sigmoid(y @ rest["highway"].T)
        y = share * rnn(y)[0] + (1 - share) * y
    assert_close(y, expected, y.dtype)


@pytest.mark.parametrize("kind", ["writes", "keeps"])
def test_both_conventions_of_z(kind):
    """nn.GRU's z keeps, ours writes; a gate of the other convention is ours with its rows negated."""
    rnn, x = MinGRU(D, H, batch_first=True, activation="identity").double(), torch.randn(2, 9, D, dtype=torch.double)
    gate, candidate = (x @ rnn.weight_ih_l0.T + rnn.bias_ih_l0).chunk(2, -1)
    z, h, rows = torch.sigmoid(gate), torch.zeros(2, H, dtype=torch.double), []
    for t in range(9):
        h = (
            (1 - z[:, t]) * h + z[:, t] * candidate[:, t]
            if kind == "writes"
            else z[:, t] * h + (1 - z[:, t]) * candidate[:, t]
        )
        rows.append(h)
    if kind == "keeps":
        with torch.no_grad():
            rnn.weight_ih_l0[:H].neg_()
            rnn.bias_ih_l0[:H].neg_()
    assert_close(rnn(x)[0], torch.stack(rows, 1), x.dtype)


def test_the_converted_share_nothing_with_their_source():
    weights = {"layers.0.weight": torch.randn(3 * H, H)}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    ((rnn, rest),) = convert_mingru(weights)
    with torch.no_grad():
        rnn.weight_ih_l0.zero_()
        rest["highway"].zero_()
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"lstm.weight": torch.zeros(4, 4)}, "names that begin with to_hidden_and_gate, .* got lstm.weight"),
        ({}, "names that begin with"),
        ({"layers.0.weight": torch.zeros(4, 4)}, r"\(3H, H\) for candidate, gate, highway, got \(4, 4\)"),
        ({"layers.0.weight": torch.zeros(9, 5)}, r"\(3H, H\) for candidate, gate, highway, got \(9, 5\)"),
        ({"to_hidden_and_gate.weight": torch.zeros(4)}, r"\(2H, D\) for candidate, gate, got \(4,\)"),
        ({**LAYER, "to_hidden_and_gate.bias": torch.zeros(5)}, r"to_hidden_and_gate.bias must be \(4,\), got \(5,\)"),
        ({**LAYER, "to_out.weight": torch.zeros(3, 4)}, r"to_out.weight must be \(D, 2\), got \(3, 4\)"),
        ({**LAYER, "conv.weight": torch.zeros(3)}, "those of one minGRU, got conv.weight too"),
    ],
)
def test_what_is_none_of_the_three_is_refused(weights, match):
    with pytest.raises(ValueError, match=match):
        convert_mingru(weights)


def test_weights_that_are_not_floating_are_refused():
    with pytest.raises(TypeError, match=r"to_hidden_and_gate.weight must be floating, got torch.int64"):
        convert_mingru({name: tensor.long() for name, tensor in LAYER.items()})
