"""Operators with forward and backward kernels of their own, registered with PyTorch; what else is asked of them, second
derivatives and `torch.func`, goes by a plain PyTorch form of the same function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minrnn.ops.transforms import refuse_legacy, transformed

# The kernels by the names of their operators, for those who want to see what one calls.
KERNELS: dict[str, Callable[..., Any]] = {}


def fused(
    name: str,
    arguments: str,
    returned: int,
    kept: int,
    forward: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """Register the operator minrnn::`name`; works in eager mode, under `torch.compile`, and under `torch.func`.

    Args:
        name: of the operator.
        arguments: its schema, all tensors: "Tensor x, Tensor? reset".
        returned: how many results its callers get.
        kept: how many more it keeps for backward.
        forward: the kernel, of the arguments: the results, contiguous, none of them an argument or a view of one.
        fake: the same, without computing; shapes, dtypes and strides as those of `forward`.
        backward: the kernel, of (gradients of the returned or None, arguments, results): for each argument its
            gradient, or None where the argument is None or not floating.
        plain: the same function as `forward` in differentiable operations; the returned results only.

    Returns:
        The operator as a function of its arguments, the returned results only.
    """
    count = len(arguments.split(", "))
    results = ", ".join(["Tensor"] * (returned + kept))
    operator = torch.library.custom_op(
        f"minrnn::{name}", forward, mutates_args=(), schema=f"({arguments}) -> ({results})"
    )
    operator.register_fake(fake)

    def split(values: tuple) -> tuple[tuple, tuple, tuple]:
        """(gradients, arguments, results) of the flat arguments of the backward operator."""
        ends = returned, returned + count
        return values[: ends[0]], values[ends[0] : ends[1]], values[ends[1] :]

    def floating(values: tuple) -> list[Tensor]:
        return [x for x in values if x is not None and (x.is_floating_point() or x.is_complex())]

    def run_backward(*values: Any) -> list[Tensor]:
        with torch.no_grad():
            return [grad.contiguous() for grad in backward(*split(values)) if grad is not None]

    def fake_backward(*values: Any) -> list[Tensor]:
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in floating(split(values)[1])]

    grads = ", ".join(f"Tensor? grad_{i}" for i in range(returned))
    outs = ", ".join(f"Tensor out_{i}" for i in range(returned + kept))
    backward_operator = torch.library.custom_op(
        f"minrnn::{name}_backward", run_backward, mutates_args=(), schema=f"({grads}, {arguments}, {outs}) -> Tensor[]"
    )
    backward_operator.register_fake(fake_backward)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_legacy(name, *grads)
        saved = ctx.saved_tensors
        args, out = saved[:count], saved[count:]
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed()):  # a second derivative
            # Outside the autocast of a backward pass in its reach.
            with torch.enable_grad(), torch.autocast(out[0].device.type, enabled=False):
                # Arguments by themselves: one may be made from another, or be given twice, which is not for us to
                # follow.
                alone = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in args)
                sources = [x for x in floating(alone) if x.requires_grad]
                again = zip(plain(*alone), grads, strict=False)
                pairs = [(y, g) for y, g in again if g is not None and y.requires_grad]
                ys, gs = zip(*pairs, strict=True) if pairs else ((), ())
                found = torch.autograd.grad(ys, sources, gs, create_graph=True, allow_unused=True) if ys else ()
            by_id = dict(zip(map(id, sources), found, strict=False))
            return tuple(by_id.get(id(x)) for x in alone)
        present = iter(backward_operator(*grads[:returned], *args, *out))
        ids = set(map(id, floating(args)))
        return tuple(next(present) if id(x) in ids else None for x in args)

    KERNELS[f"minrnn::{name}"], KERNELS[f"minrnn::{name}_backward"] = forward, run_backward
    torch.library.register_autograd(f"minrnn::{name}", differentiate, setup_context=setup_context)

    def call(*args: Any) -> tuple[Tensor, ...]:
        if transformed():
            return plain(*args)
        return operator(*args)[:returned]

    return call
