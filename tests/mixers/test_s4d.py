"""S4D: against its equations, one step at a time, in float64; how it begins, and what it refuses."""

import math

import pytest
import torch
from torch.utils._pytree import tree_map

from conftest import assert_close
from minrnn.mixers.s4d import S4D, S4DConfig
from parity import compare

D = 5
CONFIGS = {
    "lin": S4DConfig(state=8),
    "inv": S4DConfig(state=6, init="inv"),
    "legs": S4DConfig(state=4, init="legs", dt_max=0.5),
    "bilinear": S4DConfig(state=8, discretization="bilinear"),
    "smallest": S4DConfig(state=2, dt_min=0.1),
}


def make(config: S4DConfig) -> S4D:
    torch.manual_seed(0)
    return S4D(D, config).double()


def define(mixer, config, x, h, reset):
    """h_t = Ā h_{t-1} + B̄ x_t, y_t = sum over both of each conjugate pair of C h_t, + D x_t."""
    decay = torch.complex(-mixer.log_decay.exp(), mixer.frequency)
    step = mixer.log_step.exp()[:, None]
    if config.discretization == "zoh":
        a, b = torch.exp(step * decay), (torch.exp(step * decay) - 1) / decay
    else:
        a, b = (1 + step * decay / 2) / (1 - step * decay / 2), step / (1 - step * decay / 2)
    weights, outputs = torch.complex(*mixer.C.unbind(-1)), []
    for t in range(x.shape[1]):
        h = a * torch.where(reset[:, t, None, None], torch.zeros_like(h), h) + b * x[:, t, :, None]
        pairs = weights * h + weights.conj() * h.conj()
        outputs.append(pairs.sum(-1).real + mixer.D * x[:, t])
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("time", [3, 41])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_its_recurrence(name, time, given_state):
    mixer, config = make(CONFIGS[name]), CONFIGS[name]
    x = torch.randn(3, time, D, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(3, D, config.state // 2, dtype=torch.complex128)
    h = torch.randn_like(h).requires_grad_() if given_state else h
    state = tree_map(lambda _: h, mixer.initial_state(3)) if given_state else None
    inputs = [x, *mixer.parameters(), *([h] if given_state else [])]
    for reset in (torch.zeros(3, time, dtype=torch.bool), torch.rand(3, time) < 0.2):
        expected = define(mixer, config, x, h, reset)
        compare(mixer(x, state, reset=reset if reset.any() else None), expected, inputs, x.dtype)


def test_how_it_begins():
    torch.manual_seed(0)
    n = torch.arange(32)
    lin = S4D(4000, S4DConfig())
    assert_close(lin.frequency, (math.pi * n).expand(4000, -1), torch.float32)
    assert_close(lin.log_decay.exp(), torch.full((4000, 32), 0.5), torch.float32)
    assert lin.log_step.exp().min() >= 1e-3 and lin.log_step.exp().max() <= 0.1
    assert abs(lin.log_step.mean() - math.log(1e-2)) < 0.1
    assert abs(lin.D.mean()) < 0.1 and abs(lin.D.std() - 1) < 0.1
    assert abs(lin.C.square().sum(-1).mean() - 1) < 0.02
    inv = S4D(2, S4DConfig(init="inv"))
    assert_close(inv.frequency[1, :2], torch.tensor([64 / math.pi * 63, 64 / math.pi * (64 / 3 - 1)]), torch.float32)
    # The spectrum of HiPPO-LegS without its low-rank part, and its input weights, whose squares add up to N^2.
    legs = S4D(4000, S4DConfig(init="legs", state=4))
    root = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64).sqrt()
    lower = torch.outer(root, root).tril(-1) / 2
    spectrum = torch.linalg.eigvals(lower.T - lower - torch.eye(4) / 2)
    assert_close(spectrum.real, torch.full((4,), -0.5), torch.float64)
    assert_close(legs.frequency[7], spectrum.imag.sort().values[2:], torch.float32)
    assert abs(2 * legs.C.square().sum(-1).mean(0).sum() / 16 - 1) < 0.05


@pytest.mark.parametrize(
    ("error", "options", "match"),
    [
        (ValueError, {"state": 3}, "state must be even and at least 2, got 3"),
        (ValueError, {"state": 0}, "state must be even and at least 2, got 0"),
        (ValueError, {"dt_min": 0.0}, "dt_min must be above 0 and at most dt_max, got 0.0 and 0.1"),
        (ValueError, {"dt_min": 0.2}, "dt_min must be above 0 and at most dt_max, got 0.2 and 0.1"),
        (ValueError, {"dt_max": math.inf}, ".*at most dt_max"),
        (ValueError, {"lr_limit": 0.0}, "lr_limit must be above 0, got 0.0"),
        (ValueError, {"init": "real"}, "init must be one of .*lin, inv, legs.*got 'real'"),
        (ValueError, {"discretization": "euler"}, "discretization must be one of .*got 'euler'"),
        (TypeError, {"state": 4.0}, "state must be of type int, got 4.0"),
    ],
)
def test_bad_options_are_named(error, options, match):
    with pytest.raises(error, match=f"S4DConfig: {match}"):
        S4DConfig(**options)
