"""The parity harness. Whole = any chunking = stepped; with resets = separate sequences; padded = one by one.

Values and gradients. What is tested is a callable `run(x, state, *, reset=None, lengths=None) -> (y, state)` with x and
y (B, T, *) and the state a tensor, a pytree of tensors, or None for the beginning. Every op, layer and mixer is a row.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from conftest import assert_close

Run = Callable[..., tuple[Tensor, object]]
SPLITS = ([1], [2, 3], [7, 1, 64])  # repeated until the series is used up


def chunked(
    run: Run, x: Tensor, state: object, sizes: Sequence[int], reset: Tensor | None = None
) -> tuple[Tensor, object]:
    """Run x piece by piece, handing the state on."""
    outputs, begin, i = [], 0, 0
    while begin < x.shape[1] or not outputs:
        piece = slice(begin, begin + sizes[i % len(sizes)])
        y, state = run(x[:, piece], state, **({} if reset is None else {"reset": reset[:, piece]}))
        outputs.append(y)
        begin, i = piece.stop, i + 1
    return torch.cat(outputs, 1), state


def gradients(y: Tensor, state: object, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of one fixed random functional of outputs and final state."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for leaf in (y, *tree_leaves(state)):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            weight = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
            total = total + (leaf * weight).sum()
    found = torch.autograd.grad(total, list(inputs), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def compare(left: tuple, right: tuple, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Two (y, state): equal values, equal gradients in all `inputs`."""
    for a, b in zip(tree_leaves(left), tree_leaves(right), strict=True):
        assert_close(a, b, dtype)
    for a, b in zip(gradients(*left, inputs), gradients(*right, inputs), strict=True):
        assert_close(a, b, dtype)


def check_chunks(run: Run, x: Tensor, state: object, parameters: Sequence[Tensor] = ()) -> None:
    """Whole = any chunking = stepped, from a given state, with and without resets."""
    inputs = _leaves(x, state, parameters)
    for reset in (None, torch.rand(x.shape[:2]) < 0.2):
        whole = run(x, state, **({} if reset is None else {"reset": reset}))
        for sizes in SPLITS:
            compare(whole, chunked(run, x, state, sizes, reset), inputs, x.dtype)


def check_resets(run: Run, x: Tensor, parameters: Sequence[Tensor] = ()) -> None:
    """With resets = separate sequences from the beginning; a NaN before a reset ends there."""
    time, cuts = x.shape[1], sorted({0, x.shape[1] // 3, x.shape[1] // 3 + 1, 3 * x.shape[1] // 4, x.shape[1]})
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset[:, [c for c in cuts if c < time]] = True
    outputs, state = [], None
    for begin, end in itertools.pairwise(cuts):
        if end > begin:
            y, state = run(x[:, begin:end], None)
            outputs.append(y)
    compare(run(x, None, reset=reset), (torch.cat(outputs, 1), state), _leaves(x, None, parameters), x.dtype)
    if time > 1 and x.is_floating_point():
        spoiled = x.detach().clone()
        spoiled[:, 0] = float("nan")
        reset = torch.zeros_like(reset)
        reset[:, 1] = True
        spoiled.requires_grad_()
        y, state = run(spoiled, None, reset=reset)
        clean, _ = run(x[:, 1:], None)
        assert_close(y[:, 1:], clean, x.dtype)
        (after,) = torch.autograd.grad(y[:, 1:].sum(), spoiled)
        assert not after[:, 1:].isnan().any()


def check_lengths(run: Run, x: Tensor, state: Tensor | None, parameters: Sequence[Tensor] = ()) -> None:
    """Padded = one by one, whatever the padding holds."""
    batch, time = x.shape[:2]
    lengths = torch.tensor([0, 1, time, time // 2, max(time - 1, 0)])[torch.arange(batch) % 5].clamp(max=time)
    padding = torch.arange(time)[None, :, None] >= lengths[:, None, None]
    spoiled = torch.where(padding, torch.full_like(x, float("nan")), x)
    y, last = run(spoiled, state, lengths=lengths)
    singles, lasts = [], []
    for b, length in enumerate(lengths.tolist()):
        own = None if state is None else tree_map(lambda s, b=b: s[b : b + 1], state)
        one, end = run(x[b : b + 1, :length], own)
        singles.append(torch.nn.functional.pad(one, (0, 0, 0, time - length)))
        lasts.append(end)
    joined = tree_map(lambda *parts: torch.cat(parts), *lasts)
    compare((y, last), (torch.cat(singles), joined), _leaves(x, state, parameters), x.dtype)


def _leaves(x: Tensor, state: object, parameters: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x, *[s for s in tree_leaves(state) if isinstance(s, Tensor)], *parameters]
    return [leaf for leaf in leaves if leaf.requires_grad]
