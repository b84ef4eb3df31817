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


class Cheind(nn.Module):
    """cheind/mingru's `MinGRU`, by the names of its weights and what it computes."""

    def __init__(self, input_size, hidden_sizes, bias=True, norm=False, residual=False):
        super().__init__()
        self.residual, self.layers = residual, nn.ModuleList()
        for d, h in zip([input_size, *hidden_sizes], hidden_sizes):  # noqa: B905
            around = {
                "norm": nn.LayerNorm(d) if norm else nn.Identity(),
                "gate_hidden": nn.Linear(d, 2 * h, bias),
                "res_align": nn.Linear(d, h, bias=False) if residual and d != h else nn.Identity(),
            }
            self.layers.append(nn.ModuleDict(around))

    def forward(self, x):
        for layer in self.layers:
            gate, hidden = layer["gate_hidden"](layer["norm"](x)).chunk(2, 2)
            h = written(gate, hidden, torch.full_like(gate[:, 0], 0.5))
            x = h + layer["res_align"](x) if self.residual else h
        return x


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"norm": True, "residual": True}, {"residual": True}])
def test_cheind(options):
    theirs, x = Cheind(D, [H, D, D], **options).double(), torch.randn(3, 11, D, dtype=torch.double)
    if options.get("norm"):
        nn.init.normal_(theirs.layers[0]["norm"].weight)
    y = x
    for rnn, rest in convert_mingru(theirs.state_dict()):
        norm = [rest.pop(f"norm.{part}") for part in ("weight", "bias")] if options.get("norm") else None
        h, _ = rnn(nn.functional.layer_norm(y, norm[0].shape, *norm) if norm else y)
        align = rest.pop("align", None)
        assert not rest and (align is not None) == ("residual" in options and rnn.input_size != rnn.hidden_size)
        y = h + (y if align is None else y @ align.T) if "residual" in options else h
    assert_close(y, theirs(x), x.dtype)


def test_a_cell_of_cheind():
    layer, x = nn.Linear(D, 2 * H), torch.randn(3, 11, D)
    ((rnn, rest),) = convert_mingru({f"to_gate_hidden.{name}": each for name, each in layer.named_parameters()})
    assert not rest
    assert_close(rnn(x)[0], written(*layer(x).chunk(2, -1), torch.full((3, H), 0.5)), x.dtype)


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
        ({"lstm.weight": torch.zeros(4, 4)}, "with names such as to_hidden_and_gate, .* got lstm.weight"),
        ({}, "with names such as"),
        ({"layers.0.weight": torch.zeros(4, 4)}, r"\(3H, H\) for candidate, gate, highway, got \(4, 4\)"),
        ({"layers.0.weight": torch.zeros(9, 5)}, r"\(3H, H\) for candidate, gate, highway, got \(9, 5\)"),
        ({"to_hidden_and_gate.weight": torch.zeros(4)}, r"\(2H, D\) for candidate, gate, got \(4,\)"),
        ({**LAYER, "to_hidden_and_gate.bias": torch.zeros(5)}, r"to_hidden_and_gate.bias must be \(4,\), got \(5,\)"),
        ({**LAYER, "to_out.weight": torch.zeros(3, 4)}, r"to_out.weight must be \(3, 2\), got \(3, 4\)"),
        (
            {"layers.0.gate_hidden.weight": torch.zeros(6, 4, 3, 3)},
            r"layers.0.gate_hidden.weight must be \(2H, D\) for gate",
        ),
        (
            {"layers.0.gate_hidden.weight": torch.zeros(4, 3), "layers.0.res_align.weight": torch.zeros(3, 2)},
            r"layers.0.res_align.weight must be \(2, 3\), got \(3, 2\)",
        ),
        ({"layers.0.weight": torch.zeros(9, 3), "layers.0.bias": torch.zeros(8)}, r"layers.0.bias must be \(9,\)"),
        ({**LAYER, "conv.weight": torch.zeros(3)}, "those of one minGRU, got conv.weight too"),
        (
            {"layers.0.weight": torch.zeros(9, 3), "layers.2.weight": torch.zeros(9, 3)},
            r"those of all layers from 0, got layers\.0, layers\.2",
        ),
        (
            {"layers.0.gate_hidden.weight": torch.zeros(8, 3), "layers.1.gate_hidden.weight": torch.zeros(6, 9)},
            r"layers\.1\.gate_hidden\.weight must read the 4 channels of the layer before, got 9",
        ),
    ],
)
def test_what_is_none_of_the_three_is_refused(weights, match):
    with pytest.raises(ValueError, match=match):
        convert_mingru(weights)


def test_weights_that_are_not_floating_are_refused():
    with pytest.raises(TypeError, match=r"to_hidden_and_gate.weight must be floating, got torch.int64"):
        convert_mingru({name: tensor.long() for name, tensor in LAYER.items()})
    for odd in ({"to_hidden_and_gate.weight": 3}, {3: torch.zeros(4, 3)}):
        with pytest.raises(TypeError, match="weights must be tensors by their names, got"):
            convert_mingru(odd)
