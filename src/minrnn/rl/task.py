"""Learning to act from logged episodes: which windows of them are read, and how wrong an action is.

B batch, K steps in a window, O size of an observation, A of an action.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minrnn._config import check_at_least, check_types
from minrnn._shapes import accumulate_dtype
from minrnn.models import BackboneConfig
from minrnn.rl.decision import DecisionConfig, DecisionModel, Layout, Scales, Trajectory
from minrnn.rl.episodes import Episodes, blocks
from minrnn.rl.sources import load_episodes, split

HELD_OUT = 0.05  # share of the episodes, the same ones for every run on a data set

Model = Callable[[Trajectory], tuple[Tensor, Any]]


@dataclass(frozen=True)
class OfflineConfig:
    """Which episodes, and in windows of which size.

    Args:
        data: an .hdf5 file of D4RL, a directory of Minari or of .npz episodes, a name of Minari; several joined with +
        env: the Gymnasium environment that the policy is for (default: the one that the data names)
        targets: returns to ask for when it acts, as [3000,1500] (default: the highest return of the data)
        layout: of a step's tokens: interleaved or concatenated
        context: steps in a window
        batch_size: windows in a training step, over all devices
        return_scale: returns are divided by it
        max_timestep: later steps of an episode are told apart no more (interleaved only)
        sha256: checksum that rewards and lengths must have; a run notes the one that it began with
    """

    data: str = ""
    env: str | None = None
    targets: list[float] = field(default_factory=list)
    layout: Layout = "interleaved"
    context: int = 20
    batch_size: int = 64
    return_scale: float = 1000.0
    max_timestep: int = 1000
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if not self.data:
            raise ValueError("OfflineConfig: data must name logged episodes, got none: --data FILE")
        check_at_least(self, 1, "batch_size")
        if not all(isinstance(each, int | float) and np.isfinite(each) for each in self.targets):
            raise ValueError(f"OfflineConfig: targets must be finite numbers, got {self.targets}")
        self.model_config(1, 1, BackboneConfig())  # which checks the rest

    @property
    def name(self) -> str:
        """Of the data, for people: a file's or directory's own, and the last two parts of a name of Minari."""
        paths = [Path(part) for part in split(self.data)]
        return "+".join(path.stem if path.exists() else "-".join(path.parts[-2:]) for path in paths)

    def model_config(self, observation_size: int, action_size: int, backbone: BackboneConfig) -> DecisionConfig:
        """The config of a decision model for data of these sizes."""
        return DecisionConfig(
            observation_size,
            action_size,
            backbone,
            self.layout,
            self.context,
            self.max_timestep,
            self.return_scale,
        )


class Windows(NamedTuple):
    """A batch: windows of K steps, or shorter ones with zeros after them.

    Args:
        trajectory: what is read.
        actions: (B, K, A), what was done.
        there: bool (B, K), which steps are not such zeros.
    """

    trajectory: Trajectory
    actions: Tensor
    there: Tensor


class OfflineTask:
    """The data of an `OfflineConfig`, with the loss that trains on it and the loss on the episodes that are held out.

    A window begins at any step of any training episode with equal probability (an episode is drawn in proportion to its
    length, then a step of it), and ends after K steps or with its episode. What is missing stands after it and is
    masked: models are causal, so nothing that counts has seen it.

    Args:
        config: which episodes, and how they are cut.
        episodes: those that are read already.

    Raises:
        ValueError: the data cannot be read, are not those that are meant, or have fewer than two episodes.
    """

    def __init__(self, config: OfflineConfig, episodes: Episodes | None = None) -> None:
        self.config = config
        self.episodes = load_episodes(config.data) if episodes is None else episodes
        self.sha256 = checksum(self.episodes)
        if config.sha256 not in (None, self.sha256):
            raise ValueError(
                f"data: {config.data} must have SHA-256 {config.sha256} over rewards and lengths, not {self.sha256}: "
                "it has changed"
            )
        count = len(self.episodes.lengths)
        if count < 2:
            raise ValueError(f"data: {config.data} must have at least 2 episodes, one of them to hold out, got {count}")
        order = np.random.default_rng(0).permutation(count)
        held = max(1, round(HELD_OUT * count))
        self.held_out = np.sort(order[:held])
        # Sources that are joined may share episodes.
        known = set(map(self._beginning, self.held_out))
        others = np.sort(order[held:])
        self.train = others[[self._beginning(each) not in known for each in others]]
        if not len(self.train):
            raise ValueError(f"data: {config.data} must have at least 2 different episodes, got {count} that are alike")
        self._ends = np.cumsum(self.episodes.lengths[self.train])  # where the training steps are numbered through

    def _beginning(self, episode: int) -> bytes:
        """What tells an episode from others: its rewards, its first observation and action."""
        data = self.episodes
        start, length = int(data.starts[episode]), int(data.lengths[episode])
        first = slice(start, start + 1)
        parts = data.rewards[start : start + length], data.observations[first], data.actions[first]
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)

    def make_model(self, backbone: BackboneConfig) -> DecisionModel:
        """A decision model for these data, with their scales."""
        sizes = self.episodes.observation_size, self.episodes.action_size
        model = DecisionModel(self.config.model_config(*sizes, backbone))
        model.set_scales(Scales(*self.episodes.statistics(), *action_bounds(self.episodes)))
        return model

    @property
    def targets(self) -> list[float]:
        """Returns to ask for: those of the config, or the highest of the data."""
        return self.config.targets or [float(self.episodes.returns.max())]

    def batch(self, seed: int, step: int) -> Windows:
        """The training batch of a step, a function of (seed, step) alone."""
        drawn = np.random.default_rng((seed, step)).integers(self._ends[-1], size=self.config.batch_size)
        which = np.searchsorted(self._ends, drawn, side="right")
        episodes = self.train[which]
        return self.windows(episodes, drawn - self._ends[which] + self.episodes.lengths[episodes])

    def windows(self, episodes: Sequence[int] | np.ndarray, begins: Sequence[int] | np.ndarray) -> Windows:
        """The windows that begin at these steps of these episodes."""
        data, context = self.episodes, self.config.context
        shape = len(episodes), context
        returns, there = np.zeros(shape, np.float32), np.zeros(shape, bool)
        observations = np.zeros((*shape, data.observation_size), np.float32)
        actions, previous = np.zeros((2, *shape, data.action_size), np.float32)
        for row, (episode, begin) in enumerate(zip(episodes, begins, strict=True)):
            first = int(data.starts[episode] + begin)
            last = min(first + context, int(data.starts[episode] + data.lengths[episode]))
            size = last - first
            returns[row, :size] = data.returns_to_go[first:last]
            observations[row, :size] = data.observations[first:last]
            actions[row, :size] = data.actions[first:last]
            there[row, :size] = True
        previous[:, 1:] = actions[:, :-1]
        timesteps = np.asarray(begins, np.int64)[:, None] + np.arange(context)
        read = (torch.from_numpy(each) for each in (returns, observations, previous, timesteps))
        return Windows(Trajectory(*read), torch.from_numpy(actions), torch.from_numpy(there))

    def loss(self, model: Model, batch: Windows) -> Tensor:
        """Mean squared error over the steps that are there and the numbers of an action."""
        actions = model(batch.trajectory)[0][batch.there]
        return (actions.to(accumulate_dtype(actions.dtype)) - batch.actions[batch.there]).square().mean()

    @torch.no_grad()
    def evaluate(self, model: Model, *, device: torch.device | str = "cpu") -> dict[str, float]:
        """The same over every step of the episodes that are held out, in windows side by side.

        Args:
            model: in eval mode.
            device: where it is.
        """
        context, size = self.config.context, self.config.batch_size
        places = [
            (episode, begin)
            for episode in self.held_out
            for begin in range(0, int(self.episodes.lengths[episode]), context)
        ]
        total, numbers = 0.0, 0
        for first in range(0, len(places), size):
            trajectory, wanted, there = self.windows(*zip(*places[first : first + size], strict=True))
            actions, _ = model(Trajectory(*(each.to(device) for each in trajectory)))
            error = actions.cpu().double()[there] - wanted.double()[there]
            total, numbers = total + error.square().sum().item(), numbers + error.numel()
        return {"held_out": total / numbers}


def action_bounds(episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest of each action, (A,) float32 each: -1 and 1 where none of the data is beyond."""
    low = np.full(episodes.action_size, np.inf, np.float32)
    high = -low
    for _, block in blocks(episodes.actions):
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    if max(-low.min(), high.max()) <= 1:
        return np.full_like(low, -1), np.full_like(high, 1)
    return low, high


def checksum(episodes: Episodes) -> str:
    """SHA-256 of what is always in memory: rewards, lengths and ends."""
    digest = hashlib.sha256()
    for values in (episodes.rewards, episodes.lengths, episodes.terminated):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def locate(data: str) -> str:
    """A name of the same data that holds in any working directory."""
    return "+".join(str(Path(part).absolute()) if Path(part).exists() else part for part in split(data))
