"""Logged episodes in one form, whatever file they came from: steps end to end, in memory or on disk.

Letters: S steps in all, E episodes, O size of an observation, A size of an action.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

BLOCK = 1 << 16  # steps that are read at once where all are passed over: 5 MB at O = 17


class Steps(Protocol):
    """Rows (S, W), in memory or on disk: `steps[a:b]` is a float32 array (b - a, W)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Episodes:
    """Logged episodes, one after the other. Step t of episode e is row `starts[e] + t` of every field of S rows.

    Args:
        observations: (S, O) float32, what was seen before each action: an array, or what reads slices from disk, as
            `numpy.memmap`, `h5py.Dataset` and `Joined` do.
        actions: (S, A) float32, likewise.
        rewards: (S,) float32, what followed each action; always in memory.
        lengths: (E,) int64, steps of each episode, each at least 1, S together.
        terminated: (E,) bool, whether the environment itself ended the episode: not a time limit, not the end of the
            data.

    Raises:
        TypeError: a field of another dtype.
        ValueError: shapes that do not belong together, an episode without steps, or a number that is not finite.
    """

    observations: Steps
    actions: Steps
    rewards: np.ndarray
    lengths: np.ndarray
    terminated: np.ndarray

    def __post_init__(self) -> None:
        dtypes = ("float32", "float32", "float32", "int64", "bool")
        for (name, field), dtype in zip(vars(self).items(), dtypes, strict=True):
            if field.dtype != np.dtype(dtype):
                raise TypeError(f"Episodes: {name} must be {dtype}, got {field.dtype}")
            if len(field.shape) != (rank := 2 if name in ("observations", "actions") else 1):
                letters = {"observations": "(S, O)", "actions": "(S, A)", "rewards": "(S,)"}.get(name, "(E,)")
                raise ValueError(f"Episodes: {name} must be {letters}, {rank} dimensions, got shape {field.shape}")
        if not len(self.lengths):
            raise ValueError("Episodes: lengths must have at least one episode, got none")
        if len(short := np.flatnonzero(self.lengths < 1)):
            got = self.lengths[short[0]]
            raise ValueError(f"Episodes: lengths must be at least 1, got {got} for episode {short[0]}")
        steps = int(self.lengths.sum())
        for name in ("observations", "actions", "rewards"):
            if (rows := getattr(self, name).shape[0]) != steps:
                raise ValueError(f"Episodes: {name} must have {steps} rows, the sum of lengths, got {rows}")
        if len(self.terminated) != len(self.lengths):
            wanted = f"{len(self.lengths)} flags, one for each of lengths"
            raise ValueError(f"Episodes: terminated must have {wanted}, got {len(self.terminated)}")
        for name in ("observations", "actions", "rewards"):
            self._check_finite(name)

    def _check_finite(self, name: str) -> None:
        for first, block in blocks(getattr(self, name)):
            if not np.isfinite(block).all():
                row, *column = np.argwhere(~np.isfinite(block))[0]
                step = first + int(row)
                episode = int(np.searchsorted(self.starts, step, side="right")) - 1
                where = f"step {step - self.starts[episode]} of episode {episode}"
                where += f", column {column[0]}" if column else ""
                raise ValueError(f"Episodes: {name} must be finite, got {block[(row, *column)]} at {where}")

    @cached_property
    def starts(self) -> np.ndarray:
        """(E,) int64: the row of each episode's first step."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def returns(self) -> np.ndarray:
        """(E,) float64: the undiscounted sum of each episode's rewards."""
        return np.add.reduceat(self.rewards, self.starts, dtype=np.float64)

    @cached_property
    def returns_to_go(self) -> np.ndarray:
        """(S,) float32: the undiscounted sum of rewards from each step to its episode's end, added up in float64."""
        result = np.empty(len(self.rewards), np.float32)
        for first, length in zip(self.starts, self.lengths, strict=True):
            rows = slice(first, first + length)
            result[rows] = np.cumsum(self.rewards[rows][::-1], dtype=np.float64)[::-1]
        return result

    @property
    def observation_size(self) -> int:
        """O, numbers in an observation."""
        return self.observations.shape[1]

    @property
    def action_size(self) -> int:
        """A, numbers in an action."""
        return self.actions.shape[1]

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the observations, (O,) float32 each, over all S steps with equal weight.

        The deviation is the population's, sqrt(mean((s - mean)²)), not increased by anything. Blocks of steps are read
        one after the other; their means and squared deviations are merged in float64 (Chan, Golub & LeVeque 1983).
        """
        seen = 0
        mean = squares = np.zeros(self.observation_size)
        for _, block in blocks(self.observations):
            values = block.astype(np.float64)
            count, centre = len(values), values.mean(0)
            away = centre - mean
            squares = squares + ((values - centre) ** 2).sum(0) + away**2 * (seen * count / (seen + count))
            mean = mean + away * (count / (seen + count))
            seen += count
        return mean.astype(np.float32), np.sqrt(squares / seen).astype(np.float32)


class Joined:
    """Rows (S, W) that lie in pieces, one after the other; a slice reads only the pieces that it needs, as float32.

    Args:
        pieces: each gives rows by `piece[a:b]`; what it has beyond its length is not read.
        lengths: how many rows each piece gives.
        width: W.
    """

    def __init__(self, pieces: Sequence[Any], lengths: Sequence[int], width: int) -> None:
        self._pieces = pieces
        self._bounds = np.concatenate(([0], np.cumsum(np.asarray(lengths, np.int64))))
        self.shape = (int(self._bounds[-1]), width)
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: slice, /) -> np.ndarray:
        first, stop, step = wanted.indices(len(self))
        if step != 1:
            raise ValueError(f"Joined: rows must be a slice of step 1, got step {step}")
        result = np.empty((max(0, stop - first), self.shape[1]), np.float32)
        piece, filled = int(np.searchsorted(self._bounds, first, side="right")) - 1, 0
        while filled < len(result):
            start, bound = self._bounds[piece : piece + 2]
            rows = self._pieces[piece][first + filled - start : min(stop, bound) - start]
            with np.errstate(over="ignore"):  # becomes infinite, and is refused as that
                result[filled : filled + len(rows)] = rows
            piece, filled = piece + 1, filled + len(rows)
        return result


def concatenate(parts: Sequence[Episodes]) -> Episodes:
    """All episodes of `parts`, in their order. No observation or action is copied until it is read.

    Args:
        parts: at least one, all with the same sizes of observations and of actions.

    Raises:
        ValueError: there are none, or their sizes differ.
    """
    if not parts:
        raise ValueError("concatenate: parts must have at least one, got none")
    if len(parts) == 1:
        return parts[0]
    for size in ("observation_size", "action_size"):
        if len(sizes := {getattr(part, size) for part in parts}) > 1:
            raise ValueError(f"concatenate: parts must have one {size.replace('_', ' ')}, got {sorted(sizes)}")

    def joined(name: str) -> Joined:
        pieces = [getattr(part, name) for part in parts]
        return Joined(pieces, [piece.shape[0] for piece in pieces], pieces[0].shape[1])

    rest = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rewards", "lengths", "terminated"))
    return Episodes(joined("observations"), joined("actions"), *rest)


def blocks(steps: Any) -> Iterator[tuple[int, np.ndarray]]:
    """All rows in blocks of BLOCK, each with the number of its first row."""
    bounds = [*range(0, steps.shape[0], BLOCK), steps.shape[0]]
    for first, stop in pairwise(bounds):
        yield first, steps[first:stop]
