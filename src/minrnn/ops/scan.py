"""The doors of the scans: validate, choose a backend, run, and the autograd rules.

A scan is h_t = a_t h_{t-1} + b_t over (B, T, H), forward in time or in reverse. The gated scans compute a_t and b_t from a projection as
they go. One set of rules serves both: the gradient of a scan is the same scan run the other way and one product. The rules are registered
twice, because of what PyTorch supports: an operator of torch.library under torch.compile, an autograd.Function (vmap, jvp) elsewhere.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from minrnn._shapes import accumulate_dtype, check_shape, check_tensor, laid_out_like, shape_error, time_major
from minrnn.ops import backends, gates as gating, native, parallel, reference


class Spec(NamedTuple):
    """What a scan is, apart from its tensors. `gates` is None for a linear scan."""

    gates: str | None
    activation: str
    reverse: bool
    backend: str | None

    @property
    def door(self) -> str:
        return "linear_scan" if self.gates is None else f"{self.gates.removesuffix('_unnormalized')}_scan"


# --- the doors -------------------------------------------------------------------------------------------------------------------


def linear_scan(
    coeffs: Tensor,
    values: Tensor,
    initial: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The first-order linear recurrence h_t = a_t ⊙ h_{t-1} + b_t, for all t, in parallel over batch, channels and time.

    Args:
        coeffs: a, broadcastable to (B, T, H), real or complex, of the dtype of `values`.
        values: b, (B, T, H): float32, float64, bfloat16, float16, complex64 or complex128.
        initial: h_{-1}, (B, H); zeros if None. Its dtype is that of the values or that in which the state is kept.
        reset: bool (B, T). Where true, step t begins a new sequence: the state carried into it is zero, in values and in gradients,
            by selection, so that a NaN before a reset ends there.
        reverse: run from the last step to the first, h_t = a_t h_{t+1} + b_t; `initial` then enters at the end, and a reset at t cuts
            the state that comes from t+1.
        backend: "native", "parallel" or "reference"; None takes the fastest for the tensors' device.

    Returns:
        h, (B, T, H), in the dtype of `values`, laid out in memory as `values` is.

    Numerics: linear space, the state in float32 for 16-bit input and in the input's dtype otherwise; deterministic, and bitwise
    independent of the batch and of the number of threads. A product of coefficients that overflows is not rescued.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than wanted.
        ValueError: shapes or devices do not agree, or the backend cannot serve.

    Source: Blelloch, "Prefix sums and their applications" (1990), §1.4; Martin and Cundy, "Parallelizing linear recurrent neural nets
    over sequence length" (2018), equation 2.
    """
    door = "linear_scan"
    _check_floating(door, "values", values, real=False)
    check_tensor(door, "coeffs", coeffs)
    if values.dim() != 3:
        raise shape_error(door, "values", "(B, T, H)", "three dimensions", tuple(values.shape))
    if coeffs.dtype != values.dtype:
        raise TypeError(f"{door}: coeffs must have the dtype of values, {values.dtype}, got {coeffs.dtype}")
    _check_device(door, "coeffs", coeffs, values)
    if coeffs.dim() > 3 or any(
        c not in (1, v) for c, v in zip(reversed(coeffs.shape), reversed(values.shape), strict=False)
    ):
        raise shape_error(door, "coeffs", "broadcastable to (B, T, H)", tuple(values.shape), tuple(coeffs.shape))
    batch, time, hidden = values.shape
    initial, _ = _check_context(door, values, batch, time, hidden, initial, reset, None, None)
    coeffs = coeffs[(None,) * (3 - coeffs.dim())]
    return _call((coeffs, values, initial, reset, None, None), Spec(None, "", reverse, backend))[0]


