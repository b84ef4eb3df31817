"""The recurrent policies under RecurrentPPO: a rollout and its training pass are one computation; and they remember."""

import time

import gymnasium
import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from minrnn.rl.sb3 import MinGRUPolicy, MinLSTMPolicy, RecurrentPPO

LIMIT = 1e-5  # of rollout against training pass, in values, log-probabilities and gradients
HIDDEN = 16
CRITICS = {
    "own": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "feed-forward": {"enable_critic_lstm": False},
}
OBSERVATIONS = spaces.Box(-3, 3, (5,), np.float32)
ACTIONS = {
    "discrete": spaces.Discrete(4),
    "continuous": spaces.Box(-1, 1, (2,), np.float32),
    "several": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(3),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(kind=MinGRUPolicy, actions="discrete", **options):
    # Not the orthogonal weights: they begin the actor so close to indifference that its gradients are next to nothing.
    options = {"lstm_hidden_size": HIDDEN, "ortho_init": False, **options}
    return kind(OBSERVATIONS, ACTIONS[actions], lambda _: 1e-3, **options)


def drawn(policy, envs=4, steps=30, share=0.15):
    """Observations (N, S, O), episode starts (N, S), states to begin from."""
    starts = (torch.rand(envs, steps) < share).float()
    shape = (policy.lstm_actor.num_layers, envs, HIDDEN)
    states = RNNStates(*(((s := torch.randn(shape)), s) for _ in range(2)))
    return torch.randn(envs, steps, *OBSERVATIONS.shape), starts, states


def gradients(policy, values, log_probs):
    """Of a loss that weighs every step differently."""
    weights = torch.linspace(0.5, 1.5, values.numel()).reshape(values.shape)
    policy.zero_grad()
    ((weights * (values**2 + log_probs)).sum() / 10).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("kind", [MinGRUPolicy, MinLSTMPolicy])
@pytest.mark.parametrize("actions", ["discrete", "continuous"])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("more", [{}, {"n_lstm_layers": 2, "lstm_kwargs": {"learn_initial_state": True}}], ids=str)
def test_a_rollout_by_step_is_the_training_pass(kind, actions, critic, more):
    policy = policy_of(kind, actions, **CRITICS[critic], **more)
    observations, starts, states = drawn(policy)
    steps, carried = [], states
    for t in range(observations.shape[1]):
        distribution, _ = policy.get_distribution(observations[:, t], carried.pi, starts[:, t])
        action, value, _, carried = policy(observations[:, t], carried, starts[:, t])
        action = action.detach()  # drawn with a gradient where actions are continuous
        steps.append((action, value.flatten(), distribution.log_prob(action)))
    taken, values, log_probs = (torch.stack(each, 1) for each in zip(*steps, strict=True))
    by_step = gradients(policy, values, log_probs)
    whole_values, whole_log_probs, _ = policy.evaluate_actions(
        observations.flatten(0, 1), taken.flatten(0, 1), states, starts.flatten()
    )
    whole_values, whole_log_probs = whole_values.view_as(values), whole_log_probs.view_as(log_probs)
    assert_near(whole_values, values)
    assert_near(whole_log_probs, log_probs)
    whole = gradients(policy, whole_values, whole_log_probs)
    assert whole.keys() == by_step.keys() and "lstm_actor.weight_ih_l0" in whole
    for name, gradient in whole.items():
        assert gradient.abs().max() > 100 * LIMIT, name
        assert_near(gradient, by_step[name])


class TimeMajor(nn.Module):
    """A layer as sb3-contrib's loop over steps calls nn.LSTM."""

    def __init__(self, layer, pair: bool) -> None:
        super().__init__()
        self.layer, self.pair, self.input_size = layer, pair, layer.input_size

    def forward(self, series, states):
        output, last = self.layer(series.transpose(0, 1), states if self.pair else states[0])
        return output.transpose(0, 1), last if self.pair else (last, last)


@pytest.mark.parametrize("kind", [MinGRUPolicy, MinLSTMPolicy])
def test_one_scan_is_the_loop_of_sb3_contrib(kind):
    policy = policy_of(kind, n_lstm_layers=2)
    observations, starts, states = drawn(policy)
    loop = RecurrentActorCriticPolicy._process_sequence
    layer = TimeMajor(policy.lstm_actor, kind is MinLSTMPolicy)
    expected, ends = loop(observations.flatten(0, 1), states.pi, starts.flatten(), layer)
    actual, last = policy._process_sequence(observations.flatten(0, 1), states.pi, starts.flatten(), policy.lstm_actor)
    assert_near(actual, expected)
    assert_near(torch.stack(last), torch.stack(ends))


@pytest.mark.parametrize("kind", [MinGRUPolicy, MinLSTMPolicy])
def test_no_gradient_crosses_a_reset(kind):
    policy = policy_of(kind)
    observations, starts, states = drawn(policy, share=0)
    for begins in (False, True):
        starts[0, 10] = begins
        inputs, before = observations.clone().requires_grad_(), [s[0].clone().requires_grad_() for s in states]
        values, log_probs, _ = policy.evaluate_actions(
            inputs.flatten(0, 1),
            torch.zeros(starts.numel()),
            RNNStates(*((s, s) for s in before)),
            starts.flatten(),
        )
        (values.view_as(starts) + log_probs.view_as(starts))[0, 10:].sum().backward()
        crossed = [inputs.grad[0, :10], *(s.grad[:, 0] for s in before)]
        assert all(bool((each == 0).all()) is begins for each in crossed)
        assert (inputs.grad[0, 10:] != 0).all()
        assert (inputs.grad[1:] == 0).all()


class Drifting(gymnasium.Env):
    """Random observations in episodes of random lengths, ended by the environment or by a time limit."""

    def __init__(self, observation_space=OBSERVATIONS, action_space=ACTIONS["discrete"]) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), "an action of the space"
        ends = self.np_random.random(2) < 0.08
        return self.observation_space.sample(), self.np_random.normal(), bool(ends[0]), bool(ends[1]), {}


