"""The sequences that resets cut a batch of series into, for systems that compute each of them by itself.

B batch, T time, S sequences.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class Sequences:
    """The sequences of a batch in the order of its (B T) steps, row after row; a row that goes on begins one too.

    Args:
        reset: bool (B, T), T at least 1; where true, a sequence begins.

    Attributes:
        starts: (S,), the first step of each, of B T.
        lengths: (S,), in steps.
        row: (S,), where in the batch it is.
        continues: bool (S,), those that begin a row without a reset, and so go on from the state before it.
    """

    def __init__(self, reset: Tensor) -> None:
        begins = reset.clone()
        begins[:, 0] = True
        self.starts = begins.flatten().nonzero()[:, 0]
        self.lengths = self.starts.diff(append=self.starts.new_tensor([reset.numel()]))
        self.row = self.starts // reset.shape[1]
        self.continues = ~reset.flatten()[self.starts]
        self._steps = reset.numel()

    def groups(self, apart: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Sequences of similar lengths together, the longest of a group at most twice as long as the shortest.

        Args:
            apart: bool (S,), sequences that are a group of their own, whatever their lengths.

        Yields:
            which: bool (S,), the sequences of the group, G of them.
            index: (G, L), where their steps are, of B T; any step beyond an end.
            there: bool (G, L), which steps belong to a sequence.
        """
        bits = torch.frexp((self.lengths - 1).double()).exponent  # lengths in (2^(k-1), 2^k] have k
        if apart is not None:
            bits = bits.masked_fill(apart, -1)
        for bit in bits.unique():
            which = bits == bit
            lengths = self.lengths[which, None]
            steps = torch.arange(int(lengths.max()), device=lengths.device)
            yield which, (self.starts[which, None] + steps).clamp_(max=self._steps - 1), steps < lengths