def mingru_scan(
    projection: Tensor,
    initial: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    restart: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    activation: str = "g",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """minGRU's recurrence from its projection, gates and scan in one pass.

    z_t = sigmoid(k_t), h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ act(v_t), where projection = [k | v]. z writes: it weighs the candidate
    (in nn.GRU z keeps). Defined as the gates followed by `linear_scan`; neither a_t nor b_t is written to memory.

    Args:
        projection: (B, T, 2H), blocks [gate k | candidate v]; float32, float64, bfloat16 or float16; the last dimension contiguous,
            any strides otherwise.
        initial: h_{-1}, (B, H); zeros if None.
        reset: bool (B, T). Where true, step t begins a new sequence: what is carried into it is `restart`, by selection.
        restart: (H,), the state at the beginning of a sequence after a reset; zeros if None.
        lengths: int64 (B,). Steps at or beyond a length are padding: h is 0 there, the state passes them by, nothing reaches their
            gradient, whatever they hold. A reverse scan begins at the last step that is not padding.
        reverse: from the last step to the first, as in `linear_scan`.
        activation: "g", x + 1/2 where x >= 0 and sigmoid(x) elsewhere, the paper's log-space form; "identity", its vanilla form; "tanh".
        backend: as in `linear_scan`.

    Returns:
        h, (B, T, H), in the dtype of the projection; and the last state, (B, H), in the dtype in which states are kept (float32 for
        16-bit input), so that carrying it on loses nothing. With T = 0 that is `initial`.

    Numerics and errors: as in `linear_scan`.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 3.1 and appendix B.
    """
    return _gated("mingru", projection, initial, reset, restart, lengths, reverse, activation, backend)


def minlstm_scan(
    projection: Tensor,
    initial: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    restart: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    activation: str = "g",
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """minLSTM's recurrence from its projection, gates and scan in one pass.

    f_t = sigmoid(k_t), i_t = sigmoid(j_t), h_t = f'_t ⊙ h_{t-1} + i'_t ⊙ act(v_t), where projection = [k | j | v] and
    (f', i') = (f, i) / (f + i) if `normalize`, else (f, i).

    Args:
        projection: (B, T, 3H), blocks [forget k | input j | candidate v].
        normalize: the paper's length-independent scaling. Two shut gates, f = i = 0, are no 0/0: the quotient is taken of logarithms.
        initial, reset, restart, lengths, reverse, activation, backend: as in `mingru_scan`.

    Returns, numerics and errors: as in `mingru_scan`.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 3.2 and appendix B.
    """
    kind = "minlstm" if normalize else "minlstm_unnormalized"
    return _gated(kind, projection, initial, reset, restart, lengths, reverse, activation, backend)


def _gated(gates, projection, initial, reset, restart, lengths, reverse, activation, backend) -> tuple[Tensor, Tensor]:
    spec = Spec(gates, activation, reverse, backend)
    door, blocks = spec.door, gating.width(gates)
    if activation not in gating.ACTIVATIONS:
        raise ValueError(f"{door}: activation must be one of {gating.ACTIVATIONS}, got {activation!r}")
    _check_floating(door, "projection", projection, real=True)
    if projection.dim() != 3 or projection.shape[2] % blocks:
        wanted = "three dimensions, the last divisible by"
        raise shape_error(door, "projection", f"(B, T, {blocks}H)", f"{wanted} {blocks}", tuple(projection.shape))
    batch, time, wide = projection.shape
    hidden = wide // blocks
    initial, restart = _check_context(door, projection, batch, time, hidden, initial, reset, restart, lengths)
    if restart is not None:
        # The rules know one restart per sequence; summing the gradient over the batch is the expansion's own rule.
        restart = restart.expand(batch, hidden) if reset is not None else None
    return _call((projection, None, initial, reset, restart, lengths), spec)


def _check_floating(door: str, name: str, tensor: Tensor, *, real: bool) -> None:
    check_tensor(door, name, tensor)
    if not backends.supported(tensor.dtype, real=real):
        kinds = "float32, float64, bfloat16 or float16" + ("" if real else ", complex64 or complex128")
        raise TypeError(f"{door}: {name} must be {kinds}, got {tensor.dtype}")


def _check_device(door: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{door}: {name} must be on {like.device} as the input is, got {tensor.device}")


def _check_context(
    door: str,
    like: Tensor,
    batch: int,
    time: int,
    hidden: int,
    initial: Tensor | None,
    reset: Tensor | None,
    restart: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Check what surrounds a series; `initial` and `restart` come back in the dtype in which the state is kept."""
    keep = accumulate_dtype(like.dtype)

    def state(name: str, tensor: Tensor | None, letters: str, shape: tuple[int, ...]) -> Tensor | None:
        if tensor is None:
            return None
        check_tensor(door, name, tensor)
        check_shape(door, name, tensor, letters, shape)
        _check_device(door, name, tensor, like)
        if tensor.dtype == keep:
            return tensor
        if tensor.dtype != like.dtype:
            raise TypeError(f"{door}: {name} must be {keep} or {like.dtype}, got {tensor.dtype}")
        return tensor.to(keep)

    initial = state("initial", initial, "(B, H)", (batch, hidden))
    restart = state("restart", restart, "(H,)", (hidden,))
    if reset is not None:
        check_tensor(door, "reset", reset)
        if reset.dtype != torch.bool:
            raise TypeError(f"{door}: reset must be bool, got {reset.dtype}")
        check_shape(door, "reset", reset, "(B, T)", (batch, time))
        _check_device(door, "reset", reset, like)
    if lengths is not None:
        check_tensor(door, "lengths", lengths)
        if lengths.dtype != torch.int64:
            raise TypeError(f"{door}: lengths must be int64, got {lengths.dtype}")
        check_shape(door, "lengths", lengths, "(B,)", (batch,))
        _check_device(door, "lengths", lengths, like)
    return initial, restart


# --- what runs: tensors in, tensors out, no autograd ------------------------------------------------------------------------------
# `inputs` everywhere below: (projection or coeffs, values or None, initial, reset, restart, lengths).


def _forward(inputs: tuple, spec: Spec) -> tuple[Tensor, Tensor]:
    source, values, initial, reset, restart, lengths = inputs
    like = source if values is None else values
    backend = backends.choose(spec.backend, like, spec.door)
    if backend == "native" and eager_transforms.JVP_NESTING <= 1:
        return native.forward(inputs, spec.gates, spec.activation, spec.reverse)
    keep = accumulate_dtype(like.dtype)
    if spec.gates is None:
        coeffs, values = source.to(keep), values.to(keep)
    else:
        coeffs, values = gating.coefficients(source.to(keep), spec.gates, spec.activation)
    engine = reference.scan if backend == "reference" else parallel.scan
    hidden, last = engine(
        coeffs, values, initial, reset=reset, restart=restart, lengths=lengths, reverse=spec.reverse
    )
    return _laid_out(hidden, like), last


def _laid_out(series: Tensor, like: Tensor) -> Tensor:
    """`series` in the dtype and the memory order of `like`."""
    series = series.to(like.dtype)
    return series.transpose(0, 1).contiguous().transpose(0, 1) if time_major(like) else series.contiguous()


def _backward(grad_hidden: Tensor | None, grad_last: Tensor | None, inputs: tuple, hidden: Tensor, spec: Spec) -> tuple:
    """Gradients of (projection or coeffs, values, initial, restart); None for those that are None."""
    source, values, initial, reset, restart, lengths = inputs
    like = source if values is None else values
    if not torch.is_grad_enabled() and backends.choose(spec.backend, like, spec.door) == "native":
        return native.backward(grad_hidden, grad_last, inputs, hidden, spec.gates, spec.activation, spec.reverse)
    adjoint = _Adjoint(inputs, hidden, spec)
    return adjoint.gradients(grad_hidden, grad_last)


class _Adjoint:
    """The rules in terms of gates and `linear_scan`: differentiable again, on any backend."""

    def __init__(self, inputs: tuple, hidden: Tensor, spec: Spec):
        self.source, self.values, self.initial, self.reset, self.restart, self.lengths = inputs
        self.spec = spec
        keep = accumulate_dtype(hidden.dtype)
        self.hidden = hidden.to(keep)
        self.wide_source = self.source.to(keep)
        self.padding = None
        if self.lengths is not None:
            self.padding = parallel.padded_steps(self.lengths, hidden.shape[1])
            if self.reset is not None:
                self.reset = self.reset & ~self.padding[..., 0]
        if spec.gates is None:
            self.coeffs = self.wide_source.expand(hidden.shape)
        else:
            self.coeffs, _ = gating.coefficients(self.wide_source, spec.gates, spec.activation)
            if self.padding is not None:
                self.coeffs = torch.where(self.padding, torch.ones_like(self.coeffs), self.coeffs)

    def previous(self) -> Tensor:
        """What was carried into each step, (B, T, H)."""
        hidden = self.hidden
        first = torch.zeros_like(hidden[:, 0]) if self.initial is None else self.initial
        if self.padding is not None and self.spec.reverse:  # the padding, which comes first, hands `initial` on
            hidden = torch.where(self.padding, first[:, None], hidden)
        before = _shift(hidden, first, self.spec.reverse)
        if self.reset is None:
            return before
        restart = torch.zeros_like(first) if self.restart is None else self.restart
        return torch.where(self.reset[..., None], restart[:, None], before)

    def scan_back(self, grads: Tensor) -> Tensor:
        """G_t = grad_t + a_{t+1} G_{t+1}, where the state was not cut between t and t+1."""
        follow = not self.spec.reverse
        coeffs = _shift(self.coeffs, torch.zeros_like(self.coeffs[:, 0]), follow).conj()
        cut = None
        if self.reset is not None:
            cut = _shift(self.reset, torch.zeros_like(self.reset[:, 0]), follow)
        return linear_scan(coeffs, grads, reset=cut, reverse=follow, backend=self.spec.backend)

    def gradients(self, grad_hidden: Tensor | None, grad_last: Tensor | None) -> tuple:
        keep, time = self.hidden.dtype, self.hidden.shape[1]
        grads = torch.zeros_like(self.hidden) if grad_hidden is None else grad_hidden.to(keep)
        if time == 0:
            nothing = [None if x is None else torch.zeros_like(x) for x in (self.source, self.values, self.initial, self.restart)]
            if self.initial is not None and grad_last is not None:
                nothing[2] = grad_last.clone()
            return tuple(nothing)
        if self.padding is not None:
            grads = torch.where(self.padding, torch.zeros_like(grads), grads)
        if grad_last is not None:
            end = 0 if self.spec.reverse else time - 1
            at_end = (torch.arange(time, device=grads.device) == end)[None, :, None]
            grads = grads + torch.where(at_end, grad_last[:, None], torch.zeros_like(grads))
        adjoint = self.scan_back(grads)
        carried = self.coeffs.conj() * adjoint  # the gradient of what was carried into each step
        grad_restart = None
        if self.restart is not None:
            grad_restart = torch.where(self.reset[..., None], carried, torch.zeros_like(carried)).sum(1)
        grad_initial = None
        if self.initial is not None:
            begin = time - 1 if self.spec.reverse else 0
            grad_initial = carried[:, begin]
            if self.reset is not None:
                grad_initial = torch.where(self.reset[:, begin, None], torch.zeros_like(grad_initial), grad_initial)
        by_coeffs = adjoint * self.previous().conj()
        if self.spec.gates is None:
            grad_coeffs = by_coeffs.sum_to_size(self.source.shape).to(self.source.dtype)
            return grad_coeffs, adjoint.to(self.values.dtype), grad_initial, grad_restart
        blocks = []
        for a_slope, b_slope in gating.partials(self.wide_source, self.spec.gates, self.spec.activation):
            a_part = None if a_slope is None else a_slope * by_coeffs
            b_part = None if b_slope is None else b_slope * adjoint
            block = b_part if a_part is None else a_part if b_part is None else a_part + b_part
            blocks.append(block if self.padding is None else torch.where(self.padding, torch.zeros_like(block), block))
        return torch.cat(blocks, -1).to(self.source.dtype), None, grad_initial, grad_restart

    def tangents(self, source: Tensor | None, values: Tensor | None, initial: Tensor | None, restart: Tensor | None):
        """The tangents of (h, last): the scan of the perturbed recurrence, da_t h_{t-1} + db_t."""
        previous, keep = self.previous() if self.hidden.shape[1] else self.hidden, self.hidden.dtype
        drive = torch.zeros_like(self.hidden)
        if self.spec.gates is None:
            if source is not None:
                drive = drive + source.to(keep) * previous
            if values is not None:
                drive = drive + values.to(keep)
        elif source is not None:
            slopes = gating.partials(self.wide_source, self.spec.gates, self.spec.activation)
            for (a_slope, b_slope), block in zip(slopes, source.to(keep).chunk(len(slopes), -1), strict=True):
                if a_slope is not None:
                    drive = drive + a_slope * block * previous
                if b_slope is not None:
                    drive = drive + b_slope * block
        if self.padding is not None:
            drive = torch.where(self.padding, torch.zeros_like(drive), drive)
        if restart is not None:
            drive = torch.where(self.reset[..., None], drive + self.coeffs * restart[:, None], drive)
        scan = {"reset": self.reset, "reverse": self.spec.reverse, "backend": self.spec.backend}
        hidden = linear_scan(self.coeffs, drive, initial, **scan)
        if hidden.shape[1] == 0:
            last = torch.zeros_like(self.hidden.sum(1)) if initial is None else initial.clone()
        else:
            last = hidden[:, 0 if self.spec.reverse else -1].clone()
        if self.padding is not None:
            hidden = torch.where(self.padding, torch.zeros_like(hidden), hidden)
        return hidden, last


def _shift(series: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """The series one step later, `first` at its beginning (one step earlier and at its end, if reverse)."""
    if reverse:
        return torch.cat([series[:, 1:], first[:, None]], 1)
    return torch.cat([first[:, None], series[:, :-1]], 1)


# --- the rules, registered twice --------------------------------------------------------------------------------------------------


def _call(inputs: tuple, spec: Spec) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return torch.ops.minrnn.scan(*inputs, *_plain(spec))
    if spec.backend == "reference" or eager_transforms.JVP_NESTING > 1:
        # The oracle goes by PyTorch's own rules; and a Function's tangent has, in PyTorch, a zero tangent of its own without a word.
        return _forward(inputs, spec)
    return _Scan.apply(*inputs, spec)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(source, values, initial, reset, restart, lengths, spec: Spec):
        return _forward((source, values, initial, reset, restart, lengths), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.spec = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0])
        ctx.save_for_forward(*tensors, output[0])

    @staticmethod
    def backward(ctx: Any, grad_hidden, grad_last):
        *inputs, hidden = ctx.saved_tensors
        grads = _backward(grad_hidden, grad_last, tuple(inputs), hidden, ctx.spec)
        source, values, initial, restart = grads
        return source, values, initial, None, restart, None, None

    @staticmethod
    def jvp(ctx: Any, source, values, initial, reset, restart, lengths, spec):
        *inputs, hidden = ctx.saved_tensors
        tangent, last = _Adjoint(tuple(inputs), hidden, ctx.spec).tangents(source, values, initial, restart)
        return tangent.to(hidden.dtype), last

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        """A mapped dimension joins the batch."""
        *tensors, spec = args

        def to_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            return tensor if tensor is None else tensor[None] if dim is None else tensor.movedim(dim, 0)

        source, values, *rest = (to_front(t, d) for t, d in zip(tensors, in_dims[:-1], strict=True))
        if values is not None:  # coefficients that the whole batch shares are written out
            source = source.expand(-1, values.shape[1], -1, -1)
        size = info.batch_size
        folded = (None if t is None else t.expand(size, *t.shape[1:]).flatten(0, 1) for t in (source, values, *rest))
        hidden, last = _Scan.apply(*folded, spec)
        return (hidden.unflatten(0, (size, -1)), last.unflatten(0, (size, -1))), (0, 0)


def _plain(spec: Spec) -> tuple[str, str, bool, str]:
    return spec.gates or "", spec.activation, spec.reverse, spec.backend or ""


def _spec(gates: str, activation: str, reverse: bool, backend: str) -> Spec:
    return Spec(gates or None, activation, reverse, backend or None)


_TENSORS = "Tensor source, Tensor? values, Tensor? initial, Tensor? reset, Tensor? restart, Tensor? lengths"
_SETTING = "str gates, str activation, bool reverse, str backend"


@torch.library.custom_op("minrnn::scan", mutates_args=(), schema=f"({_TENSORS}, {_SETTING}) -> (Tensor, Tensor)")
def _scan_op(source, values, initial, reset, restart, lengths, gates, activation, reverse, backend):
    return _forward((source, values, initial, reset, restart, lengths), _spec(gates, activation, reverse, backend))


@_scan_op.register_fake
def _(source, values, initial, reset, restart, lengths, gates, activation, reverse, backend):
    like = source if values is None else values
    hidden = like.shape[2] if values is not None else like.shape[2] // gating.width(gates)
    last = like.new_empty((like.shape[0], hidden), dtype=accumulate_dtype(like.dtype))
    return laid_out_like(like, hidden, like.dtype), last


@torch.library.custom_op(
    "minrnn::scan_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_hidden, Tensor? grad_last, {_TENSORS}, Tensor hidden, {_SETTING}) -> Tensor[]",
)
def _scan_backward_op(
    grad_hidden, grad_last, source, values, initial, reset, restart, lengths, hidden, gates, activation, reverse, backend
):
    inputs = (source, values, initial, reset, restart, lengths)
    with torch.no_grad():
        grads = _backward(grad_hidden, grad_last, inputs, hidden, _spec(gates, activation, reverse, backend))
    return [grad for grad in grads if grad is not None]


@_scan_backward_op.register_fake
def _(
    grad_hidden, grad_last, source, values, initial, reset, restart, lengths, hidden, gates, activation, reverse, backend
):
    present = [laid_out_like(source, source.shape[2], source.dtype) if values is None else torch.empty_like(source)]
    present += [laid_out_like(values, values.shape[2], values.dtype)] if values is not None else []
    return present + [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (initial, restart) if x is not None]


def _op_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, gates, activation, reverse, backend = inputs
    ctx.setting = (gates, activation, reverse, backend)
    ctx.save_for_backward(*tensors, output[0])


def _op_backward(ctx: Any, grad_hidden, grad_last):
    *inputs, hidden = ctx.saved_tensors
    source, values, initial, reset, restart, lengths = inputs
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative is asked for
        grads = iter(_Adjoint(tuple(inputs), hidden, _spec(*ctx.setting)).gradients(grad_hidden, grad_last))
        source_grad, values_grad, initial_grad, restart_grad = grads
    else:
        present = iter(torch.ops.minrnn.scan_backward(grad_hidden, grad_last, *inputs, hidden, *ctx.setting))
        source_grad, values_grad, initial_grad, restart_grad = (
            None if x is None else next(present) for x in (source, values, initial, restart)
        )
    return source_grad, values_grad, initial_grad, None, restart_grad, None, None, None, None, None


torch.library.register_autograd("minrnn::scan", _op_backward, setup_context=_op_context)
