"""H3: a state-space model between two gates, after a shift of the keys.

B batch, T time, D model width, K taps.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minrnn._config import check_at_least, check_types
from minrnn.mixers.contract import ALONE, Mixer, Place, check_series, check_state
from minrnn.mixers.inner import inner_config, make_inner
from minrnn.mixers.segments import Joined


@dataclass(frozen=True)
class H3Config:
    """Options of `H3`.

    Args:
        taps: K, how far back the shift looks, itself included
        inner: what mixes along time between the gates, one of the table of inner layers
        inner_options: options of that; S4D's discretization is bilinear if they say nothing else
    """

    taps: int = 64
    inner: str = "s4d"
    inner_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "taps")
        inner_config(self.inner, self.options)

    @property
    def options(self) -> dict[str, Any]:
        """All that the inner layer is made with."""
        return {"discretization": "bilinear"} | self.inner_options if self.inner == "s4d" else self.inner_options


class H3State(NamedTuple):
    """What `H3` has seen.

    Args:
        keys: (B, K-1, D), the last keys, zeros for those before the beginning of a sequence.
        inner: the state of the inner layer.
    """

    keys: Tensor
    inner: Any


class H3(Mixer):
    """[q | k | v] = W_in x + b_in, y = W_out (q ⊙ inner(v ⊙ shift(k))) + b_out, shift(k)_t = s ⊙ k_t + sum over i < K
    of c_i ⊙ k_{t-i}.

    shift is a state-space model whose state are the last K inputs, and the inner layer, of D channels, one with a
    diagonal transition, S4D; the heads of the authors' code are of one channel here, its default. It begins with c from
    U(-1/sqrt(K), 1/sqrt(K)), s from N(0, 1), the linear maps as nn.Linear.

    Args:
        width: D.
        config: the options.
        place: handed on to the inner layer.

    Source: Fu et al., "Hungry hungry hippos: towards language modeling with state space models" (2023), section 3.1 and
    algorithm 1.
    """

    def __init__(self, width: int, config: H3Config, place: Place = ALONE) -> None:
        super().__init__()
        bound = config.taps**-0.5
        self.input = nn.Linear(width, 3 * width)
        self.taps = nn.Parameter(torch.empty(config.taps, width).uniform_(-bound, bound))
        self.skip = nn.Parameter(torch.randn(width))
        self.inner = make_inner(config.inner, width, config.options, place)
        self.output = nn.Linear(width, width)

    def forward(
        self, x: Tensor, state: H3State | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, H3State]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        caller, past, width = type(self).__name__, len(self.taps) - 1, len(self.skip)
        check_series(caller, x, width, reset, self.input.weight)
        state = self.initial_state(len(x)) if state is None else state
        check_state(caller, state, H3State, self.input.weight, keys=("(B, K-1, D)", (len(x), past, width)))
        q, k, v = self.input(x).chunk(3, -1)
        joined = Joined(past, x.shape[1], reset)
        keys = joined.join(state.keys, k)
        shifted = joined.convolve(keys, (self.taps + F.pad(self.skip[None], (0, 0, 0, past))).mT)
        mixed, inner = self.inner(v * shifted, state.inner, reset=reset)
        return self.output(q * mixed), H3State(joined.keep(keys, past), inner)

    def initial_state(self, batch_size: int) -> H3State:
        """Zeros, and the initial state of the inner layer."""
        keys = self.taps.new_zeros(batch_size, len(self.taps) - 1, len(self.skip))
        return H3State(keys, self.inner.initial_state(batch_size))

    @property
    def state_size(self) -> int | None:
        """(K-1) D and that of the inner layer."""
        inner = self.inner.state_size
        return None if inner is None else (len(self.taps) - 1) * len(self.skip) + inner

    def extra_repr(self) -> str:
        return f"taps={len(self.taps)}"