def rolled(algorithm=RecurrentPPO, kind=MinGRUPolicy, env=Drifting, options=None, **settings):
    """An algorithm after one rollout of 3 environments, its weights as they were in it."""
    settings = {"n_steps": 50, "batch_size": 32, "n_epochs": 1, "learning_rate": 0.0, **settings}
    options = {"lstm_hidden_size": HIDDEN, **(options or {})}
    envs = make_vec_env(env, n_envs=3, seed=0)
    model = algorithm(kind, envs, policy_kwargs=options, seed=0, device="cpu", **settings)
    return model.learn(3 * settings["n_steps"])


@pytest.mark.parametrize("algorithm", [RecurrentPPO, sb3_contrib.RecurrentPPO], ids=["minrnn", "sb3-contrib"])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("batch_size", [32, 15, 100, None])
def test_the_states_of_the_buffer_reproduce_the_rollout(algorithm, critic, batch_size):
    model = rolled(algorithm, options={**CRITICS[critic], "n_lstm_layers": 2})
    model.policy.set_training_mode(True)
    values = np.sort(model.rollout_buffer.values, axis=None)
    seen = []
    for batch in model.rollout_buffer.get(batch_size):
        mask = batch.mask > 0
        actions = batch.actions.long().flatten()
        found, log_probs, _ = model.policy.evaluate_actions(
            batch.observations, actions, batch.lstm_states, batch.episode_starts
        )
        assert_near(found.flatten()[mask], batch.old_values[mask])
        assert_near(log_probs[mask], batch.old_log_prob[mask])
        seen.append(batch.old_values[mask])
    assert np.array_equal(np.sort(torch.cat(seen)), values)  # every step once


def test_batches_are_pieces_without_padding():
    model = rolled()
    buffer = model.rollout_buffer
    assert buffer.episode_starts.sum() > 10
    shapes = {}
    for size in (50, 25, 20, 100, 150, None):
        shapes[size] = [(b.lstm_states.pi[0].shape[1], len(b.mask), int(b.mask.sum())) for b in buffer.get(size)]
    assert shapes[50] == [(1, 50, 50)] * 3
    assert shapes[25] == [(1, 25, 25)] * 6
    assert len(shapes[20]) == 8  # of 9 pieces: 50 = 16 + 17 + 17 steps, three times
    assert sum(steps for _, _, steps in shapes[20]) == 150
    assert all(size - steps < pieces for pieces, size, steps in shapes[20])
    assert shapes[100] == [(2, 100, 100), (1, 50, 50)]
    assert shapes[150] == shapes[None] == [(3, 150, 150)]
    assert min(int(batch.mask.sum()) for batch in buffer.get(1)) == 2  # one advantage has no standard deviation


class Counting(gymnasium.Env):
    """Shows how many steps were made; four of them make an episode."""

    observation_space, action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, terminates: bool) -> None:
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        ends = self.steps == 4
        return np.full(1, self.steps, np.float32), 0.0, ends and self.terminates, ends and not self.terminates, {}


