"""The rules of the scans, registered with PyTorch.

Twice, because of what PyTorch supports: as an operator of torch.library, under torch.compile, where an
autograd.Function with a `jvp` is refused; and as an autograd.Function elsewhere, where torch.func fails on an operator,
or takes its tangent for zero without a word.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from minrnn._shapes import laid_out_like
from minrnn.ops import gates as gating
from minrnn.ops.rules import Adjoint, Spec, backward, forward
from minrnn.ops.transforms import refuse_legacy, transformed, watched

FEW = 4  # steps that a compiler joins with what is around them, where no gradient is asked for: acting, generating


def scan(inputs: tuple, spec: Spec) -> tuple[Tensor, Tensor]:
    """(h, last), differentiable."""
    if torch.compiler.is_compiling():
        if transformed():  # an operator's tangent would be zero, or none, without a word
            return forward(inputs, spec._replace(backend="parallel"))
        if spec.backend is None and not torch.is_grad_enabled() and _few(inputs):
            return forward(inputs, spec._replace(backend="reference"))
        return torch.ops.minrnn.scan(*inputs, *_plain(spec))
    if spec.backend == "reference" or eager_transforms.JVP_NESTING > 1:
        # The oracle goes by PyTorch's own rules; and a Function's tangent has, in PyTorch, a zero tangent of its own
        # without a word.
        return forward(inputs, spec)
    if watched(inputs):
        if transformed():
            return forward(inputs, spec._replace(backend="parallel"))
        return torch.ops.minrnn.scan(*inputs, *_plain(spec))
    return _Scan.apply(*inputs, spec) if _differentiated(inputs) else forward(inputs, spec)


def _few(inputs: tuple) -> bool:
    """Whether the steps are FEW for as long as a graph of torch.compile lives."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # with sympy; only compiling needs it

    source, values, *_ = inputs
    return statically_known_true((source if values is None else values).shape[1] <= FEW)


def _differentiated(inputs: tuple) -> bool:
    """Whether a rule may be asked for; if not, the Function's 10 µs are saved, which a single step would notice."""
    if transformed():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(source, values, initial, reset, restart, lengths, spec: Spec):
        refuse_legacy(spec.caller, source, values, initial, restart)
        return forward((source, values, initial, reset, restart, lengths), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.spec = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0])
        ctx.save_for_forward(*tensors, output[0])

    @staticmethod
    def backward(ctx: Any, grad_hidden, grad_last):
        *inputs, hidden = ctx.saved_tensors
        grads = backward(grad_hidden, grad_last, tuple(inputs), hidden, ctx.spec, scan)
        source, values, initial, restart = grads
        return source, values, initial, None, restart, None, None

    @staticmethod
    def jvp(ctx: Any, source, values, initial, reset, restart, lengths, spec):
        *inputs, hidden = ctx.saved_tensors
        tangent, last = Adjoint(tuple(inputs), hidden, ctx.spec, scan).tangents(source, values, initial, restart)
        return tangent.to(hidden.dtype), last

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        """A mapped dimension joins the batch."""
        *tensors, spec = args

        def to_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            return tensor if tensor is None else tensor[None] if dim is None else tensor.movedim(dim, 0)

        source, values, *rest = (to_front(t, d) for t, d in zip(tensors, in_dims[:-1], strict=True))
        if source is not None and values is not None:  # coefficients that the whole batch shares are written out
            source = source.expand(-1, values.shape[1], -1, -1)
        size = info.batch_size
        folded = (None if t is None else t.expand(size, *t.shape[1:]).flatten(0, 1) for t in (source, values, *rest))
        hidden, last = _Scan.apply(*folded, spec)
        return (hidden.unflatten(0, (size, -1)), last.unflatten(0, (size, -1))), (0, 0)


# `apply` binds its arguments to this at each call; found once, it saves half of the Function's overhead.
_Scan.forward.__signature__ = inspect.signature(_Scan.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _plain(spec: Spec) -> tuple[str, str, bool, str]:
    return spec.gates, spec.activation, spec.reverse, spec.backend or ""


def _spec(gates: str, activation: str, reverse: bool, backend: str) -> Spec:
    return Spec(gates, activation, reverse, backend or None)


_TENSORS = "Tensor source, Tensor? values, Tensor? initial, Tensor? reset, Tensor? restart, Tensor? lengths"
_SETTING = "str gates, str activation, bool reverse, str backend"


@torch.library.custom_op("minrnn::scan", mutates_args=(), schema=f"({_TENSORS}, {_SETTING}) -> (Tensor, Tensor)")
def _scan_op(source, values, initial, reset, restart, lengths, gates, activation, reverse, backend):
    hidden, last = forward(
        (source, values, initial, reset, restart, lengths), _spec(gates, activation, reverse, backend)
    )
    return hidden, last.contiguous()


@_scan_op.register_fake
def _(source, values, initial, reset, restart, lengths, gates, activation, reverse, backend):
    return gating.results(source, values, gates)


@torch.library.custom_op(
    "minrnn::scan_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_hidden, Tensor? grad_last, {_TENSORS}, Tensor hidden, {_SETTING}) -> Tensor[]",
)
def _scan_backward_op(
    grad_hidden,
    grad_last,
    source,
    values,
    initial,
    reset,
    restart,
    lengths,
    hidden,
    gates,
    activation,
    reverse,
    backend,
):
    inputs = (source, values, initial, reset, restart, lengths)
    with torch.no_grad():
        grads = backward(grad_hidden, grad_last, inputs, hidden, _spec(gates, activation, reverse, backend), scan)
    pairs = zip(grads, (source, values, initial, restart), strict=True)
    return [_laid_out(grad, like) for grad, like in pairs if grad is not None]


def _gradient_of(like: Tensor) -> Tensor:
    """Memory for the gradient of `like`, laid out as the operator promises."""
    if like.dim() == 3:
        return laid_out_like(like, like.shape[2], like.dtype)
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    promised = _gradient_of(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta"))
    return grad if grad.stride() == promised.stride() else _gradient_of(like).copy_(grad)


@_scan_backward_op.register_fake
def _(
    grad_hidden,
    grad_last,
    source,
    values,
    initial,
    reset,
    restart,
    lengths,
    hidden,
    gates,
    activation,
    reverse,
    backend,
):
    return [_gradient_of(like) for like in (source, values, initial, restart) if like is not None]


def _op_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, gates, activation, reverse, backend = inputs
    ctx.setting = (gates, activation, reverse, backend)
    ctx.save_for_backward(*tensors, output[0])


def _op_backward(ctx: Any, grad_hidden, grad_last):
    *inputs, hidden = ctx.saved_tensors
    source, values, initial, _, restart, _ = inputs
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed()):  # a second derivative
        grads = iter(Adjoint(tuple(inputs), hidden, _spec(*ctx.setting), scan).gradients(grad_hidden, grad_last))
        source_grad, values_grad, initial_grad, restart_grad = grads
    else:
        present = iter(torch.ops.minrnn.scan_backward(grad_hidden, grad_last, *inputs, hidden, *ctx.setting))
        source_grad, values_grad, initial_grad, restart_grad = (
            None if x is None else next(present) for x in (source, values, initial, restart)
        )
    return source_grad, values_grad, initial_grad, None, restart_grad, None, None, None, None, None


torch.library.register_autograd("minrnn::scan", _op_backward, setup_context=_op_context)
