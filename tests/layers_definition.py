"""The definition of MinGRU and MinLSTM, stepped from the paper's equations, and the cases that the tests compare."""

import torch

from conftest import TOL
from minrnn.layers import MinGRU, MinLSTM

D, H, B, T = 3, 4, 3, 9
STACKS = {
    "gru": (MinGRU, {}),
    "gru-identity-no-bias": (MinGRU, {"activation": "identity", "bias": False}),
    "gru-tanh-2": (MinGRU, {"activation": "tanh", "num_layers": 2}),
    "gru-bi": (MinGRU, {"bidirectional": True}),
    "gru-bi-2-learned": (MinGRU, {"num_layers": 2, "bidirectional": True, "learn_initial_state": True}),
    "lstm": (MinLSTM, {}),
    "lstm-plain": (MinLSTM, {"normalize": False, "activation": "identity"}),
    "lstm-learned-forget": (MinLSTM, {"learn_initial_state": True, "forget_bias": 3.0}),
    "lstm-proj-2": (MinLSTM, {"num_layers": 2, "proj_size": 2}),
    "lstm-bi-2-proj-learned": (
        MinLSTM,
        {"num_layers": 2, "bidirectional": True, "proj_size": 2, "learn_initial_state": True},
    ),
}
CAUSAL = [name for name, (_, options) in STACKS.items() if not options.get("bidirectional")]
LENGTHS = [4, 0, 9]
RESET_STEPS = [(0, 0), (3, 0), (4, 0), (7, 0), (8, 2), (5, 2)]  # (t, b); two of them in the padding of sequence 0


def make(name, **more):
    torch.manual_seed(0)
    kind, options = STACKS[name]
    return kind(D, H, dtype=torch.float64, **(options | more))


def data(rnn, time=T, batch=B):
    torch.manual_seed(1)
    states = rnn.num_layers * (2 if rnn.bidirectional else 1)
    series = torch.randn(time, batch, D, dtype=torch.float64, requires_grad=True)
    state = torch.randn(states, batch, H, dtype=torch.float64, requires_grad=True)
    return series, state


def given(rnn, state):
    """`state`, (S, B, H), as the `hx` of this kind of layer; h_0 is filled with what must not matter."""
    if isinstance(rnn, MinGRU):
        return state
    return torch.full((*state.shape[:-1], rnn.proj_size or H), 1e3, dtype=state.dtype), state


def flat(output, states):
    return [output, *([states] if isinstance(states, torch.Tensor) else states)]


def at(hx, index):
    return hx[index] if isinstance(hx, torch.Tensor) else tuple(part[index] for part in hx)


def resets(batch_first=False):
    marks = torch.zeros(T, B, dtype=torch.bool)
    marks[tuple(zip(*RESET_STEPS, strict=True))] = True
    return marks.T if batch_first else marks


def gradients(results, rnn, *inputs):
    torch.manual_seed(2)
    loss = sum((result * torch.randn(result.shape, dtype=result.dtype)).sum() for result in results)
    wanted = [tensor for tensor in inputs if tensor.requires_grad] + list(rnn.parameters())
    return torch.autograd.grad(loss, wanted, materialize_grads=True)


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **TOL[mine.dtype])


# --- the definition, from the paper's equations ---


def act(x, activation):
    return {"g": torch.where(x >= 0, x + 0.5, x.sigmoid()), "identity": x, "tanh": x.tanh()}[activation]


def define_direction(rnn, suffix, steps, state, begins):
    """One sequence in one direction: the list of states, `steps` and `begins` in the order of the scan."""
    weight = getattr(rnn, f"weight_ih{suffix}")
    bias = getattr(rnn, f"bias_ih{suffix}") if rnn.bias else 0
    learned = torch.zeros_like(state)
    if rnn.learn_initial_state:
        learned = act(getattr(rnn, f"initial{suffix}"), rnn.activation)
    states = []
    for x, begin in zip(steps, begins, strict=True):
        if begin:
            state = learned
        *gates, candidate = (weight @ x + bias).split(H)
        if isinstance(rnn, MinGRU):
            z = gates[0].sigmoid()
            keep, write = 1 - z, z
        else:
            keep, write = gates[0].sigmoid(), gates[1].sigmoid()
            if rnn.normalize:
                keep, write = keep / (keep + write), write / (keep + write)
        state = keep * state + write * act(candidate, rnn.activation)
        states.append(state)
    return states, state


def define_sequence(rnn, series, state, begins):
    """One sequence (T, D), cut where `begins`, through all layers: the output (T, P x directions), h_n and c_n."""
    hidden_n, carried_n = [], []
    index = 0
    for layer in range(rnn.num_layers):
        outputs = []
        for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: 2 if rnn.bidirectional else 1]:
            if suffix.endswith("reverse"):
                ends = [False, *reversed(begins[1:])] if begins else []
                states, last = define_direction(rnn, suffix, list(reversed(series)), state[index], ends)
                states.reverse()
            else:
                states, last = define_direction(rnn, suffix, series, state[index], begins)
            carried_n.append(last)
            if isinstance(rnn, MinLSTM) and rnn.proj_size:
                project = getattr(rnn, f"weight_hr{suffix}")
                states, last = [project @ s for s in states], project @ last
            hidden_n.append(last)
            outputs.append(states)
            index += 1
        series = [torch.cat(step) for step in zip(*outputs, strict=True)]
    return series, torch.stack(hidden_n), torch.stack(carried_n)


def define(rnn, series, state, lengths=None, marks=None):
    """The layer on a time-major batch, sequence by sequence: output, h_n (and c_n for MinLSTM)."""
    time, batch, _ = series.shape
    width = (getattr(rnn, "proj_size", 0) or H) * (2 if rnn.bidirectional else 1)
    outputs, hidden, carried = [], [], []
    for b in range(batch):
        length = time if lengths is None else lengths[b]
        begins = [False] * length if marks is None else marks[:length, b].tolist()
        output, h_n, c_n = define_sequence(rnn, list(series[:length, b]), state[:, b], begins)
        output += [torch.zeros(width, dtype=series.dtype)] * (time - length)
        outputs.append(torch.stack(output))
        hidden.append(h_n)
        carried.append(c_n)
    states = [torch.stack(hidden, 1)] + ([] if isinstance(rnn, MinGRU) else [torch.stack(carried, 1)])
    return [torch.stack(outputs, 1), *states]
