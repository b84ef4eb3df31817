"""MinGRU, MinLSTM and their cells, with the interfaces of nn.GRU, nn.LSTM, nn.GRUCell and nn.LSTMCell.

Layers know no kernels: a linear projection of the input, then one call into `minrnn.ops`. Letters: B batch, T time,
D input_size, H hidden_size, P proj_size (H without one), S = num_layers x directions.
"""

import torch.nn.functional as F
from torch import Tensor

from minrnn._gated import ArgumentError, Gated, GRUKind, LSTMKind, States
from minrnn._stack import Stack

__all__ = ["ArgumentError", "MinGRU", "MinGRUCell", "MinLSTM", "MinLSTMCell"]


class MinGRU(GRUKind, Stack):
    """minGRU with nn.GRU's interface: layers that train in parallel over time and run with one state of H numbers each.

        z_t = sigmoid(W_z x_t + b_z),  h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ act(W_h x_t + b_h)

    z writes: it weighs what is new. In nn.GRU's equations z keeps; a gate of the other convention is this one with W_z
    and b_z negated.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in nn.GRU.
        activation: act, "g" (x + 1/2 where x >= 0, else sigmoid(x): the paper's log-space form, h > 0), "identity" (its
            vanilla form) or "tanh".
        learn_initial_state: each layer and direction learns a vector p, drawn from N(0, 1); sequences begin at act(p),
            not at zeros. (Given hx and no `reset`, none does, and p has no gradient: DistributedDataParallel wants
            `find_unused_parameters=True` then.)

    Inputs: input, hx=None, *, lengths=None, reset=None
        input: (T, B, D), or (B, T, D) if `batch_first`, or (T, D), or a PackedSequence, of the dtype of the weights
            (under autocast, of any floating dtype but float64).
        hx: (S, B, H), for (T, D) input (S, H), with S = num_layers x directions: the state to begin from, in the dtype
            of the input. None: the learned initial state, or zeros. (To begin some of a batch anew, set `reset` at
            their first step.)
        lengths: integers (B,), a list or a tensor on any device, in any order, 0 included. Steps at or beyond a length
            are padding: their output is 0 and whatever they hold, NaN included, changes nothing else and no gradient. A
            length of 0 returns hx. Values are checked where they lie on the CPU; elsewhere that would wait for the
            device.
        reset: bool, laid out as the batch and time dimensions of the input. Where true, that step begins a new
            sequence: what is carried into it is zeros or the learned initial state, not hx. The reverse direction is
            cut at the same places. (`lengths` and `reset` belong to padded input; with a PackedSequence both are None.)

    Returns: output, h_n
        output: (T, B, H x directions), or laid out as the input is. Its dtype is that of the projection, under autocast
            nn.Linear's. Backward reads it, so with one direction it must not be changed in place, as nn.LSTM's must not
            (nn.GRU's may be on a CPU).
        h_n: (S, B, H) or (S, H), in the dtype of the output, as in nn.GRU: the states after the last steps. (16-bit
            states are kept in float32 within a call. To carry them from call to call without rounding, use
            `minrnn.ops.mingru_scan`.)

    Parameters: weight_ih_l{k} (2H, D or H x directions) and bias_ih_l{k} (2H,), rows [gate | candidate]; initial_l{k}
    (H,) if learned; the same with the suffix _reverse. Weights and biases begin as nn.Linear's do.

    Raises: ArgumentError (a ValueError and a RuntimeError) for shapes, dtypes, devices and values that do not fit;
    TypeError for arguments of another type, and for `lengths` or `reset` of another dtype. T = 0 and B = 0 are no
    errors.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 3.1 and appendix B.

    Example:
        >>> rnn = MinGRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        activation: str = "g",
        learn_initial_state: bool = False,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            activation,
            learn_initial_state,
        )


class MinLSTM(LSTMKind, Stack):
    """minLSTM with nn.LSTM's interface: what `MinGRU` is to nn.GRU.

        f_t, i_t = sigmoid(W_f x_t + b_f), sigmoid(W_i x_t + b_i)
        c_t = f_t/(f_t+i_t) ⊙ c_{t-1} + i_t/(f_t+i_t) ⊙ act(W_h x_t + b_h),  h_t = W_r c_t, or c_t without `proj_size`

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as in
            nn.LSTM.
        activation, learn_initial_state: as in `MinGRU`.
        normalize: divide the gates by their sum, the paper's length-independent scaling; if false, c_t = f_t c_{t-1} +
            i_t act(...).
        forget_bias: a constant added to the forget gate's bias as it is drawn. The paper's released code takes 3.

    Inputs: input, hx=None, *, lengths=None, reset=None
        hx: (h_0, c_0), (S, B, P) and (S, B, H), P = proj_size or else H. c_0 is the state. h_0 has no part in these
            equations: its shape, dtype and device are checked, and it is otherwise unused, and never has a gradient.
        The others as in `MinGRU`.

    Returns: output, (h_n, c_n)
        output: (T, B, P x directions), or laid out as the input is.
        h_n, c_n: (S, B, P) and (S, B, H): c_n is the state after the last step, h_n its projection, or its equal
            without `proj_size`; after no step at all, with T or a length of 0, c_n is c_0, and h_n is made of that.

    Parameters: weight_ih_l{k} (3H, D or P x directions) and bias_ih_l{k} (3H,), rows [forget | input | candidate];
    weight_hr_l{k} (P, H) with `proj_size`; initial_l{k} (H,) if learned; the same with the suffix _reverse.

    Raises: as `MinGRU`.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 3.2 and appendix B; the projection as in Sak et al.
    (2014).

    Example:
        >>> rnn = MinLSTM(10, 20, batch_first=True)
        >>> output, (h_n, c_n) = rnn(torch.randn(3, 5, 10), lengths=[5, 2, 0])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        activation: str = "g",
        learn_initial_state: bool = False,
        normalize: bool = True,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            activation,
            learn_initial_state,
            forget_bias,
        )
        self.normalize = normalize