@pytest.mark.parametrize("critic", CRITICS)
def test_a_time_limit_adds_the_value_of_the_last_observation_in_the_state_carried_there(critic):
    model = rolled(env=lambda: Counting(False), options=CRITICS[critic], n_steps=12, gamma=0.9)
    policy = model.policy
    states = tuple(torch.zeros(1, 1, HIDDEN) for _ in range(2))
    observations = torch.arange(5.0)[:, None]
    values = policy.predict_values(observations, states, torch.tensor([1.0, 0, 0, 0, 0])).detach()
    rewards = torch.as_tensor(model.rollout_buffer.rewards)
    expected = torch.zeros_like(rewards)
    expected[3::4] = 0.9 * values[4]
    assert abs(values[4].item()) > 100 * LIMIT
    assert_near(rewards, expected)
    assert model.rollout_buffer.episode_starts[::4].all()  # truncated episodes are followed by a start
    ended = rolled(env=lambda: Counting(True), options=CRITICS[critic], n_steps=12, gamma=0.9)
    assert (ended.rollout_buffer.rewards == 0).all()


IMAGES = spaces.Box(0, 255, (36, 36, 1), np.uint8)
SPACES = {
    "continuous": (OBSERVATIONS, ACTIONS["continuous"], {}),
    "state-dependent noise": (OBSERVATIONS, ACTIONS["continuous"], {"use_sde": True}),
    "several": (OBSERVATIONS, ACTIONS["several"], {}),
    "binary": (OBSERVATIONS, ACTIONS["binary"], {}),
    "dict": (spaces.Dict({"seen": OBSERVATIONS, "place": spaces.Discrete(3)}), ACTIONS["discrete"], {}),
    "image": (IMAGES, ACTIONS["discrete"], {}),
}


@pytest.mark.parametrize("case", SPACES)
@pytest.mark.parametrize("kind", ["MinGRUPolicy", "MinLSTMPolicy"])
def test_every_space_learns_acts_and_comes_back_from_disk(case, kind, tmp_path):
    observations, actions, settings = SPACES[case]
    model = rolled(
        kind=kind,
        env=lambda: Drifting(observations, actions),
        options={"n_lstm_layers": 2, "lstm_kwargs": {"learn_initial_state": True, "activation": "tanh"}},
        learning_rate=1e-3,
        n_steps=20,
        **settings,
    )
    envs = make_vec_env(lambda: Drifting(observations, actions), n_envs=2, seed=1)
    assert np.isfinite(evaluate_policy(model, envs, n_eval_episodes=4)[0])
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    others = [RecurrentPPO.load(tmp_path / "model").policy, type(model.policy).load(tmp_path / "policy")]
    seen, states, start = envs.reset(), [None] * 3, np.ones(2, bool)
    for _ in range(12):
        acts, states = zip(
            *(p.predict(seen, s, start, deterministic=True) for p, s in zip([model, *others], states, strict=True)),
            strict=True,
        )
        for act, state in zip(acts[1:], states[1:], strict=True):
            assert np.array_equal(act, acts[0]) and np.array_equal(state, states[0])
        seen, _, start, _ = envs.step(acts[0])
    RecurrentPPO.load(tmp_path / "model", env=make_vec_env(lambda: Drifting(observations, actions), 3)).learn(60)


def test_predict_begins_from_the_learned_state_and_keeps_environments_apart():
    policy = policy_of(lstm_kwargs={"learn_initial_state": True})
    observations = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    _, first = policy.predict(observations)
    _, second = policy.predict(observations, first)
    assert first[0].shape == (1, 3, HIDDEN)
    _, mixed = policy.predict(observations, second, np.array([False, True, False]))
    assert np.allclose(mixed[0][:, 1], first[0][:, 1], atol=LIMIT)
    _, third = policy.predict(observations, second)
    assert np.allclose(mixed[0][:, [0, 2]], third[0][:, [0, 2]], atol=LIMIT)
    assert not np.allclose(third[0], first[0], atol=100 * LIMIT)
    action, alone = policy.predict(observations[0], deterministic=True)
    assert action.shape == ()
    assert np.allclose(alone[0][:, 0], first[0][:, 0], atol=LIMIT)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="MinGRUPolicy: lstm_kwargs must leave .* to the policy, got 'bidirectional'"):
        policy_of(lstm_kwargs={"bidirectional": True})
    with pytest.raises(TypeError, match="forget_bias"):
        policy_of(lstm_kwargs={"forget_bias": 3.0})
    with pytest.raises(TypeError, match="hidden"):
        policy_of(hidden=3)
    assert policy_of(MinLSTMPolicy, lstm_kwargs={"forget_bias": 3.0}).lstm_critic.forget_bias == 3.0


