"""Acting with a decision model: what it must remember between steps, for one environment or many.

N environments, O size of an observation, A of an action, K steps of the model's context.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from minrnn._config import check_types
from minrnn._files import replace_files
from minrnn.models import load_model, save
from minrnn.rl.decision import DecisionModel, Trajectory

FILE = "policy.json"
Mode = Literal["window", "stream"]


@dataclass(frozen=True)
class PolicyFacts:
    """What a policy was made for.

    Args:
        env: the Gymnasium environment, if known
        targets: returns to ask for
        references: returns of other policies in `env`, by their names, such as random and behaviour
    """

    env: str | None = None
    targets: list[float] = field(default_factory=list)
    references: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        for value in (*self.targets, *self.references.values()):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"PolicyFacts: returns must be finite numbers, got {value!r}")

    def to_json(self) -> str:
        """As it stands in a file."""
        return json.dumps(vars(self), indent=2) + "\n"


class Policy:
    """A decision model that acts: it keeps the returns still wanted, the time, and what the model has seen.

    Two modes. "stream": the model reads each step once and carries its state on, so that an action costs the same at
    any time; a model without a constant state (attention) carries a cache that grows with the episode. "window", as
    published: the last K steps are read again for each action, from the beginning of a sequence. For the first K steps
    of an episode both give the same actions. There is no padding before a short window, and none in training.

    The loop, for one environment or a vector of them (Gymnasium's):

        policy.reset()
        observation, _ = env.reset()
        reward = None
        while ...:
            action = policy.act(observation, reward)
            observation, reward, terminated, truncated, _ = env.step(action)

    Where an environment of a vector has begun a new episode, `reset(mask)` must say so before that episode's first
    observation is given to `act`; the reward given with it is not read. With Gymnasium's autoreset that is

    - NEXT_STEP, its default: one step later than `terminated | truncated`. (The action between goes nowhere.)
    - SAME_STEP: at once, `policy.reset(terminated | truncated)`.
    - DISABLED: when `env.reset(options={"reset_mask": mask})` is called, with the same mask.

    Args:
        model: put into eval mode; its device is where the work is done.
        facts: what it was made for.
        target: the return to ask for, one number or one for each environment (default: the first of the facts').
        mode: "stream" or "window".

    Raises:
        ValueError: an unknown mode, or a target that is missing or not finite.
    """

    def __init__(
        self,
        model: DecisionModel,
        facts: PolicyFacts | None = None,
        *,
        target: float | Sequence[float] | np.ndarray | None = None,
        mode: Mode = "window",
    ) -> None:
        self.model, self.facts, self.mode = model.eval(), facts or PolicyFacts(), mode
        if mode not in get_args(Mode):
            raise ValueError(f"Policy: mode must be one of {get_args(Mode)}, got {mode!r}")
        if target is None and not self.facts.targets:
            raise ValueError("Policy: target must be a return to ask for, got none, and the facts have none")
        self.target = np.array(self.facts.targets[0] if target is None else target, np.float64)
        if self.target.ndim > 1 or not _finite(self.target).all():
            raise ValueError(f"Policy: target must be a finite number or one for each environment, got {target}")
        self._forward: Any = model
        self._fixed = False  # whether windows always have K steps
        self.reset()

    @classmethod
    def load(
        cls,
        run: str | os.PathLike[str],
        *,
        target: float | Sequence[float] | np.ndarray | None = None,
        mode: Mode = "window",
    ) -> "Policy":
        """The policy in a directory that `save` or `minrnn train` wrote.

        Args:
            run: the directory.
            target: as for the class; by default the one that the policy was saved with.
            mode: as for the class; it is not saved.

        Raises:
            ValueError: there is none, or its files are torn.
        """
        model = load_model(run, DecisionModel)
        path = Path(run, FILE)
        try:
            facts = PolicyFacts(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise ValueError(f"load: run must be a directory that holds {FILE}, got {os.fspath(run)!r}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"load: {path} must be the facts of a policy, got: {error}") from error
        return cls(model, facts, target=target, mode=mode)

    def save(self, run: str | os.PathLike[str]) -> None:
        """Write the model, its scales and the facts into the directory `run`, made if it is not there.

        The policy's own target comes first among those of the facts, where `load` finds it. The mode is not written.

        Raises:
            ValueError: there is a target for each environment: the next caller may have another number of them.
        """
        if self.target.ndim:
            raise ValueError(
                f"Policy: target must be one number to be saved, got one for each of {len(self.target)} environments"
            )
        own = float(self.target)
        facts = replace(self.facts, targets=[own, *(each for each in self.facts.targets if each != own)])
        save(self.model, run)
        replace_files({Path(run, FILE): facts.to_json().encode()})

    @property
    def observation_size(self) -> int:
        """O."""
        return self.model.config.observation_size

    @property
    def action_size(self) -> int:
        """A."""
        return self.model.config.action_size

    @property
    def constant_state(self) -> bool:
        """Whether what is kept between steps does not grow with the episode."""
        return self.mode == "window" or self.model.constant_state

    def compile(self) -> None:
        """Have torch compile the model for the shapes of acting. Windows then always have K steps, those that are not
        there yet after the others, where they change nothing."""
        # Apart from other policies': Dynamo stops after eight graphs of a function, and all models share theirs.
        self._forward = torch.compile(self.model, isolate_recompiles=True)  # pyright: ignore[reportCallIssue]
        self._fixed = True

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Begin new episodes.

        Args:
            mask: bool (N,), where; None for all, of which there may then be another number than before.

        Raises:
            TypeError: mask is not bool.
            ValueError: it is not (N,), or there is no episode yet.
        """
        if mask is None:
            self._count = 0  # of environments; known when the first observations come
            return
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"Policy: mask must be bool, got {mask.dtype}")
        if not self._count:
            raise ValueError("Policy: mask must be None before the first call of act, got an array")
        if mask.shape != (self._count,):
            raise ValueError(f"Policy: mask must be (N,) = ({self._count},), got {mask.shape}")
        self._begins |= mask

    @torch.inference_mode()
    def act(
        self,
        observation: np.ndarray,
        previous_reward: float | np.ndarray | None = None,
        previous_action: np.ndarray | None = None,
    ) -> np.ndarray:
        """The next action.

        Args:
            observation: (N, O), or (O,) of a single environment.
            previous_reward: (N,), or a number, what the action before has brought; not read where an episode begins.
            previous_action: (N, A), or (A,), what was done before, where that is not what `act` gave (it was clipped to
                an environment's bounds, say); not read where an episode begins.

        Returns:
            (N, A), or (A,) of a single environment, float32, within the bounds of the actions of the data.

        Raises:
            ValueError: shapes do not agree, a number is not finite as a float32, or the model was put into training
                mode.
        """
        if self.model.training:
            raise ValueError("Policy: model must be in eval mode, got one in training mode; call model.eval()")
        observation = np.asarray(observation)
        if observation.ndim not in (1, 2) or observation.shape[-1] != self.observation_size or not len(observation):
            raise ValueError(
                f"Policy: observation must be (N, O) or (O,) with O = {self.observation_size}, got {observation.shape}"
            )
        single = observation.ndim == 1
        rows = observation[None] if single else observation
        if not (finite := _finite(rows)).all():
            where = np.argwhere(~finite)[0]
            raise ValueError(
                f"Policy: observation must be finite, got {rows[tuple(where)]} at {where[1]} in environment {where[0]}"
            )
        if self._count and len(rows) != self._count:
            raise ValueError(f"Policy: observation must be for {self._count} environments, got {len(rows)}")
        reward = None if previous_reward is None else np.asarray(previous_reward, np.float64)
        if reward is not None and reward.shape != (len(rows),) and (reward.shape or len(rows) > 1):
            raise ValueError(f"Policy: previous_reward must be (N,) = ({len(rows)},), got {reward.shape}")
        taken = None if previous_action is None else np.asarray(previous_action)
        if taken is not None:
            taken = taken[None] if single and taken.ndim == 1 else taken
            begins = self._begins if self._count else np.ones(len(rows), bool)
            if taken.shape == (len(rows), self.action_size):
                taken = np.where(begins[:, None], 0, taken)
            if taken.shape != (len(rows), self.action_size) or not _finite(taken).all():
                raise ValueError(
                    f"Policy: previous_action must be finite numbers (N, A) = ({len(rows)}, {self.action_size}), got "
                    f"{taken.tolist() if taken.size < 9 else taken.shape}"
                )
        if not self._count:
            self._begin(len(rows))
        self._advance(reward)
        if taken is not None:
            self._action = taken.astype(np.float32)
        self._action = self._read(rows) if self.mode == "stream" else self._read_window(rows)
        self._begins[:] = False
        return (self._action[0] if single else self._action).copy()

    def _begin(self, count: int) -> None:
        if self.target.ndim and len(self.target) != count:
            raise ValueError(f"Policy: target must be one number or one for each of {count}, got {len(self.target)}")
        model, context = self.model.config, self.model.config.context
        self._count, self._state, self._device = count, None, self.model.head.weight.device
        self._begins = np.ones(count, bool)
        self._wanted = np.zeros(count)  # returns to go, in float64
        self._timestep = np.zeros(count, np.int64)
        self._action = np.zeros((count, model.action_size), np.float32)
        # In mode "window": the steps that are read again, and how many there are of each environment.
        self._seen = np.zeros(count, np.int64)
        self._past = (
            np.zeros((count, context), np.float32),
            np.zeros((count, context, model.observation_size), np.float32),
            np.zeros((count, context, model.action_size), np.float32),
            np.zeros((count, context), np.int64),
        )

    def _advance(self, reward: np.ndarray | None) -> None:
        """Returns to go and time of this step."""
        begins = self._begins
        if begins.all():
            self._wanted[:], self._timestep[:] = self.target, 0
            return
        if reward is None:
            raise ValueError("Policy: previous_reward must be given once an episode has begun, got None")
        wanted = self._wanted - reward
        if begins.any():
            wanted = np.where(begins, self.target, wanted)
        if not (finite := _finite(wanted)).all():
            row = int(np.flatnonzero(~finite)[0])
            raise ValueError(f"Policy: previous_reward must be finite, got {reward.flat[row]} in environment {row}")
        self._wanted, self._timestep = wanted, np.where(begins, 0, self._timestep + 1)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Mode "stream": this step alone."""
        every, reset = bool(self._begins.all()), None
        if self._begins.any() and not every:
            reset = torch.from_numpy(self._begins.copy())[:, None].to(self._device)
        step = (self._wanted.astype(np.float32), rows.astype(np.float32), self._action, self._timestep)
        trajectory = Trajectory(*(torch.from_numpy(each[:, None]).to(self._device) for each in step))
        actions, self._state = self._forward(trajectory, None if every else self._state, reset=reset)
        return actions[:, 0].float().cpu().numpy()

    def _read_window(self, rows: np.ndarray) -> np.ndarray:
        """Mode "window": the last K steps, or fewer, with those that are missing after them."""
        context = self.model.config.context
        self._seen[self._begins] = 0
        full = self._seen == context
        for past in self._past:
            past[full] = np.roll(past[full], -1, 1)
        self._seen = np.minimum(self._seen + 1, context)
        last = np.arange(self._count), self._seen - 1
        for past, now in zip(self._past, (self._wanted, rows, self._action, self._timestep), strict=True):
            past[last] = now
        length = context if self._fixed else int(self._seen.max())
        trajectory = Trajectory(*(torch.from_numpy(past[:, :length]).to(self._device) for past in self._past))
        actions, _ = self._forward(trajectory)
        return actions.float().cpu().numpy()[last]


def _finite(numbers: np.ndarray) -> np.ndarray:
    """Where numbers are finite as float32, in which a model reads them."""
    return np.abs(numbers) <= np.finfo(np.float32).max
