"""The public functions of the scans: validate what users give, then one call into the rules.

A scan is h_t = a_t h_{t-1} + b_t over (B, T, H), forward in time or in reverse. The gated scans compute a_t and b_t
from a projection as they go.
"""

import torch
from torch import Tensor

from minrnn._shapes import accumulate_dtype, check_device, check_reset, check_shape, check_tensor, shape_error
from minrnn.ops import autograd, backends
from minrnn.ops import gates as gating
from minrnn.ops.rules import Spec
from minrnn.ops.transforms import out_of_range


def linear_scan(
    coeffs: Tensor,
    values: Tensor,
    initial: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The first-order linear recurrence h_t = a_t ⊙ h_{t-1} + b_t, for all t, in parallel over batch, channels and
    time.

    Args:
        coeffs: a, broadcastable to (B, T, H), real or complex, of the dtype of `values`.
        values: b, (B, T, H): float32, float64, bfloat16, float16, complex64 or complex128.
        initial: h_{-1}, (B, H); zeros if None. Its dtype is that of the values or that in which the state is kept.
        reset: bool (B, T). Where true, step t begins a new sequence: the state carried into it is zero, in values and
            in gradients, by selection, so that a NaN before a reset ends there.
        reverse: run from the last step to the first, h_t = a_t h_{t+1} + b_t; `initial` then enters at the end, and a
            reset at t cuts the state that comes from t+1.
        backend: "native", "triton", "parallel" or "reference"; None takes the fastest for the tensors' device.

    Returns:
        h, (B, T, H), in the dtype of `values`, batch-major or time-major in memory as `values` is.

    Numerics: linear space, the state in float32 for 16-bit input and in the input's dtype otherwise; deterministic, and
    except in plain PyTorch, bitwise independent of the batch and of how the work is spread over threads or a GPU. A
    product of coefficients that overflows on the way is not rescued: it may give NaN where h itself would be finite, as
    one that underflows may beside an infinite state; which products are formed depends on backend and width.
    (Coefficients of at most 1, as all gates give, do not overflow.)

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than wanted.
        ValueError: shapes or devices do not agree, or the backend cannot serve.

    Source: Blelloch, "Prefix sums and their applications" (1990), §1.4; Martin and Cundy, "Parallelizing linear
    recurrent neural nets over sequence length" (2018), equation 2.
    """
    caller = "linear_scan"
    _check_floating(caller, "values", values, real=False)
    check_tensor(caller, "coeffs", coeffs)
    if values.dim() != 3:
        raise shape_error(caller, "values", "(B, T, H)", "three dimensions", tuple(values.shape))
    if coeffs.dtype != values.dtype:
        raise TypeError(f"{caller}: coeffs must have the dtype of values, {values.dtype}, got {coeffs.dtype}")
    check_device(caller, values, coeffs=coeffs)
    if coeffs.dim() > 3 or any(
        c not in (1, v) for c, v in zip(reversed(coeffs.shape), reversed(values.shape), strict=False)
    ):
        raise shape_error(caller, "coeffs", "broadcastable to (B, T, H)", tuple(values.shape), tuple(coeffs.shape))
    initial, _ = _check_context(caller, values, values.shape[2], initial, reset, None, None)
    coeffs = coeffs[(None,) * (3 - coeffs.dim())]
    return autograd.scan(
        (coeffs, values, initial, reset, None, None), Spec("linear", "identity", reverse, backends.forced(backend))
    )[0]


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

    z_t = sigmoid(k_t), h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ act(v_t), where projection = [k | v]. z writes: it weighs the
    candidate (in nn.GRU z keeps). Defined as the gates followed by `linear_scan`; neither a_t nor b_t is written to
    memory.

    Args:
        projection: (B, T, 2H), blocks [gate k | candidate v]; float32, float64, bfloat16 or float16; the last dimension
            contiguous, any strides otherwise.
        initial: h_{-1}, (B, H); zeros if None.
        reset: bool (B, T). Where true, step t begins a new sequence: what is carried into it is `restart`, by
            selection.
        restart: (H,), the state at the beginning of a sequence after a reset; zeros if None.
        lengths: int64 (B,). Steps at or beyond a length are padding: h is 0 there, the state passes them by, nothing
            reaches their gradient, whatever they hold. A reverse scan begins at the last step that is not padding.
        reverse: from the last step to the first, as in `linear_scan`.
        activation: "g", x + 1/2 where x >= 0 and sigmoid(x) elsewhere, the paper's log-space form; "identity", its
            vanilla form; "tanh".
        backend: as in `linear_scan`.

    Returns:
        h, (B, T, H), in the dtype of the projection; and the last state, (B, H), in the dtype in which states are kept
        (float32 for 16-bit input), so that carrying it on loses nothing. With T = 0 that is `initial`.

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
        normalize: the paper's length-independent scaling. Two shut gates, f = i = 0, are no 0/0: the quotient is taken
            of logarithms.
        initial, reset, restart, lengths, reverse, activation, backend: as in `mingru_scan`.

    Returns, numerics and errors: as in `mingru_scan`.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 3.2 and appendix B.
    """
    kind = "minlstm" if normalize else "minlstm_unnormalized"
    return _gated(kind, projection, initial, reset, restart, lengths, reverse, activation, backend)


def _gated(gates, projection, initial, reset, restart, lengths, reverse, activation, backend) -> tuple[Tensor, Tensor]:
    spec = Spec(gates, activation, reverse, backends.forced(backend))
    caller, blocks = spec.caller, gating.width(gates)
    if activation not in gating.ACTIVATIONS:
        raise ValueError(f"{caller}: activation must be one of {gating.ACTIVATIONS}, got {activation!r}")
    _check_floating(caller, "projection", projection, real=True)
    if projection.dim() != 3 or projection.shape[2] % blocks:
        wanted = "three dimensions, the last divisible by"
        raise shape_error(caller, "projection", f"(B, T, {blocks}H)", f"{wanted} {blocks}", tuple(projection.shape))
    hidden = projection.shape[2] // blocks
    initial, restart = _check_context(caller, projection, hidden, initial, reset, restart, lengths)
    if restart is not None:
        # The rules know one restart per sequence; summing the gradient over the batch is the expansion's own rule.
        restart = restart.expand(projection.shape[0], hidden) if reset is not None else None
    return autograd.scan((projection, None, initial, reset, restart, lengths), spec)


def _check_floating(caller: str, name: str, tensor: Tensor, *, real: bool) -> None:
    check_tensor(caller, name, tensor)
    backends.check_dtype(caller, name, tensor, real=real)


def _check_context(
    caller: str,
    like: Tensor,
    hidden: int,
    initial: Tensor | None,
    reset: Tensor | None,
    restart: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Check what surrounds a series; `initial` and `restart` come back in the dtype in which the state is kept."""
    keep = accumulate_dtype(like.dtype)
    batch, time, _ = like.shape

    def state(name: str, tensor: Tensor | None, letters: str, shape: tuple[int, ...]) -> Tensor | None:
        if tensor is None:
            return None
        check_tensor(caller, name, tensor)
        check_shape(caller, name, tensor, letters, shape)
        check_device(caller, like, **{name: tensor})
        if tensor.dtype == keep:
            return tensor
        if tensor.dtype != like.dtype:
            raise TypeError(f"{caller}: {name} must be {keep} or {like.dtype}, got {tensor.dtype}")
        return tensor.to(keep)

    initial = state("initial", initial, "(B, H)", (batch, hidden))
    restart = state("restart", restart, "(H,)", (hidden,))
    check_reset(caller, reset, like)
    if lengths is not None:
        check_tensor(caller, "lengths", lengths)
        if lengths.dtype != torch.int64:
            raise TypeError(f"{caller}: lengths must be int64, got {lengths.dtype}")
        check_shape(caller, "lengths", lengths, "(B,)", (batch,))
        check_device(caller, like, lengths=lengths)
        if out_of_range(lengths, time):
            raise ValueError(f"{caller}: lengths must be between 0 and T = {time}, got {lengths.tolist()}")
    return initial, restart
