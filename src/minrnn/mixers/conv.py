"""Short causal convolutions along time, with the inputs that they still need as their state.

B batch, T time, D model width, K kernel size.
"""

import torch
from torch import Tensor, nn

from minrnn.mixers.contract import Mixer, check_series, check_state_tensor
from minrnn.ops import short_conv


class DepthwiseConv(Mixer):
    """y_t = b + sum over k of w_k ⊙ x_{t-K+1+k}, k = 0 ... K-1: each channel along time.

    Zeros stand before the beginning of a sequence. The state is the last K-1 inputs, (B, K-1, D), zeros for those that
    a reset has cut off. It begins as nn.Conv1d does.

    Args:
        width: D.
        kernel: K, at least 1; small, for its cost is K T D.
        bias: whether there is b.
    """

    def __init__(self, width: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.kernel, self.width = kernel, width
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(kernel, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller = type(self).__name__
        check_series(caller, x, self.width, reset, self.weight)
        if state is None:
            state = self.initial_state(len(x))
        else:
            past = (len(x), self.kernel - 1, self.width)
            check_state_tensor(caller, "state", state, self.weight, "(B, K-1, D)", past)
            state = state.to(self.weight.dtype)
        return short_conv(x, self.weight, self.bias, state, reset)

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros, (batch_size, K-1, D)."""
        return self.weight.new_zeros(batch_size, self.kernel - 1, self.width)

    @property
    def state_size(self) -> int:
        """(K-1) D."""
        return (self.kernel - 1) * self.width

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}"


class CausalConv(DepthwiseConv):
    """y_t = b + W (sum over k of w_k ⊙ x_{t-K+1+k}), k = 0 ... K-1: each channel along time, then channels mixed.

    Args:
        width: D.
        kernel: K, at least 1.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), appendix C.2.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, kernel, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        mixed, state = super().forward(x, state, reset=reset)
        return self.output(mixed), state
