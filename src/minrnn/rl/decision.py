"""Decision models: the next action from the returns wanted, the observations and the actions up to now.

B batch, T time in steps of the environment, O size of an observation, A of an action, D model width.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from minrnn._config import check_at_least, check_choice, check_positive, check_types
from minrnn._shapes import check_reset, check_shape, check_tensor, shape_error
from minrnn.models import Backbone, BackboneConfig, ModelConfig, SequenceModel

Layout = Literal["interleaved", "concatenated"]


class Trajectory(NamedTuple):
    """What a decision model reads, in the environment's own units.

    Args:
        returns_to_go: (B, T), the rewards wanted from each step to the end of the episode, that step's included.
        observations: (B, T, O).
        previous_actions: (B, T, A), what was done one step earlier; not read where a sequence begins.
        timesteps: int64 (B, T), steps since the episode began.
    """

    returns_to_go: Tensor
    observations: Tensor
    previous_actions: Tensor
    timesteps: Tensor


class Scales(NamedTuple):
    """What the numbers of an environment look like, (O,) or (A,) each.

    Args:
        mean: of observations.
        std: of observations.
        low: the least of each action.
        high: the greatest.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class DecisionConfig(ModelConfig):
    """A backbone between a trajectory and actions.

    Args:
        observation_size: O
        action_size: A
        backbone: what is between
        layout: interleaved, three tokens per step, or concatenated, one
        context: steps in a training window, and in a window that is read to act
        max_timestep: later steps of an episode are told apart no more (interleaved only)
        return_scale: returns are divided by it
    """

    observation_size: int
    action_size: int
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    layout: Layout = "interleaved"
    context: int = 20
    max_timestep: int = 1000
    return_scale: float = 1000.0

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "observation_size", "action_size", "context", "max_timestep")
        check_choice(self, "layout", get_args(Layout))
        check_positive(self, "return_scale")