class _Cell(Gated):
    """One step: a scan with T = 1."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device,
        dtype,
        activation: str,
        learn_initial_state: bool,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, activation, learn_initial_state, forget_bias)
        self._suffixes = [""]
        self._create_weights("", self.input_size, device, dtype)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """The state after one step on `input`, (B, D) or (D,), from `hx`."""
        weight, bias, _, learned = self._weights("")
        self._check_input(input, (1, 2), weight)
        initial = self._check_states(hx, input, input.shape[:-1])
        projection = F.linear(input, weight, bias).unsqueeze(-2)
        if input.dim() == 2:
            _, last = self._recur(projection, learned, initial)
        else:
            _, last = self._recur(projection[None], learned, None if initial is None else initial[None])
            last = last[0]
        return self._give_states(last, last)


class MinGRUCell(GRUKind, _Cell):
    """One step of minGRU, with nn.GRUCell's interface.

        z = sigmoid(W_z x + b_z),  h' = (1 - z) ⊙ h + z ⊙ act(W_h x + b_h)

    Args:
        input_size, hidden_size, bias, device, dtype: as in nn.GRUCell.
        activation, learn_initial_state: as in `MinGRU`.

    Inputs: input (B, D) or (D,); hx (B, H) or (H,), by default the learned initial state, or zeros.

    Returns: h' (B, H) or (H,), in the dtype of the projection. (To carry a 16-bit state without rounding it at every
    step, use `minrnn.ops.mingru_scan`, whose `last` is float32.)

    Parameters: weight_ih (2H, D) and bias_ih (2H,), rows [gate | candidate]; initial (H,) if learned. The cell computes
    what a layer with the same parameters does in one step.

    Errors and source: as `MinGRU`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "g",
        learn_initial_state: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, activation, learn_initial_state)


class MinLSTMCell(LSTMKind, _Cell):
    """One step of minLSTM, with nn.LSTMCell's interface.

        f, i = sigmoid(W_f x + b_f), sigmoid(W_i x + b_i),  c' = f/(f+i) ⊙ c + i/(f+i) ⊙ act(W_h x + b_h),  h' = c'

    Args:
        input_size, hidden_size, bias, device, dtype: as in nn.LSTMCell.
        activation, learn_initial_state, normalize, forget_bias: as in `MinLSTM`.

    Inputs: input (B, D) or (D,); hx = (h, c), each (B, H) or (H,), by default the learned initial state, or zeros. c is
    the state; h is checked and otherwise unused.

    Returns: (h', c'), equal to each other, each (B, H) or (H,), in the dtype of the projection.

    Parameters: weight_ih (3H, D) and bias_ih (3H,), rows [forget | input | candidate]; initial (H,) if learned.

    Errors and source: as `MinLSTM`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "g",
        learn_initial_state: bool = False,
        normalize: bool = True,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, activation, learn_initial_state, forget_bias)
        self.normalize = normalize
