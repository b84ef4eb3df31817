"""Series that go on after what a state holds, and resets in them, for systems that compute a whole series at once.

B batch, T time, D channels, P steps of the past, L length of a kernel.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn._shapes import accumulate_dtype
from minrnn.ops.fft import long_conv

FEW = 8  # steps that are convolved faster as sums than by FFT


class Segments(NamedTuple):
    """The first and the last sequence in each row of a batch, for systems whose state has a constant size.

    What comes from the state before is added where `first` says, by selection. The state after is that of the series
    whose steps are zero but where `last` says; it depends on the state before in the rows that are `whole`, no others.
    All between is `long_conv(..., reset=reset)`.

    Args:
        first: bool (B, T), the steps before the first reset.
        last: bool (B, T), the steps from the last reset on, or all.
        whole: bool (B,), the rows without a reset.
    """

    first: Tensor
    last: Tensor
    whole: Tensor


def segments(reset: Tensor) -> Segments:
    """The first and the last sequence in each row of `reset`, bool (B, T)."""
    count, total = reset.cumsum(1), reset.sum(1, keepdim=True)
    return Segments(count == 0, count == total, total[:, 0] == 0)


class Joined:
    """Convolution of series whose first P steps are the past, from the state, and whose last T are new.

    In the past a row holds zeros before the beginning of its sequence.

    Args:
        past: P.
        time: T.
        reset: bool (B, T), of the new steps.
    """

    def __init__(self, past: int, time: int, reset: Tensor | None) -> None:
        self.time = time
        self.reset = None if reset is None else F.pad(reset, (past, 0))
        self._count = None if self.reset is None else self.reset.cumsum(1)

    def join(self, before: Tensor, x: Tensor) -> Tensor:
        """The series, (B, P+T, D), of the past and the new steps, in the dtype of these.

        A past that ends here becomes zeros: what it holds, perhaps NaN, is to be in no gradient.
        """
        past = before.shape[1]
        if past and self.time and self.reset is not None:
            before = before.where(~self.reset[:, past : past + 1, None], 0)
        return torch.cat([before.to(x.dtype), x], 1) if past else x

    def convolve(self, series: Tensor, kernel: Tensor) -> Tensor:
        """The new steps of `long_conv`, (B, T, D), of a series (B, P+T, D) with a kernel (D, L)."""
        past, total = series.shape[1] - self.time, series.shape[1]
        if self.time > FEW:
            return long_conv(series, kernel, reset=self.reset)[:, past:]
        outputs = []
        for end in range(past + 1, total + 1):
            begin = max(end - kernel.shape[1], 0)
            taps = kernel.mT[: end - begin].flip(0)
            outputs.append((self._seen(series, begin, end).to(accumulate_dtype(series.dtype)) * taps).sum(1))
        return torch.stack(outputs, 1).to(series.dtype) if outputs else series[:, past:]

    def keep(self, series: Tensor, steps: int) -> Tensor:
        """The last `steps` of a series, (B, steps, D), as the past of the next: zeros for other sequences."""
        return self._seen(series, series.shape[1] - steps, series.shape[1]).clone()

    def _seen(self, series: Tensor, begin: int, end: int) -> Tensor:
        """Steps from `begin` to `end`, zeros for those of other sequences than the last of them."""
        if self._count is None or begin == end:
            return series[:, begin:end]
        same = self._count[:, begin:end] == self._count[:, end - 1 : end]
        return series[:, begin:end].where(same[..., None], 0)
