"""What layers and cells of both kinds share: parameters and how they begin, checks, repr, and the call into ops.

Letters: B batch, T time, D input_size, H hidden_size, P proj_size (H without one), S states of a stack = num_layers x
directions.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from minrnn._shapes import accumulate_dtype, castable, check_tensor
from minrnn.ops import ACTIVATIONS, mingru_scan, minlstm_scan
from minrnn.ops.gates import activate

States: TypeAlias = Tensor | tuple[Tensor, Tensor]

# What a repr shows after the two sizes where it is not the default, in nn.LSTM's order.
_SHOWN = {
    "proj_size": 0,
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
    "activation": "g",
    "learn_initial_state": False,
    "normalize": True,
    "forget_bias": 0.0,
}


class ArgumentError(ValueError, RuntimeError):
    """An argument that does not fit: a ValueError, and the RuntimeError that nn.GRU raises in many of these places."""


class Weights(NamedTuple):
    """The parameters of one direction of a layer, or of a cell; None for those that it does not have."""

    weight: Tensor
    bias: Tensor | None
    project: Tensor | None
    initial: Tensor | None


class Gated(nn.Module):
    """A module with minGRU's or minLSTM's recurrence in it, once (a cell) or several times (a stack of layers)."""

    _blocks: int  # of H rows in weight_ih: the gates, then the candidate
    _suffixes: list[str]  # of the parameters' names, one for each recurrence
    proj_size: int = 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        activation: str,
        learn_initial_state: bool,
        forget_bias: float,
    ) -> None:
        super().__init__()
        self.input_size = self._check_size("input_size", input_size, 1)
        self.hidden_size = self._check_size("hidden_size", hidden_size, 1)
        if activation not in ACTIVATIONS:
            raise self._wrong("activation", f"one of {ACTIVATIONS}", repr(activation))
        if forget_bias and not bias:
            raise self._wrong("forget_bias", "0 without a bias", forget_bias)
        self.bias, self.activation = bias, activation
        self.learn_initial_state, self.forget_bias = learn_initial_state, forget_bias

    # --- parameters ---

    def _create_weights(self, suffix: str, input_size: int, device, dtype) -> None:
        """Register the parameters of one recurrence, not yet initialised."""

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        rows = self._blocks * self.hidden_size
        setattr(self, f"weight_ih{suffix}", parameter(rows, input_size))
        if self.bias:
            setattr(self, f"bias_ih{suffix}", parameter(rows))
        if self.proj_size:
            setattr(self, f"weight_hr{suffix}", parameter(self.proj_size, self.hidden_size))
        if self.learn_initial_state:
            setattr(self, f"initial{suffix}", parameter(self.hidden_size))

    def _weights(self, suffix: str) -> Weights:
        """Read by attribute, once per forward: parametrisations compute them and functional_call swaps them."""
        return Weights(
            getattr(self, f"weight_ih{suffix}"),
            getattr(self, f"bias_ih{suffix}") if self.bias else None,
            getattr(self, f"weight_hr{suffix}") if self.proj_size else None,
            getattr(self, f"initial{suffix}") if self.learn_initial_state else None,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw parameters: as nn.Linear, `forget_bias` on top of the forget gate's bias, N(0, 1) for initial states."""
        for weight, bias, project, initial in map(self._weights, self._suffixes):
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound)
            if bias is not None:
                bias.uniform_(-bound, bound)
                # Not in place on a slice: of a DTensor that may be a copy.
                forget, others = bias[: self.hidden_size], bias[self.hidden_size :]
                bias.copy_(torch.cat([forget + self.forget_bias, others]))
            if project is not None:
                bound = 1 / math.sqrt(self.hidden_size)
                project.uniform_(-bound, bound)
            if initial is not None:
                initial.normal_()

    def extra_repr(self) -> str:
        changed = {name: getattr(self, name, default) for name, default in _SHOWN.items()}
        shown = [f"{name}={value}" for name, value in changed.items() if value != _SHOWN[name]]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *shown])

    # --- the recurrence: what minGRU and minLSTM say differently ---

    def _scan(
        self,
        projection: Tensor,
        initial: Tensor | None,
        reset: Tensor | None,
        restart: Tensor | None,
        lengths: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """The op of this kind over a projection (B, T, blocks H)."""
        raise NotImplementedError

    def _read_states(self, hx: Any) -> list[tuple[str, Tensor, int]]:
        """Name, value and width of each state in `hx`; the last one is what the recurrence carries."""
        raise NotImplementedError

    def _give_states(self, hidden: Tensor, carried: Tensor) -> States:
        """The states as the caller gets them, from the projected one and the carried one."""
        raise NotImplementedError

    def _recur(
        self,
        projection: Tensor,
        learned: Tensor | None,
        initial: Tensor | None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """h and the last state, in h's dtype, from `initial` or else the learned state, at which resets restart."""
        keep = accumulate_dtype(projection.dtype)
        if learned is not None:
            learned = activate(learned, self.activation).to(keep)
        if initial is not None:
            initial = initial.to(keep)
        elif learned is not None:
            initial = learned.expand(projection.shape[0], -1)
        hidden, last = self._scan(projection, initial, reset, learned, lengths, reverse)
        return hidden, last.to(hidden.dtype)

    # --- checks ---

    def _wrong(self, name: str, wanted: object, got: object) -> ArgumentError:
        """The one form of a complaint: who, which argument, what was wanted, what came."""
        return ArgumentError(f"{self._get_name()}: {name} must be {wanted}, got {got}")

    def _check_type(self, name: str, value: object, kind: type) -> None:
        """Raise TypeError unless `value` is a `kind`."""
        if not isinstance(value, kind):
            raise TypeError(f"{self._get_name()}: {name} must be of type {kind.__name__}, got {type(value).__name__}")

    def _check_size(self, name: str, size: Any, least: int) -> int:
        """The size as an int, which NumPy's integers count as, too; raises unless it is one of at least `least`."""
        if hasattr(size, "__index__"):
            size = operator.index(size)
        self._check_type(name, size, int)
        if size < least:
            raise self._wrong(name, f"at least {least}", size)
        return size

    def _check_input(self, input: Tensor, ranks: tuple[int, ...], weight: Tensor) -> None:
        """Raise unless `input` is a tensor of one of the ranks that can be multiplied with `weight`."""
        check_tensor(self._get_name(), "input", input)
        if input.dim() not in ranks:
            raise self._wrong("input", " or ".join(f"{rank}-D" for rank in ranks), f"shape {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise self._wrong("input.size(-1)", f"input_size = {self.input_size}", input.shape[-1])
        self._check_like("input", input, weight, "the weights are")

    def _check_states(self, hx: Any, input: Tensor, lead: tuple[int, ...]) -> Tensor | None:
        """The state that the recurrence begins from, (*lead, H), out of a checked `hx`; None where none is given."""
        if hx is None:
            return None
        states = self._read_states(hx)
        for name, state, width in states:
            check_tensor(self._get_name(), name, state)
            if state.shape != (*lead, width):
                raise self._wrong(name, f"of shape {(*lead, width)}", tuple(state.shape))
            self._check_like(name, state, input, "the input is")
        return states[-1][1]

    def _check_like(self, name: str, tensor: Tensor, like: Tensor, whose: str) -> None:
        """Raise unless device and dtype are those of `like`, or autocast is going to make one of the dtypes."""
        if tensor.dtype != like.dtype and not castable(tensor, like):
            raise self._wrong(name, f"{like.dtype} as {whose}", tensor.dtype)
        if tensor.device != like.device:
            raise self._wrong(name, f"on {like.device} as {whose}", f"one on {tensor.device}")


def map_states(function: Callable[[Tensor], Tensor], states: States) -> States:
    """`function` of each state."""
    return function(states) if isinstance(states, Tensor) else (function(states[0]), function(states[1]))


class GRUKind(Gated):
    """z_t = sigmoid(gate_t), h_t = (1 - z_t) h_{t-1} + z_t act(candidate_t): one state."""

    _blocks = 2

    def _scan(self, projection, initial, reset, restart, lengths, reverse):
        return mingru_scan(
            projection,
            initial,
            reset=reset,
            restart=restart,
            lengths=lengths,
            reverse=reverse,
            activation=self.activation,
        )

    def _read_states(self, hx: Tensor) -> list[tuple[str, Tensor, int]]:
        return [("hx", hx, self.hidden_size)]

    def _give_states(self, hidden: Tensor, carried: Tensor) -> Tensor:
        return carried


class LSTMKind(Gated):
    """f_t, i_t = sigmoid(forget_t), sigmoid(input_t); c_t = f_t c_{t-1} + i_t act(candidate_t): the pair (h, c)."""

    _blocks = 3
    normalize: bool

    def _scan(self, projection, initial, reset, restart, lengths, reverse):
        return minlstm_scan(
            projection,
            initial,
            reset=reset,
            restart=restart,
            lengths=lengths,
            reverse=reverse,
            activation=self.activation,
            normalize=self.normalize,
        )

    def _read_states(self, hx: tuple[Tensor, Tensor]) -> list[tuple[str, Tensor, int]]:
        if not isinstance(hx, (tuple, list)):
            raise TypeError(f"{self._get_name()}: hx must be a pair (h_0, c_0), got {type(hx).__name__}")
        if len(hx) != 2:
            raise self._wrong("hx", "a pair (h_0, c_0)", f"{len(hx)} values")
        return [("hx[0]", hx[0], self.proj_size or self.hidden_size), ("hx[1]", hx[1], self.hidden_size)]

    def _give_states(self, hidden: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        # Two tensors always: writing into one of them leaves the other alone, as with nn.LSTM.
        return hidden.clone() if hidden is carried else hidden, carried
