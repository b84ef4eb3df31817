"""A short causal convolution along time, with the inputs that it still needs as its state.

B batch, T time, D model width, K kernel size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._shapes import check_shape, check_tensor
from minrnn.mixers.contract import Mixer, check_series


class CausalConv(Mixer):
    """y_t = b + W (sum over k of w_k ⊙ x_{t-K+1+k}), k = 0 ... K-1: each channel along time, then channels mixed.

    Zeros stand before the beginning of a sequence. The state is the last K-1 inputs, (B, K-1, D), zeros for those that
    a reset has cut off. (As a sum of shifted products it is faster on CPUs than a grouped convolution.)

    Args:
        width: D.
        kernel: K, at least 1.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), appendix C.2.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        bound = kernel**-0.5  # nn.Conv1d's
        self.weight = nn.Parameter(torch.empty(kernel, width).uniform_(-bound, bound))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        past, width = self.kernel - 1, self.output.in_features
        check_series("CausalConv", x, width, reset)
        batch, time, _ = x.shape
        if state is None:
            state = self.initial_state(batch)
        else:
            check_tensor("CausalConv", "state", state)
            check_shape("CausalConv", "state", state, "(B, K-1, D)", (batch, past, width))
        inputs = torch.cat([state, x], 1)
        # Which sequence an input belongs to, counted by the resets: only inputs of the same one meet.
        count = None if reset is None else F.pad(reset.long(), (past, 0)).cumsum(1)

        def seen(start: int, stop: int, here: slice) -> Tensor:
            if count is None:
                return inputs[:, start:stop]
            return inputs[:, start:stop].where((count[:, start:stop] == count[:, here])[..., None], 0)

        mixed = sum(seen(k, k + time, slice(past, None)) * self.weight[k] for k in range(self.kernel))
        return self.output(mixed), seen(time, time + past, slice(-1, None)).clone()

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros, (batch_size, K-1, D)."""
        return self.weight.new_zeros(batch_size, self.kernel - 1, self.output.in_features)

    @property
    def state_size(self) -> int:
        """(K-1) D."""
        return (self.kernel - 1) * self.output.in_features

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}"
