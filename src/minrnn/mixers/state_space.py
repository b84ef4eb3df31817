"""Linear time-invariant state-space models of each channel: as a convolution over a sequence, as a recurrence in steps.

B batch, T time, D model width, N state size per channel, of which N/2 complex numbers are kept.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from minrnn._config import check_positive, check_types
from minrnn._shapes import check_tensor, shape_error
from minrnn.mixers.contract import ALONE, Mixer, Place, Tuning, check_series, check_state
from minrnn.mixers.segments import segments
from minrnn.ops.fft import long_conv

CARRIED = 8  # steps that go one by one where a state was carried in, however many sequences there are


@dataclass(frozen=True)
class StateSpaceConfig:
    """Options that `S4D` and `S4` share.

    Args:
        state: N, real numbers of state per channel
        dt_min: the shortest step at the beginning of training
        dt_max: the longest
        lr_limit: the highest learning rate of the steps and the transition
    """

    state: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    lr_limit: float = 1e-3

    def __post_init__(self) -> None:
        check_types(self)
        caller = type(self).__name__
        if self.state < 2 or self.state % 2:
            raise ValueError(f"{caller}: state must be even and at least 2, got {self.state}")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise ValueError(
                f"{caller}: dt_min must be above 0 and at most dt_max, got {self.dt_min} and {self.dt_max}"
            )
        check_positive(self, "lr_limit", finite=False)


class LazyState:
    """A state that is formed when it is first looked at, for a training pass that looks at none must not pay for it.

    A leaf of it, got by `torch.utils._pytree`, is a tensor as any other.

    Args:
        form: makes the tensor. It runs with gradients where this object was made with them.
        shape: of the tensor.
        dtype: of the tensor.
        zeros: whether it is made of zeros.
    """

    def __init__(
        self, form: Callable[[], Any], shape: tuple[int, ...] | None, dtype: torch.dtype | None, zeros: bool = False
    ) -> None:
        self._form: Callable[[], Any] | None = form
        self._formed: Any = None
        self._grad = torch.is_grad_enabled()
        self.shape, self.dtype, self._zeros = shape, dtype, zeros

    @property
    def zeros(self) -> bool:
        """Whether it is known to hold nothing but zeros. (Into what has been looked at, something may be written.)"""
        return self._zeros and self._form is not None

    @property
    def tensor(self) -> Tensor:
        """The state itself."""
        if self._form is not None:
            # Out of inference mode, for there it would come without its graph.
            with torch.inference_mode(False), torch.set_grad_enabled(self._grad):
                self._formed, self._form = self._form(), None
        return self._formed

    @classmethod
    def of(cls, tensor: Any) -> "LazyState":
        """One that is there."""
        there = isinstance(tensor, Tensor)
        return cls(lambda: tensor, tuple(tensor.shape) if there else None, tensor.dtype if there else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyState.of, (self.tensor,)


register_pytree_node(
    LazyState,
    lambda state: ([state.tensor], None),
    lambda leaves, _: LazyState.of(next(iter(leaves))),
    serialized_type_name="minrnn.LazyState",
)


def as_real(z: Tensor) -> Tensor:
    """(..., N/2) complex to (..., N): real, imaginary, real, ..."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def as_complex(x: Tensor) -> Tensor:
    """(..., N) to (..., N/2) complex: the inverse of `as_real`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


class System(ABC):
    """h_t = Ā h_{t-1} + B̄ u_t and y_t = 2 Re sum over n of C_n h_{t,n}, for each of D channels.

    Ā maps real linearly: of each pair of conjugate numbers h holds one, and Ā may see both. All that a sequence needs
    follows from the powers Ā^(2^k). The first T numbers of an impulse response, C Ā^l B̄ with l = i S + s and S near
    the root of T, are the products of the rows C Ā^(i S) with the columns Ā^s B̄, both got by doubling: exact for any
    T, and neither rows nor columns are larger than the root of T. A short response is followed step by step instead.

    Args:
        output: C, (D, N/2) complex.
    """

    few: ClassVar[int]  # steps, of all sequences together, that cost less one by one than the powers do

    def __init__(self, output: Tensor) -> None:
        self._row = as_real(2 * output.conj())
        self._powers: list[Tensor] = []

    @abstractmethod
    def step(self, h: Tensor, u: Tensor) -> Tensor:
        """Ā h + B̄ u; h (..., D, N/2) complex, u (..., D)."""

    @abstractmethod
    def transition(self) -> Tensor:
        """Ā in the form that the next three want."""

    @abstractmethod
    def square(self, power: Tensor) -> Tensor:
        """The square of a power of Ā."""

    @abstractmethod
    def apply(self, power: Tensor, columns: Tensor) -> Tensor:
        """A power of Ā on (D, n, N), real."""

    @abstractmethod
    def apply_adjoint(self, power: Tensor, rows: Tensor) -> Tensor:
        """Its adjoint on (D, n, N), real."""

    def read(self, h: Tensor) -> Tensor:
        """y, (..., D), of the states h, (..., D, N/2)."""
        return (as_real(h) * self._row).sum(-1)

    def respond(self, columns: Tensor, time: int) -> Tensor:
        """The outputs from n states on, if no more comes in: (D, n, N) real to (D, time, n)."""
        states = columns.shape[1]
        if states == 1 and time <= self.few:
            h = as_complex(columns[:, 0])
            outputs = [self.read(h)]
            for _ in range(time - 1):
                h = self.step(h, torch.zeros_like(outputs[0]))
                outputs.append(self.read(h))
            return torch.stack(outputs, 1)[..., None]
        bits, blocks = _split(time)
        columns = self._series(self.apply, columns, 0, states << bits)
        rows = self._series(self.apply_adjoint, self._row[:, None], bits, blocks)
        return (rows @ columns.mT).unflatten(-1, (1 << bits, states)).flatten(1, 2)[:, :time]

    def inputs(self) -> Tensor:
        """B̄, (D, 1, N) real: where one unit leads that comes into an empty state."""
        ones = torch.ones_like(self._row[:, 0])
        return as_real(self.step(torch.zeros_like(as_complex(self._row)), ones))[:, None]

    def gather(self, u: Tensor) -> Tensor:
        """The state, (B, D, N/2) complex, that u, (B, T, D), leaves behind if it comes into an empty one."""
        bits, blocks = _split(u.shape[1])
        columns = self._series(self.apply, self.inputs(), 0, 1 << bits).flip(1)
        padded = F.pad(u, (0, 0, (blocks << bits) - u.shape[1], 0)).permute(2, 0, 1)
        h = (padded.reshape(padded.shape[0], -1, 1 << bits) @ columns).unflatten(1, (u.shape[0], blocks))
        while h.shape[2] > 1:  # of two neighbours the earlier goes on over the length of the later
            h = F.pad(h, (0, 0, h.shape[2] % 2, 0))
            earlier, later = h[:, :, ::2], h[:, :, 1::2]
            h = self.apply(self._power(bits), earlier.flatten(1, 2)).view_as(later) + later
            bits += 1
        # A tensor of its own: torch.compile does not take a complex view of real numbers as an argument.
        return as_complex(h[:, :, 0]).transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def advance(self, columns: Tensor, time: int) -> Tensor:
        """Ā^time on (D, n, N), real."""
        for bit in range(time.bit_length()):
            if time >> bit & 1:
                columns = self.apply(self._power(bit), columns)
        return columns

    def _power(self, bit: int) -> Tensor:
        """Ā^(2^bit)."""
        while len(self._powers) <= bit:
            self._powers.append(self.square(self._powers[-1]) if self._powers else self.transition())
        return self._powers[bit]

    def _series(self, apply: Callable[[Tensor, Tensor], Tensor], start: Tensor, bit: int, count: int) -> Tensor:
        """`start`, (D, n, N), and what the powers of Ā^(2^bit) make of it, until there are `count`: (D, count, N)."""
        while start.shape[1] < count:
            start = torch.cat([start, apply(self._power(bit), start[:, : count - start.shape[1]])], 1)
            bit += 1
        return start


def _split(time: int) -> tuple[int, int]:
    """(s, blocks): so many blocks of 2^s steps, near the root of `time`, hold `time` steps."""
    bits = (time - 1).bit_length() // 2
    return bits, -(-time >> bits)


def _select(x: Tensor, where: Tensor | None) -> Tensor:
    """x where `where`, of its first dimensions, is true, zeros elsewhere; all of x if that is None."""
    return x if where is None else x.where(where[(...,) + (None,) * (x.dim() - where.dim())], 0)


class StateSpace(Mixer):
    """y_t = SSM(x)_t + D ⊙ x_t, each channel with a state of N numbers of its own.

    Whole sequences are convolved with the impulse response of their length, computed for each call; few steps, and the
    steps of few sequences, follow the recurrence. The state is complex, (B, D, N/2), and formed when it is looked at
    (`LazyState`). All of the state-space model stays in float32 in a 16-bit module. D begins as N(0, 1), C as complex
    N(0, 1), the steps log-uniform in [dt_min, dt_max]. Under torch.compile each length is a graph of its own.

    Args:
        width: D.
        config: the options.
        place: of no importance here.
    """

    def __init__(self, width: int, config: StateSpaceConfig, place: Place = ALONE) -> None:
        super().__init__()
        self.width, self.pairs, self.lr_limit = width, config.state // 2, config.lr_limit
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.log_step = nn.Parameter(torch.empty(width).uniform_(low, high))
        self.C = nn.Parameter(torch.randn(width, self.pairs, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(width))

    @abstractmethod
    def discretize(self) -> System:
        """The system of the parameters as they are."""

    def tuning(self) -> Mapping[str, Tuning]:
        """No decay and at most `lr_limit` for all but C and D."""
        slow = Tuning(lr_limit=self.lr_limit, decay=False, keep_float32=True)
        kept = {"C": Tuning(keep_float32=True), "D": Tuning(keep_float32=True)}
        return {name: slow for name, _ in self.named_parameters()} | kept

    def forward(
        self, x: Tensor, state: LazyState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, LazyState]:
        """y and the state after the last step; arguments and errors as in `Mixer.forward`."""
        check_series(type(self).__name__, x, self.width, reset, self.D, wide=True)
        state = self.initial_state(len(x)) if state is None else state
        self._check_state(state, len(x))
        if x.shape[0] == 0 or x.shape[1] == 0:
            return x * self.D.to(x.dtype), state
        with torch.autocast(x.device.type, enabled=False):
            system, u = self.discretize(), x.to(self.D.dtype)
            batch, time, _ = x.shape
            # To follow a state that was carried in costs by the sequence, too.
            if time <= (1 if state.zeros else CARRIED) or batch * time <= system.few:
                y, state = self._steps(system, u, state, reset)
            else:
                y, state = self._whole(system, u, state, reset)
            return torch.addcmul(y, u, self.D).to(x.dtype), state

    def initial_state(self, batch_size: int) -> LazyState:
        """Zeros, (batch_size, D, N/2)."""
        shape, dtype = (batch_size, self.width, self.pairs), self._dtype
        return LazyState(lambda: torch.zeros(shape, dtype=dtype, device=self.C.device), shape, dtype, zeros=True)

    @property
    def state_size(self) -> int:
        """D N."""
        return self.width * self.pairs * 2

    @property
    def _dtype(self) -> torch.dtype:
        """Of the state."""
        return torch.complex128 if self.C.dtype == torch.float64 else torch.complex64

    def _steps(self, system: System, u: Tensor, state: LazyState, reset: Tensor | None) -> tuple[Tensor, LazyState]:
        h, outputs = state.tensor, []
        for t in range(u.shape[1]):
            if reset is not None:
                h = _select(h, ~reset[:, t])
            h = system.step(h, u[:, t])
            outputs.append(system.read(h))
        return torch.stack(outputs, 1), LazyState.of(h)

    def _whole(self, system: System, u: Tensor, state: LazyState, reset: Tensor | None) -> tuple[Tensor, LazyState]:
        first, last, whole = (None, None, None) if reset is None else segments(reset)
        columns, before = system.inputs(), None
        if not state.zeros:
            h = system.step(_select(state.tensor, None if first is None else first[:, 0]), torch.zeros_like(u[:, 0]))
            before = as_real(h).transpose(0, 1)
            columns = torch.cat([columns, before], 1)
        responses = system.respond(columns, u.shape[1])
        y = long_conv(u, responses[..., 0].contiguous(), reset=reset)
        if not state.zeros:
            y = y + _select(responses[..., 1:].permute(2, 1, 0), first)
        compiling = torch.compiler.is_compiling()  # a graph has no later: then the state is formed at once
        # What autograd has recorded must stay as it is, and autograd counts its changes. Elsewhere a loop may fill its
        # buffer again, through NumPy too, where nobody counts: then a copy waits for the look.
        recorded = not compiling and y.requires_grad
        kept = u if recorded or compiling else u.clone()
        version = u._version if recorded else None

        def form() -> Tensor:
            if version is not None and kept._version != version:
                raise RuntimeError("state: x must stay as it is until the state is looked at, got it changed in place")
            with torch.autocast(u.device.type, enabled=False):
                h = system.gather(_select(kept, last))
                if before is None:
                    return h
                return h + _select(as_complex(system.advance(before, u.shape[1] - 1)).transpose(0, 1), whole)

        after = LazyState(form, (len(u), self.width, self.pairs), self._dtype)
        if compiling:
            _ = after.tensor
        return y, after

    def _check_state(self, state: object, batch: int) -> None:
        caller, shape = type(self).__name__, (batch, self.width, self.pairs)
        check_state(caller, state, LazyState)
        state = cast(LazyState, state)
        if state.shape is None:
            check_tensor(caller, "state", state.tensor)
        if state.shape != shape:
            raise shape_error(caller, "state", "(B, D, N/2)", shape, state.shape)
        if state.dtype != self._dtype:
            raise ValueError(f"{caller}: state must be {self._dtype}, got {state.dtype}")
