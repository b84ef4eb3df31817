"""The rules of the scans: what runs forward, what backward, what a tangent is. Tensors in, tensors out.

One set of rules serves all scans: the gradient of a scan is the same scan run the other way and one product. `inputs`
everywhere: (projection or coeffs, values or None, initial, reset, restart, lengths), `restart` (B, H), states in the
dtype they are kept in.
"""

from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from minrnn._shapes import accumulate_dtype, time_major
from minrnn.ops import backends, native, parallel, reference
from minrnn.ops import gates as gating
from minrnn.ops.transforms import refuse_legacy, transformed

Scan = Callable[[tuple, "Spec"], tuple[Tensor, Tensor]]


class Spec(NamedTuple):
    """What a scan is, apart from its tensors. `gates` is "linear", or what gates.py knows."""

    gates: str
    activation: str
    reverse: bool
    backend: str | None

    @property
    def caller(self) -> str:
        return f"{self.gates.removesuffix('_unnormalized')}_scan"


def forward(inputs: tuple, spec: Spec) -> tuple[Tensor, Tensor]:
    source, values, initial, reset, restart, lengths = inputs
    like = source if values is None else values
    nested = eager_transforms.JVP_NESTING > 1 and spec.backend != "reference"
    backend = backends.choose("parallel" if nested else spec.backend, like, spec.caller)
    if kernels := _kernels(backend):
        return kernels.forward(inputs, spec.gates, spec.activation, spec.reverse)
    keep = accumulate_dtype(like.dtype)
    if values is not None:
        coeffs, values = source.to(keep), values.to(keep)
    else:
        source = source.to(keep)
        if lengths is not None:  # or 0 * NaN would be their gradient
            source = source.masked_fill(parallel.padded_steps(lengths, source.shape[1]), 0)
        coeffs, values = gating.coefficients(source, spec.gates, spec.activation)
    engine = reference.scan if backend == "reference" else parallel.scan
    hidden, last = engine(coeffs, values, initial, reset=reset, restart=restart, lengths=lengths, reverse=spec.reverse)
    return _laid_out(hidden, like), last


def _kernels(backend: str) -> ModuleType | None:
    """The module with the kernels of a backend that has some."""
    if backend == "triton":
        from minrnn.ops.triton import scan  # imports Triton, which only a GPU needs

        return scan
    return native if backend == "native" else None


def _laid_out(series: Tensor, like: Tensor) -> Tensor:
    """`series` in the dtype and the memory order of `like`."""
    series = series.to(like.dtype)
    if not time_major(like):
        return series.contiguous()
    # A copy, not a view: forward mode asserts that the tangent of a view is laid out as the view is.
    return series.transpose(0, 1).contiguous().transpose(0, 1).clone()


def backward(
    grad_hidden: Tensor | None, grad_last: Tensor | None, inputs: tuple, hidden: Tensor, spec: Spec, scan: Scan
) -> tuple:
    """Gradients of (projection or coeffs, values, initial, restart); None for those that are None."""
    source, values, *_ = inputs
    like = source if values is None else values
    refuse_legacy(spec.caller, grad_hidden, grad_last)
    # The sum over a broadcast coefficient's gradient must not be one of terms that were rounded to 16 bits.
    summed = values is not None and source.shape != values.shape and accumulate_dtype(like.dtype) != like.dtype
    plain = torch.is_grad_enabled() or transformed() or summed
    if kernels := None if plain else _kernels(backends.choose(spec.backend, like, spec.caller)):
        return kernels.backward(grad_hidden, grad_last, inputs, hidden, spec.gates, spec.activation, spec.reverse)
    return Adjoint(inputs, hidden, spec, scan).gradients(grad_hidden, grad_last)


class Adjoint:
    """The rules in terms of gates and linear scans: differentiable again, on any backend. `scan` is the differentiable
    scan."""

    def __init__(self, inputs: tuple, hidden: Tensor, spec: Spec, scan: Scan):
        self.scan = scan
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
        if spec.gates == "linear":
            self.coeffs = self.wide_source.expand(hidden.shape)
        else:
            if self.padding is not None:  # before the gates: a slope at a NaN would reach the second derivative
                self.wide_source = self.wide_source.masked_fill(self.padding, 0)
            self.coeffs, _ = gating.coefficients(self.wide_source, spec.gates, spec.activation)
            if self.padding is not None:
                self.coeffs = torch.where(self.padding, torch.ones_like(self.coeffs), self.coeffs)

    def linear(
        self, coeffs: Tensor, values: Tensor, initial: Tensor | None, reset: Tensor | None, reverse: bool
    ) -> Tensor:
        spec = Spec("linear", "identity", reverse, self.spec.backend)
        return self.scan((coeffs, values, initial, reset, None, None), spec)[0]

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
            coeffs = coeffs.masked_fill(cut[..., None], 0)  # the second derivative's product with it may be 0 * NaN
        return self.linear(coeffs, grads, None, cut, follow)

    def gradients(self, grad_hidden: Tensor | None, grad_last: Tensor | None) -> tuple:
        keep, time = self.hidden.dtype, self.hidden.shape[1]
        grads = torch.zeros_like(self.hidden) if grad_hidden is None else grad_hidden.to(keep)
        if time == 0:
            nothing = [
                None if x is None else torch.zeros_like(x)
                for x in (self.source, self.values, self.initial, self.restart)
            ]
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
        if self.spec.gates == "linear":
            grad_coeffs = by_coeffs.sum_to_size(self.source.shape).to(self.source.dtype)
            return grad_coeffs, adjoint.to(self.values.dtype), grad_initial, grad_restart
        blocks = []
        for a_slope, b_slope in gating.partials(self.wide_source, self.spec.gates, self.spec.activation):
            slopes = ((a_slope, by_coeffs), (b_slope, adjoint))
            block = reduce(torch.add, (slope * by for slope, by in slopes if slope is not None))
            blocks.append(block if self.padding is None else block.masked_fill(self.padding, 0))
        return torch.cat(blocks, -1).to(self.source.dtype), None, grad_initial, grad_restart

    def tangents(self, source: Tensor | None, values: Tensor | None, initial: Tensor | None, restart: Tensor | None):
        """The tangents of (h, last): the scan of the perturbed recurrence, da_t h_{t-1} + db_t."""
        previous, keep = self.previous() if self.hidden.shape[1] else self.hidden, self.hidden.dtype
        drive = torch.zeros_like(self.hidden)
        if self.spec.gates == "linear":
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
        hidden = self.linear(self.coeffs, drive, initial, self.reset, self.spec.reverse)
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
