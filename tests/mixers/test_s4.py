"""S4: against dense matrices in float64, those of HiPPO-LegS and those of any parameters."""

import pytest
import torch
from torch.utils._pytree import tree_map

from conftest import assert_close
from minrnn.mixers.s4 import S4, S4Config, hippo_legs
from parity import compare

D = 3
SIZES = [2, 4, 6, 64]


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def hippo(size):
    """A_nk = -sqrt(2n+1) sqrt(2k+1) below the diagonal, -(n+1) on it, 0 above; B_n = sqrt(2n+1)."""
    rows = [
        [-(((2 * n + 1) * (2 * k + 1)) ** 0.5) if n > k else -(n + 1.0) if n == k else 0.0 for k in range(size)]
        for n in range(size)
    ]
    return torch.tensor(rows), torch.tensor([(2 * n + 1) ** 0.5 for n in range(size)])


def bilinear(matrix, inputs, step):
    """Ā = (1 - ΔA/2)^-1 (1 + ΔA/2), B̄ = (1 - ΔA/2)^-1 ΔB."""
    one = torch.eye(len(matrix), dtype=matrix.dtype)
    left = one - step / 2 * matrix
    return torch.linalg.solve(left, one + step / 2 * matrix), torch.linalg.solve(left, step * inputs)


def both(half):
    """Of each conjugate pair both numbers, along the last dimension."""
    return torch.cat([half, half.conj()], -1)


@pytest.mark.parametrize("size", SIZES)
def test_normal_plus_low_rank_is_hippo(size):
    matrix, inputs = hippo(size)
    frequency, rank, weights = hippo_legs(size)
    diagonal = both(torch.complex(torch.full_like(frequency, -0.5), frequency))
    p, b = both(rank), both(weights)
    form = torch.diag(diagonal) - torch.outer(p, p.conj())
    # The same matrix in another unitary basis, B with it, if B* A^k B agree: here for the resolvent, which holds all k.
    for s in (1j, 0.3 + 2j, 4.0 + 0j, 40j):
        one = torch.eye(size)
        dense = inputs.to(form.dtype) @ torch.linalg.solve(s * one - matrix, inputs.to(form.dtype))
        found = b.to(form.dtype) @ torch.linalg.solve(s * one - form, b.to(form.dtype))
        assert_close(found, dense, torch.float64)
    assert (frequency > 0).all() and (frequency.diff() > 0).all()
    assert_close(weights, rank * 2**0.5, torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_a_new_layer_has_hippos_impulse_response(size):
    time, mixer, (matrix, inputs) = 100, S4(D, S4Config(state=size)), hippo(size)
    with torch.no_grad():
        mixer.C.copy_(mixer.B)  # in HiPPO's own basis, C = B
        impulse = torch.zeros(1, time, D)
        impulse[:, 0] = 1
        y, _ = mixer(impulse)
        y[:, 0] -= mixer.D
    for d in range(D):
        transition, h = bilinear(matrix, inputs, mixer.log_step[d].exp())
        for t in range(time):
            assert_close(y[0, t, d], inputs @ h, torch.float64)
            h = transition @ h


def define(mixer, x, h, reset):
    """Dense matrices over both numbers of each conjugate pair."""
    diagonal = both(torch.complex(-mixer.log_decay.exp(), mixer.frequency))
    p, b, c = (both(torch.complex(*v.unbind(-1))) for v in (mixer.P, mixer.B, mixer.C))
    channels, lasts = [], []
    for d in range(x.shape[2]):
        matrix = torch.diag(diagonal[d]) - torch.outer(p[d], p[d].conj())
        transition, inputs = bilinear(matrix, b[d], mixer.log_step[d].exp())
        state, outputs = both(h[:, d]), []
        for t in range(x.shape[1]):
            state = torch.where(reset[:, t, None], torch.zeros_like(state), state)
            state = state @ transition.T + inputs * x[:, t, d, None]
            outputs.append((state @ c[d]).real + mixer.D[d] * x[:, t, d])
        channels.append(torch.stack(outputs, 1))
        lasts.append(state[:, : h.shape[2]])
    return torch.stack(channels, 2), torch.stack(lasts, 1)


@pytest.mark.parametrize("time", [3, 50])
@pytest.mark.parametrize("size", [2, 8])
def test_it_is_its_recurrence_for_any_parameters(size, time):
    mixer = S4(D, S4Config(state=size, dt_min=0.05, dt_max=2.0))
    with torch.no_grad():
        for name in ("log_decay", "frequency", "P", "B"):
            mixer.get_parameter(name).add_(torch.randn_like(mixer.get_parameter(name)))
    x = torch.randn(2, time, D, requires_grad=True)
    h = torch.randn(2, D, size // 2, dtype=torch.complex128, requires_grad=True)
    state = tree_map(lambda _: h, mixer.initial_state(2))
    for reset in (torch.zeros(2, time, dtype=torch.bool), torch.rand(2, time) < 0.2):
        expected = define(mixer, x, h, reset)
        result = mixer(x, state, reset=reset if reset.any() else None)
        compare(result, expected, [x, h, *mixer.parameters()], x.dtype)


def test_any_parameters_are_a_contraction():
    """The powers of Ā never grow, in any direction: no step and no pole leads out of stability."""
    mixer = S4(6, S4Config(state=16))
    with torch.no_grad():
        for name in ("log_step", "log_decay", "frequency", "P"):
            mixer.get_parameter(name).add_(3 * torch.randn_like(mixer.get_parameter(name)))
        transition = mixer.discretize().transition()
    assert torch.linalg.matrix_norm(transition, 2).max() <= 1 + 1e-9


def test_c_is_of_no_length():
    """The response of a length begins as that of any other."""
    mixer = S4(D, S4Config())
    x = torch.randn(1, 300, D)
    with torch.no_grad():
        assert_close(mixer(x)[0][:, :77], mixer(x[:, :77])[0], torch.float64)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="S4Config: state must be even and at least 2, got 5"):
        S4Config(state=5)