class DecisionModel(SequenceModel):
    """a_t = middle + reach ⊙ tanh(W y_t + b), y from a backbone that reads R_t, s_t and a_t-1 of all steps up to t.

    R_t is the return wanted from t on, divided by `return_scale`; s_t is the observation, (s - mean) / (std + 1e-6).

    - "interleaved": tokens R_0 s_0 a_0 R_1 s_1 a_1 ..., each a linear map of its own to D channels plus row
      min(t, max_timestep - 1) of a learned table, then LayerNorm over all; y_t stands at the token s_t. With a mixer
      called attention this is the Decision Transformer.
    - "concatenated": one token per step, W [tanh(W_a a_t-1) | tanh(W_R R_t) | tanh(W_s s_t)], each of D channels, no
      table, y_t stands at it. With S4 this is Decision S4; where a sequence begins, a_t-1 is zero.

    One call reads a whole episode, a window, a chunk or a step. A sequence begins where there is no state or `reset` is
    true; what was done before it is not read then, whatever `previous_actions` holds. No token follows the last s_t
    until the action that was really taken comes with the next step: streaming does not differ from one long pass.

    The normaliser and the bounds of actions are buffers, saved with the weights.

    Args:
        config: sizes, layout and backbone.

    Source: Chen et al., "Decision Transformer" (2021), section 3; David et al., "Decision S4" (2023), section 3; Ota,
    "Decision Mamba" (2024), section 3.
    """

    config_class = DecisionConfig
    mean: Tensor
    std: Tensor
    middle: Tensor
    reach: Tensor

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__(config)
        width, self.interleaved = config.backbone.width, config.layout == "interleaved"
        self.return_to_go = nn.Linear(1, width)
        self.observation = nn.Linear(config.observation_size, width)
        self.action = nn.Linear(config.action_size, width)
        self.timestep = nn.Embedding(config.max_timestep, width) if self.interleaved else None
        self.join = nn.LayerNorm(width) if self.interleaved else nn.Linear(3 * width, width)
        self.backbone = Backbone(config.backbone)
        self.head = nn.Linear(width, config.action_size)
        for name, size, value in (
            ("mean", config.observation_size, 0.0),
            ("std", config.observation_size, 1.0),
            ("middle", config.action_size, 0.0),
            ("reach", config.action_size, 1.0),
        ):
            self.register_buffer(name, torch.full((size,), value))

    def set_scales(self, scales: Scales) -> None:
        """Take over the normaliser and the bounds of actions, of the data that the model is going to learn."""
        middle = (scales.low + scales.high) / 2
        reach = np.minimum(scales.high - middle, middle - scales.low)
        beyond = (middle + reach > scales.high) | (middle - reach < scales.low)  # by rounding
        reach = np.where(beyond, np.nextafter(reach, 0, dtype=reach.dtype), reach)
        for buffer, values in zip(
            (self.mean, self.std, self.middle, self.reach), (scales.mean, scales.std, middle, reach), strict=True
        ):
            buffer.copy_(torch.from_numpy(np.asarray(values)))

    def forward(self, trajectory: Trajectory, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Read steps, all of an episode, a part of it or one.

        Args:
            trajectory: the steps; floating tensors of any dtype.
            state: what an earlier call gave for the steps before; None at the beginning of a sequence.
            reset: bool (B, T). Where true, a new sequence begins with this step: nothing from here on depends on a step
                before it, nor on the action that came with it.

        Returns:
            The action for each step, (B, T, A), and the state after the last.

        Raises:
            TypeError: an argument is not a tensor, timesteps are not int64, or reset is not bool.
            ValueError: shapes do not agree.
        """
        self._check(trajectory, reset)
        if not trajectory.timesteps.shape[1]:
            return trajectory.previous_actions.to(self.head.weight.dtype), state  # where None is still the beginning
        previous = trajectory.previous_actions
        if reset is not None:
            previous = previous.where(~reset[..., None], 0)
        if state is None:
            previous = torch.cat([torch.zeros_like(previous[:, :1]), previous[:, 1:]], 1)
        parts = self._embed(trajectory._replace(previous_actions=previous))
        if self.timestep is None:
            tokens, every = self.join(torch.cat(parts, 2).tanh()), slice(None)
        else:
            tokens, reset, every = self._interleave(parts, trajectory.timesteps, reset, begins=state is None)
        hidden, state = self.backbone(tokens, state, reset=reset)
        return self.middle + self.reach * torch.tanh(self.head(hidden[:, every])), state

    def _check(self, trajectory: Trajectory, reset: Tensor | None) -> None:
        caller, sizes, times = "DecisionModel", self.config, trajectory.timesteps
        for name, values in zip(Trajectory._fields, trajectory, strict=True):
            check_tensor(caller, name, values)
        if times.dim() != 2:
            raise shape_error(caller, "timesteps", "(B, T)", "two dimensions", tuple(times.shape))
        if times.dtype != torch.int64:
            raise TypeError(f"{caller}: timesteps must be int64, got {times.dtype}")
        shape = tuple(times.shape)
        check_shape(caller, "returns_to_go", trajectory.returns_to_go, "(B, T)", shape)
        check_shape(caller, "observations", trajectory.observations, "(B, T, O)", (*shape, sizes.observation_size))
        check_shape(caller, "previous_actions", trajectory.previous_actions, "(B, T, A)", (*shape, sizes.action_size))
        check_reset(caller, reset, times)

    def _embed(self, trajectory: Trajectory) -> list[Tensor]:
        """Previous actions, returns and observations, (B, T, D) each."""
        dtype = self.head.weight.dtype
        observations = (trajectory.observations.to(dtype) - self.mean) / (self.std + 1e-6)
        returns = trajectory.returns_to_go.to(dtype)[..., None] / self.config.return_scale
        return [
            self.action(trajectory.previous_actions.to(dtype)),
            self.return_to_go(returns),
            self.observation(observations),
        ]

    def _interleave(
        self, parts: list[Tensor], now: Tensor, reset: Tensor | None, *, begins: bool
    ) -> tuple[Tensor, Tensor | None, slice]:
        """Tokens a_t-1 R_t s_t of every step, which of them begin a sequence, and which are followed by an action.

        A step that begins a sequence begins it with R_t; the first of all has nothing before that.
        """
        assert self.timestep is not None, "the layout has a table"
        times = torch.stack([now - 1, now, now], 2).clamp(0, self.config.max_timestep - 1)
        tokens = self.join(torch.stack(parts, 2) + self.timestep(times)).flatten(1, 2)
        if reset is not None:
            none = torch.zeros_like(reset)
            reset = torch.stack([none, reset, none], 2).flatten(1)
        if begins:
            return tokens[:, 1:], reset if reset is None else reset[:, 1:], slice(1, None, 3)
        return tokens, reset, slice(2, None, 3)
