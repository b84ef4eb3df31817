"""GRU and LSTM as mixers: PyTorch's own, and as plain loops of their cells over time.

B batch, T time, D model width, H = expansion x D hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from minrnn._config import check_positive, check_types
from minrnn._shapes import accumulate_dtype, autocasts
from minrnn.mixers.contract import ALONE, Mixer, Place, check_series, check_state, plain, scaled
from minrnn.ops.sequences import Sequences


@dataclass(frozen=True)
class RNNConfig:
    """Options of `GRUMixer`, `LSTMMixer`, `GRULoopMixer` and `LSTMLoopMixer`.

    Args:
        expansion: hidden width in widths of the model
    """

    expansion: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "expansion")


class GRUState(NamedTuple):
    """h, (B, H)."""

    h: Tensor


class LSTMState(NamedTuple):
    """h and the cell c, (B, H) each."""

    h: Tensor
    c: Tensor


class CellLoop(nn.Module, ABC):
    """A cell applied to one step after the other in ordinary PyTorch operations.

    Its linear maps are nn.Linear of [x_t, h_{t-1}], and begin as nn.Linear's. Where they are 16-bit, all else, the
    state first of all, is float32.
    """

    kind: ClassVar[type]  # of the state
    gates: nn.Linear

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size

    def forward(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """The states h after every step, and the whole state after the last.

        Args:
            x: (B, T, input_size), T at least 1.
            state: before the first step, zeros by default.
            reset: bool (B, T); where true, step t begins from zeros.
        """
        if state is None:
            state = _zeros(self.kind, x, len(x), self.hidden_size)
        outputs = []
        for t, x_t in enumerate(x.unbind(1)):
            if reset is not None:
                state = _restarted(state, reset[:, t])
            state = self.step(x_t, state)
            outputs.append(state.h)
        return torch.stack(outputs, 1), state

    @abstractmethod
    def step(self, x: Tensor, state: Any) -> Any:
        """The state after the input x, (B, input_size)."""


class GRULoop(CellLoop):
    """h' = (1 - z) ⊙ h + z ⊙ tanh(W_n [x, r ⊙ h] + b_n), [z | r] = sigmoid(W [x, h] + b).

    (nn.GRU differs: its z keeps h, and its r multiplies U_n h + b_hn, not h.)

    Args:
        input_size: of x.
        hidden_size: H.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder" (2014), as Feng et al., "Were RNNs
    All We Needed?" (2024), section 2.2, write it.
    """

    kind = GRUState

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.gates = nn.Linear(input_size + hidden_size, 2 * hidden_size)
        self.candidate = nn.Linear(input_size + hidden_size, hidden_size)

    def step(self, x: Tensor, state: GRUState) -> GRUState:
        z, r = torch.sigmoid(_joint(self.gates, x, state.h)).chunk(2, -1)
        candidate = torch.tanh(_joint(self.candidate, x, r * state.h))
        return GRUState((1 - z) * state.h + z * candidate)


class LSTMLoop(CellLoop):
    """c' = f ⊙ c + i ⊙ tanh(g), h' = o ⊙ tanh(c'), [i | f | g | o] = W [x, h] + b, i, f and o through a sigmoid.

    Args:
        input_size: of x.
        hidden_size: H.

    Source: Gers et al., "Learning to forget" (2000), as Feng et al., "Were RNNs All We Needed?" (2024), section 2.1,
    write it.
    """

    kind = LSTMState

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.gates = nn.Linear(input_size + hidden_size, 4 * hidden_size)

    def step(self, x: Tensor, state: LSTMState) -> LSTMState:
        i, f, g, o = _joint(self.gates, x, state.h).chunk(4, -1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        return LSTMState(torch.sigmoid(o) * torch.tanh(c), c)


class RNNMixer(Mixer):
    """What the four share: y = h, or W_out h + b_out where H is not D.

    Sequences begin from zeros. The state is a `GRUState` or an `LSTMState`, float32 where the model is 16-bit.

    Args:
        width: D.
        config: the options.
        place: of no importance here.
    """

    kind: ClassVar[type]  # of the state

    def __init__(self, width: int, config: RNNConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.width, self.hidden = width, int(scaled(width, config.expansion))
        if self.hidden < 1:
            caller = type(self).__name__
            raise ValueError(f"{caller}: expansion x width must be at least 1, got {config.expansion} x {width}")
        self.output = nn.Identity() if self.hidden == width else nn.Linear(self.hidden, width)

    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller, weight = type(self).__name__, self.weight
        check_series(caller, x, self.width, reset, weight)
        shape = len(x), self.hidden
        if state is None:
            state = self.initial_state(len(x))
        else:
            check_state(caller, state, self.kind, weight, **dict.fromkeys(self.kind._fields, ("(B, H)", shape)))
            state = self.kind(*(part.to(accumulate_dtype(weight.dtype)) for part in state))
        if x.shape[1]:
            hidden, state = self.recur(x, state, reset)
        else:
            hidden = x[..., :1].expand(-1, -1, self.hidden)
        return self.output(hidden.to(_product_dtype(x))), state

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """One of the recurrence's."""

    @abstractmethod
    def recur(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        """The recurrence over x, (B, T, D), T at least 1: h after every step, and the state after the last."""

    def initial_state(self, batch_size: int) -> Any:
        """Zeros, (batch_size, H) each."""
        return _zeros(self.kind, self.weight, batch_size, self.hidden)

    @property
    def state_size(self) -> int:
        """H, for the LSTM 2H."""
        return self.hidden * len(self.kind._fields)


class TorchMixer(RNNMixer):
    """nn.GRU or nn.LSTM over time, in float32 where the model is 16-bit.

    Where there are resets, the sequences between them run side by side, as a packed sequence: as many steps as the
    longest has.
    """

    layer: ClassVar[type[nn.GRU] | type[nn.LSTM]]
    kernel: ClassVar[Callable[..., tuple[Tensor, ...]]]  # that the layer calls; of it, because the weights may be cast
    rnn: nn.RNNBase

    def __init__(self, width: int, config: RNNConfig, place: Place = ALONE) -> None:
        super().__init__(width, config, place)
        self.rnn = self.layer(width, self.hidden, batch_first=True)

    @property
    def weight(self) -> Tensor:
        return self.rnn.all_weights[0][0]

    def recur(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        x = x.to(state.h.dtype)
        if reset is None:
            return self._run(state, x)
        state = _restarted(state, reset[:, 0])
        if not reset[:, 1:].any():
            return self._run(state, x)
        return self._packed(x, state, reset)

    def _packed(self, x: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        """`recur` where there are resets after the first step."""
        sequences = Sequences(reset)
        starts, lengths = sequences.starts, sequences.lengths
        sequence = torch.arange(len(starts), device=x.device).repeat_interleave(lengths)  # of each of the B T steps
        by_length = lengths.argsort(descending=True, stable=True)
        rank = by_length.argsort()
        # A packed sequence holds the first steps of all sequences, the longest first, then their second steps, ...
        age = torch.arange(len(sequence), device=x.device) - starts[sequence]
        order = (age * len(starts) + rank[sequence]).argsort()
        row, carried = sequences.row[by_length], sequences.continues[by_length, None]
        before = self.kind(*(part[row].where(carried, 0) for part in state))
        hidden, after = self._run(before, x.flatten(0, 1)[order], age.bincount().cpu())
        last = rank[sequence.view(reset.shape)[:, -1]]
        return hidden[order.argsort()].view(*reset.shape, -1), self.kind(*(part[last] for part in after))

    def _run(self, state: Any, *series: Tensor) -> tuple[Tensor, Any]:
        """The layer over a series (B, T, D), or over a packed one and how many sequences reach each of its steps."""
        parts = [part[None].contiguous() for part in state]  # as cuDNN wants it
        before = tuple(parts) if len(parts) > 1 else parts[0]
        with torch.autocast(state.h.device.type, enabled=False):
            if plain(self.rnn, type(self).layer):
                weights = [weight.to(state.h.dtype) for weight in self.rnn.all_weights[0]]
                batch_first = (True,) if len(series) == 1 else ()
                # Biases, layers, dropout, training, two-way. (No dropout; in training cuDNN keeps what backward needs.)
                options = (True, 1, 0.0, torch.is_grad_enabled(), False, *batch_first)
                hidden, *after = self.kernel(*series, before, weights, *options)
            else:
                narrow = [part.to(self.weight.dtype) for part in (series[0], *parts)]
                before = tuple(narrow[1:]) if len(parts) > 1 else narrow[1]
                hidden, after = self.rnn(PackedSequence(narrow[0], *series[1:]) if series[1:] else narrow[0], before)
                hidden = (hidden.data if isinstance(hidden, PackedSequence) else hidden).to(state.h.dtype)
                after = tuple(part.to(state.h.dtype) for part in (after if isinstance(after, tuple) else (after,)))
        return hidden, self.kind(*(part[0] for part in after))


class GRUMixer(TorchMixer):
    """torch.nn.GRU: h' = (1 - z) ⊙ n + z ⊙ h, n = tanh(W_n x + b_n + r ⊙ (U_n h + c_n)), [r | z] = W x + U h + b, both
    through a sigmoid.

    It begins as nn.GRU does, uniform within 1/√H.

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder" (2014), with PyTorch's place for r.
    """

    kind, layer, kernel = GRUState, nn.GRU, staticmethod(torch.gru)


class LSTMMixer(TorchMixer):
    """torch.nn.LSTM: c' = f ⊙ c + i ⊙ tanh(g), h' = o ⊙ tanh(c'), [i | f | g | o] = W x + U h + b, i, f and o through a
    sigmoid.

    It begins as nn.LSTM does, uniform within 1/√H.

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Hochreiter and Schmidhuber, "Long short-term memory" (1997); Gers et al., "Learning to forget" (2000).
    """

    kind, layer, kernel = LSTMState, nn.LSTM, staticmethod(torch.lstm)


class LoopMixer(RNNMixer):
    """A `CellLoop` over time."""

    loop: ClassVar[type[CellLoop]]
    rnn: CellLoop

    def __init__(self, width: int, config: RNNConfig, place: Place = ALONE) -> None:
        super().__init__(width, config, place)
        self.rnn = self.loop(width, self.hidden)

    @property
    def weight(self) -> Tensor:
        return self.rnn.gates.weight

    def recur(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        return self.rnn(x, state, reset)


class GRULoopMixer(LoopMixer):
    """The GRU of `GRULoop`, step by step: what minGRU is measured against.

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 2.2 and, for the loop, section 4.1.
    """

    kind, loop = GRUState, GRULoop


class LSTMLoopMixer(LoopMixer):
    """The LSTM of `LSTMLoop`, step by step: what minLSTM is measured against.

    Args:
        width: D.
        config: the options.
        place: of no importance here.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 2.1 and, for the loop, section 4.1.
    """

    kind, loop = LSTMState, LSTMLoop


def _zeros(kind: type, like: Tensor, *shape: int) -> Any:
    """The state before a sequence, for a model of the dtype of `like`."""
    dtype = accumulate_dtype(like.dtype)
    return kind(*(like.new_zeros(shape, dtype=dtype) for _ in kind._fields))


def _joint(linear: nn.Linear, x: Tensor, h: Tensor) -> Tensor:
    """W [x, h] + b, in the dtype of h."""
    return linear(torch.cat([x, h.to(x.dtype)], -1)).to(h.dtype)


def _restarted(state: Any, reset: Tensor) -> Any:
    """The state with zeros for the sequences that begin anew, by `reset`, (B,)."""
    return type(state)(*(part.where(~reset[:, None], 0) for part in state))


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that nn.Linear gives for x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if autocasts(device) and x.dtype != torch.float64 else x.dtype
