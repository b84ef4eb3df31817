"""Recurrent policies on MinGRU and MinLSTM for sb3-contrib's RecurrentPPO: `pip install minrnn[rl]`.

    from minrnn.rl.sb3 import MinGRUPolicy, RecurrentPPO

    model = RecurrentPPO(MinGRUPolicy, "CartPole-v1").learn(100_000)

When the state resets: `episode_starts[t]` true says that observation t is the first of an episode; the state carried
into step t is then the initial one. It is the same index in a rollout, in the training pass and in `predict`, and it is
the layers' `reset`: no value and no gradient crosses it. Vectorised environments start a new episode after a terminal
state and after a time limit alike, so the state resets at both. What differs is the return: at a time limit
(Gymnasium's `truncated`) RecurrentPPO adds gamma V(last observation) to the last reward, and that V is taken with the
state carried there, not with a reset one.

Why sb3-contrib and not TorchRL's GRUModule: RecurrentPPO is a whole algorithm and hands its policy sequences beside
`episode_starts`, so that one method runs them in one scan, for every option that there is. GRUModule is one part of an
algorithm that its user writes; given another layer than nn.GRU, it splits a batch at the resets, pads it and asks the
layer for a `mask`, or takes the weights of nn.GRU's own equations, so that private methods would have to be replaced.

Letters: B sequences in a batch, T time, L layers, H hidden size, N environments, S steps of a rollout.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import sb3_contrib
from gymnasium import spaces
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import (
    RecurrentDictRolloutBufferSamples,
    RecurrentRolloutBufferSamples,
    RNNStates,
)
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import Tensor
from torch.utils._pytree import tree_map

from minrnn.layers import MinGRU, MinLSTM

__all__ = ["MinGRUPolicy", "MinLSTMPolicy", "RecurrentPPO"]

# What a policy decides about its layers, so that `lstm_kwargs` cannot.
_DECIDED = ("input_size", "hidden_size", "num_layers", "batch_first", "bidirectional", "proj_size", "device", "dtype")


class _Policy(RecurrentActorCriticPolicy):
    """sb3-contrib's recurrent policy with another recurrent layer, and with one scan where it loops over steps."""

    layer: ClassVar[type[MinGRU] | type[MinLSTM]]
    lstm_actor: MinGRU | MinLSTM
    lstm_critic: MinGRU | MinLSTM | None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule,
        *,
        features_extractor_class=None,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        lstm_kwargs: dict[str, Any] | None = None,
        **others: Any,  # of RecurrentActorCriticPolicy, which refuses what it does not know
    ) -> None:
        decided = [name for name in lstm_kwargs or {} if name in _DECIDED]
        if decided:
            raise ValueError(
                f"{type(self).__name__}: lstm_kwargs must leave {', '.join(_DECIDED)} to the policy, got {decided[0]!r}"
            )
        if features_extractor_class is None:
            features_extractor_class = _extractor(observation_space)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=features_extractor_class,
            lstm_hidden_size=lstm_hidden_size,
            n_lstm_layers=n_lstm_layers,
            **others,
        )
        self.lstm_kwargs = dict(lstm_kwargs or {})
        sizes = (self.features_dim, lstm_hidden_size, n_lstm_layers)
        self.lstm_actor = self.layer(*sizes, batch_first=True, **self.lstm_kwargs)
        if self.lstm_critic is not None:
            self.lstm_critic = self.layer(*sizes, batch_first=True, **self.lstm_kwargs)
        # Again, as the first one holds the parameters of the layers that were replaced.
        settings = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **settings)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """What `save` keeps and `load` builds the policy from: sb3-contrib's own leaves out the recurrent part."""
        return super()._get_constructor_parameters() | {
            "share_features_extractor": self.share_features_extractor,
            "lstm_hidden_size": self.lstm_actor.hidden_size,
            "n_lstm_layers": self.lstm_actor.num_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: MinGRU | MinLSTM
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The layer over B sequences, reset where episodes start, in one scan.

        features (B T, D), sequence after sequence; lstm_states (h, c), each (L, B, H); episode_starts (B T,). Returns
        the output (B T, H) and the states after the last steps, for minGRU one tensor twice.
        """
        sequences = lstm_states[0].shape[1]
        series = features.reshape(sequences, -1, lstm.input_size)
        reset = episode_starts.reshape(sequences, -1).bool()
        hx = lstm_states if isinstance(lstm, MinLSTM) else lstm_states[0]
        output, last = lstm(series, hx, reset=reset)
        return output.flatten(0, 1), (last, last) if isinstance(last, Tensor) else last

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for N environments, or one, and the state to give to the next call.

        Args:
            observation: of each environment, as the observation space says.
            state: what the call before returned; None where nothing came before, so that every episode starts.
            episode_start: bool (N,), whether the observation is the first of an episode; by default none is.
            deterministic: the most likely action, not a drawn one.

        Returns: the actions, (N, ...) or of one environment, and (h, c), each (L, N, H).
        """
        if state is None:
            # The learned initial state, where there is one, stands in for what sb3-contrib begins from: zeros.
            observations = self.obs_to_tensor(observation)[0]
            some = next(iter(observations.values())) if isinstance(observations, dict) else observations
            episode_start = np.ones(len(some), dtype=bool)
        return super().predict(observation, state, episode_start, deterministic)


def _extractor(space: spaces.Space):
    """What sb3-contrib's policies take for such observations: of a dict, of an image, of anything else."""
    if isinstance(space, spaces.Dict):
        return CombinedExtractor
    return NatureCNN if is_image_space(space) else FlattenExtractor


class MinGRUPolicy(_Policy):
    """An actor and a critic on minGRU, for RecurrentPPO (here or in sb3-contrib) and every kind of observation.

    A rollout step by step and the training pass over it give the same values, log-probabilities and gradients, wherever
    episodes start. The options are those of sb3-contrib's MlpLstmPolicy, under its names (`policy_kwargs`).

    Args:
        observation_space, action_space, lr_schedule: given by the algorithm.
        features_extractor_class: by default what fits the observations: dicts CombinedExtractor, images NatureCNN,
            others FlattenExtractor.
        lstm_hidden_size, n_lstm_layers: H and L of each recurrent network.
        enable_critic_lstm: the critic has a recurrent network of its own (the default).
        shared_lstm: the critic reads the actor's, without a gradient into it; with neither, the critic sees the present
            observation only.
        lstm_kwargs: of MinGRU: `activation` ("identity" is worth a try in control: its states are averages of linear
            maps of the observations, and their differences velocities), `learn_initial_state`, `bias`, `dropout` (which
            acts in training passes only, as it does in sb3-contrib).
        others: net_arch, activation_fn, use_sde, optimizer_class, ...: as in sb3-contrib.

    Raises: ValueError for `lstm_kwargs` that the policy decides; TypeError for options that nothing knows.

    Example:
        >>> model = RecurrentPPO(MinGRUPolicy, "CartPole-v1", policy_kwargs={"lstm_hidden_size": 64})
        >>> action, state = model.predict(observation, state, episode_start)
    """

    layer = MinGRU


class MinLSTMPolicy(_Policy):
    """`MinGRUPolicy` on minLSTM; `lstm_kwargs` are those of MinLSTM, `normalize` and `forget_bias` among them."""

    layer = MinLSTM


class _Pieces:
    """Batches of a rollout that are cut in time, and neither split at episode starts nor padded to their lengths.

    sb3-contrib's buffer makes each episode of a batch a sequence and pads all to the longest. Here each environment's
    rollout is cut into ceil(S / batch_size) pieces, equal up to one step, each with the state that the rollout had
    there. A batch is some of these pieces, drawn without replacement: arrays (B, T) in which episodes may start
    anywhere. Where the pieces of a batch differ by that one step, the mask leaves it out.
    """

    def get(self: Any, batch_size: int | None = None) -> Iterator[Any]:
        """Batches of about `batch_size` steps, by default one of all, that have every step of the rollout once."""
        assert self.full, "a rollout is whole before it is sampled from"
        steps, envs = self.buffer_size, self.n_envs
        batch_size = batch_size or steps * envs
        # Of one step alone, advantages would have no standard deviation.
        pieces = min(-(-steps // batch_size), max(1, steps // 2))
        bounds = np.arange(pieces + 1) * steps // pieces
        batches = min(pieces * envs, max(1, round(steps * envs / batch_size)))
        for drawn in np.array_split(np.random.permutation(pieces * envs), batches):
            env, piece = np.divmod(drawn, pieces)
            yield self._gather(env, bounds[piece], bounds[piece + 1])

    def _gather(self: Any, env: np.ndarray, start: np.ndarray, end: np.ndarray) -> Any:
        """Steps [start, end) of the environments `env`, each (B,), as one batch."""
        time = start[:, None] + np.arange((end - start).max())
        mask = time < end[:, None]
        steps = (np.minimum(time, end[:, None] - 1), env[:, None])

        def series(values: np.ndarray) -> Tensor:
            return self.to_torch(values[steps]).flatten(0, 1)

        def states(values: np.ndarray) -> Tensor:
            return self.to_torch(values[start, :, env].swapaxes(0, 1)).contiguous()

        return self.samples(
            observations=tree_map(series, self.observations),
            actions=series(self.actions).float(),  # as in PPO; bytes have no Bernoulli likelihood
            old_values=series(self.values),
            old_log_prob=series(self.log_probs),
            advantages=series(self.advantages),
            returns=series(self.returns),
            lstm_states=RNNStates(
                (states(self.hidden_states_pi), states(self.cell_states_pi)),
                (states(self.hidden_states_vf), states(self.cell_states_vf)),
            ),
            episode_starts=series(self.episode_starts),
            mask=self.to_torch(mask.astype(np.float32)).flatten(),
        )


class _Buffer(_Pieces, RecurrentRolloutBuffer):
    samples = RecurrentRolloutBufferSamples


class _DictBuffer(_Pieces, RecurrentDictRolloutBuffer):
    samples = RecurrentDictRolloutBufferSamples


class RecurrentPPO(sb3_contrib.RecurrentPPO):
    """sb3-contrib's RecurrentPPO, the same in every argument, without the padding in its training passes.

    Its batches are pieces of the environments' rollouts with episodes starting anywhere in them, where sb3-contrib's
    are one padded sequence per episode: what short episodes beside long ones cost there, they do not cost here. A
    gradient reaches back to the start of its piece, min(n_steps, batch_size) steps or a little less, or to the start of
    its episode. `batch_size` is met as nearly as whole pieces allow.

    Besides its policies by name ("MlpLstmPolicy", ...) it knows "MinGRUPolicy" and "MinLSTMPolicy".

    Source: sb3-contrib's RecurrentPPO; Schulman et al., "Proximal Policy Optimization Algorithms" (2017).

    Example:
        >>> model = RecurrentPPO("MinGRUPolicy", "CartPole-v1", n_steps=128, batch_size=512).learn(10_000)
    """

    policy_aliases: ClassVar = {
        **sb3_contrib.RecurrentPPO.policy_aliases,
        "MinGRUPolicy": MinGRUPolicy,
        "MinLSTMPolicy": MinLSTMPolicy,
    }

    def _setup_model(self) -> None:
        super()._setup_model()
        layer: Any = self.policy.lstm_actor
        self.rollout_buffer = (_DictBuffer if isinstance(self.observation_space, spaces.Dict) else _Buffer)(
            self.n_steps,
            self.observation_space,
            self.action_space,
            (self.n_steps, layer.num_layers, self.n_envs, layer.hidden_size),
            self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
        )
