"""Short causal convolutions along time, with the inputs that they still need as their state.

B batch, T time, D model width, K kernel size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._shapes import check_shape, check_tensor
from minrnn.mixers.contract import Mixer, check_series


class DepthwiseConv(Mixer):
    """y_t = b + sum over k of w_k ⊙ x_{t-K+1+k}, k = 0 ... K-1: each channel along time.

    Zeros stand before the beginning of a sequence. The state is the last K-1 inputs, (B, K-1, D), zeros for those that
    a reset has cut off. (As a sum of shifted products it is faster on CPUs than a grouped convolution.) It begins as
    nn.Conv1d does.

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
        door, past = type(self).__name__, self.kernel - 1
        check_series(door, x, self.width, reset)
        batch, time, _ = x.shape
        if state is None:
            state = self.initial_state(batch)
        else:
            check_tensor(door, "state", state)
            check_shape(door, "state", state, "(B, K-1, D)", (batch, past, self.width))
        inputs = torch.cat([state, x], 1)
        # Which sequence an input belongs to, counted by the resets: only inputs of the same one meet.
        count = None if reset is None else F.pad(reset.long(), (past, 0)).cumsum(1)

        def seen(start: int, stop: int, here: slice) -> Tensor:
            if count is None:
                return inputs[:, start:stop]
            return inputs[:, start:stop].where((count[:, start:stop] == count[:, here])[..., None], 0)

        mixed = sum(seen(k, k + time, slice(past, None)) * self.weight[k] for k in range(self.kernel))
        mixed = mixed if self.bias is None else mixed + self.bias
        return mixed, seen(time, time + past, slice(-1, None)).clone()

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