class TMaze(gymnasium.Env):
    """A corridor that shows at its beginning on which side of its end the goal lies (Bakker, 2002).

    Actions: walk, left, right. The end looks alike for both goals: who does not remember is right half of the time.
    """

    observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(3)
    length = 6

    def _see(self):
        shown = self.goal if self.steps == 0 else 0
        return np.array([shown, self.place == 0, self.place == self.length], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.place, self.steps = 1 - 2 * int(self.np_random.integers(2)), 0, 0
        return self._see(), {}

    def step(self, action):
        self.steps += 1
        if self.place == self.length and action:
            return self._see(), 1.0 if (action == 1) == (self.goal == 1) else -1.0, True, False, {}
        moved = self.place < self.length and action == 0
        self.place += moved
        return self._see(), 0.0 if moved else -0.1, False, self.steps == 3 * self.length, {}


class StopWhenSolved(BaseCallback):
    """Ends learning when 97 of the last 100 episodes were right."""

    solved = False

    def _on_rollout_start(self) -> None:
        last = [episode["r"] > 0 for episode in self.model.ep_info_buffer]
        self.solved = sum(last) >= 97

    def _on_step(self) -> bool:
        return not self.solved


def share_of_goals(model) -> float:
    """Over 200 episodes, as the policy would rather act."""
    returns, _ = evaluate_policy(
        model, make_vec_env(TMaze, n_envs=32, seed=99), n_eval_episodes=200, return_episode_rewards=True
    )
    return float(np.mean(np.array(returns) > 0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_remembers_what_a_feed_forward_policy_cannot(seed):
    settings = {"n_steps": 32, "batch_size": 256, "learning_rate": 1e-2, "ent_coef": 0.05, "gae_lambda": 1.0}
    options = {"lstm_hidden_size": 32, "net_arch": []}
    envs = make_vec_env(TMaze, n_envs=32, seed=seed)
    ours = RecurrentPPO(MinGRUPolicy, envs, policy_kwargs=options, seed=seed, device="cpu", **settings)
    ours.learn(80_000, StopWhenSolved())
    assert share_of_goals(ours) >= 0.95
    envs = make_vec_env(TMaze, n_envs=32, seed=seed)
    memoryless = PPO("MlpPolicy", envs, seed=seed, device="cpu", n_epochs=10, **settings)
    memoryless.learn(ours.num_timesteps)
    assert share_of_goals(memoryless) <= 0.7


class Hidden(gymnasium.ObservationWrapper):
    """CartPole without its velocities; position and angle in thirds of where an episode ends."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation):
        return observation[[0, 2]] * np.array([3 / 2.4, 3 / 0.21], np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_balances_a_pole_whose_velocity_is_hidden(seed):
    settings = {"n_steps": 128, "batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3, "gamma": 0.98}
    options = {"lstm_hidden_size": 64, "lstm_kwargs": {"activation": "identity"}}
    ours = RecurrentPPO(
        MinGRUPolicy, make_vec_env(Hidden, 8, seed), policy_kwargs=options, seed=seed, device="cpu", **settings
    )
    memoryless = PPO("MlpPolicy", make_vec_env(Hidden, 8, seed), seed=seed, device="cpu", **settings)
    returns = [
        np.mean([episode["r"] for episode in model.learn(80_000).ep_info_buffer]) for model in (ours, memoryless)
    ]
    assert returns[0] >= 120  # 189 to 297 were seen, and 48 or 49 without memory
    assert returns[1] <= 75


@pytest.mark.slow
def test_a_training_pass_takes_a_third_of_the_time_of_sb3_contribs_lstm():
    """Of processor time, over the same rollouts: episodes of CartPole, sb3-contrib's own sizes."""
    seconds = {}
    for algorithm, kind in ((RecurrentPPO, MinGRUPolicy), (sb3_contrib.RecurrentPPO, "MlpLstmPolicy")):
        model = algorithm(kind, make_vec_env("CartPole-v1", 8, 0), n_epochs=1, seed=0, device="cpu")
        model.learn(8 * 128)
        times = []
        for _ in range(5):
            begin = time.process_time()
            model.train()
            times.append(time.process_time() - begin)
        seconds[kind] = float(np.median(times))
    assert 3 * seconds[MinGRUPolicy] <= seconds["MlpLstmPolicy"]
