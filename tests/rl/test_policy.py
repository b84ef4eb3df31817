"""Acting: both modes against the model's own pass over a whole episode, for one environment and for vectors of them."""

import json
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from offline_toys import ACTIONS, SIZE, TOY, make_model

from conftest import assert_close
from minrnn.rl import SYSTEMS, Policy, PolicyFacts, Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")


def whole_pass(model, observations, rewards, actions, target, first=0):
    """The model's actions for steps `first` ... of an episode, in one call."""
    wanted = target - np.concatenate([[0], np.cumsum(rewards)])[: len(observations)]
    previous = np.concatenate([np.zeros((1, actions.shape[1]), np.float32), actions])[: len(observations)]
    steps = (wanted.astype(np.float32), observations.astype(np.float32), previous, np.arange(len(observations)))
    with torch.no_grad():
        found, _ = model(Trajectory(*(torch.from_numpy(each[first:])[None] for each in steps)))
    return found[0]


def random_episode(length, seed):
    random = np.random.default_rng(seed)
    return random.normal(size=(length, SIZE)), random.normal(size=length)


def play(policy, observations, rewards):
    """Actions for an episode that takes no notice of them."""
    policy.reset()
    actions, reward = [], None
    for observation, after in zip(observations, rewards, strict=True):
        actions.append(policy.act(observation, reward))
        reward = after
    return np.stack(actions)


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_streaming_is_one_pass_over_the_episode(mixer):
    """40 steps: beyond the window and beyond the table of times."""
    model, (observations, rewards) = make_model(mixer), random_episode(40, 1)
    actions = play(Policy(model, target=5.0, mode="stream"), observations, rewards)
    assert actions.shape == (40, ACTIONS) and actions.dtype == np.float32
    assert_close(torch.from_numpy(actions), whole_pass(model, observations, rewards, actions, 5.0), torch.float32)
    assert np.abs(np.diff(actions, axis=0)).max() > 0.1


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_a_window_is_its_own_pass_over_the_last_steps(mixer):
    model, (observations, rewards) = make_model(mixer), random_episode(15, 2)
    actions = play(Policy(model, target=5.0, mode="window"), observations, rewards)
    for t in range(15):
        expected = whole_pass(
            model, observations[: t + 1], rewards[: t + 1], actions[: t + 1], 5.0, first=max(0, t + 1 - 6)
        )
        assert_close(torch.from_numpy(actions[t]), expected[-1], torch.float32)


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_the_modes_agree_until_the_window_is_full(mixer):
    model, (observations, rewards) = make_model(mixer), random_episode(9, 3)
    window, stream = (
        play(Policy(model, target=5.0, mode=mode), observations, rewards) for mode in ("window", "stream")
    )
    assert_close(torch.from_numpy(window[:6]), torch.from_numpy(stream[:6]), torch.float32)
    assert np.abs(window[6:] - stream[6:]).max() > 3e-4


@pytest.mark.parametrize("autoreset", AutoresetMode)
@pytest.mark.parametrize("mode", ["stream", "window"])
@pytest.mark.parametrize("mixer", ["mingru", "attention", "s4"])
def test_every_episode_of_a_vector_is_as_if_alone(mixer, mode, autoreset):
    """The loops that `Policy` describes; every episode's actions are those of a policy that plays it alone."""
    model, targets = make_model(mixer), [3.0, 5.0, 7.0]
    policy = Policy(model, target=targets, mode=mode)
    envs = SyncVectorEnv([lambda: gymnasium.make(TOY)] * 3, autoreset_mode=autoreset)
    running, episodes = [([], [], []) for _ in targets], []
    observation, _ = envs.reset(seed=1)
    policy.reset()
    reward, ended = None, np.zeros(3, bool)
    for _ in range(80):
        action = policy.act(observation, reward)
        at, waiting = observation, ended if autoreset is AutoresetMode.NEXT_STEP else np.zeros(3, bool)
        observation, reward, terminated, truncated, _ = envs.step(action)
        ended = terminated | truncated
        for row in np.flatnonzero(~waiting):
            for series, value in zip(running[row], (at[row], reward[row], action[row]), strict=True):
                series.append(value)
            if ended[row]:
                episodes.append((targets[row], running[row]))
                running[row] = ([], [], [])
        if autoreset is AutoresetMode.DISABLED and ended.any():
            observation, _ = envs.reset(options={"reset_mask": ended})
        begun = waiting if autoreset is AutoresetMode.NEXT_STEP else ended
        policy.reset(begun)
    assert len(episodes) > 5 and max(len(series[0]) for _, series in episodes) == 30
    for target, series in episodes:
        observations, rewards, actions = map(np.array, series)
        alone = play(Policy(model, target=target, mode=mode), observations, rewards)
        assert_close(torch.from_numpy(actions), torch.from_numpy(alone), torch.float32)


@pytest.mark.parametrize("mode", ["stream", "window"])
def test_rewards_lower_the_return_that_is_wanted(mode):
    model, (observations, _) = make_model(), random_episode(4, 4)
    paid = play(Policy(model, target=10.0, mode=mode), observations, np.full(4, 2.0))
    unpaid = play(Policy(model, target=10.0, mode=mode), observations, np.zeros(4))
    assert np.array_equal(paid[0], unpaid[0]) and (paid[1:] != unpaid[1:]).any(1).all()


@pytest.mark.parametrize("mode", ["stream", "window"])
def test_files_act_alike(mode, tmp_path):
    model, (observations, rewards) = make_model("minlstm"), random_episode(8, 5)
    facts = PolicyFacts("Hopper-v5", [7.0, 5.0], {"random": 1.0})
    policy = Policy(model, facts, mode=mode)
    policy.save(tmp_path / "policy")
    again = Policy.load(tmp_path / "policy", mode=mode)
    assert again.facts == facts and again.target == 7.0
    assert np.array_equal(play(again, observations, rewards), play(policy, observations, rewards))
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == [
        "config.json",
        "model.safetensors",
        "policy.json",
    ]


def test_a_policy_is_saved_with_its_own_target(tmp_path):
    for facts, target, wanted in (
        (PolicyFacts("Pendulum-v1", [3600.0, 1800.0]), 1800.0, [1800.0, 3600.0]),
        (PolicyFacts("Pendulum-v1", [3600.0, 1800.0]), 900.0, [900.0, 3600.0, 1800.0]),
        (None, -300.0, [-300.0]),
    ):
        Policy(make_model(), facts, target=target).save(tmp_path / "policy")
        again = Policy.load(tmp_path / "policy")
        assert again.target == target and again.facts.targets == wanted
    with pytest.raises(ValueError, match="target must be one number to be saved, got one for each of 2 environments"):
        Policy(make_model(), target=[1.0, 2.0]).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_compiled_policy_acts_alike(compilable):
    model, (observations, rewards) = make_model(), random_episode(9, 6)
    for mode in ("stream", "window"):
        policy = Policy(model, target=5.0, mode=mode)
        eager = play(policy, observations, rewards)
        policy.compile()
        assert_close(torch.from_numpy(play(policy, observations, rewards)), torch.from_numpy(eager), torch.float32)


@pytest.mark.slow
def test_every_compiled_policy_is_compiled(compilable, monkeypatch):
    """However many there are: Dynamo ends at eight graphs of a function, and then runs it as it is."""
    graphs, (observations, rewards) = [], random_episode(3, 6)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(1) or graph))
    for count in range(1, 6):
        policy = Policy(make_model(), target=5.0, mode="stream")
        policy.compile()
        play(policy, observations, rewards)
        assert len(graphs) == 2 * count  # without a state, and with one


@pytest.mark.parametrize("mode", ["window", "stream"])
def test_what_was_really_done_is_what_is_remembered(mode):
    """The model's own pass over an episode whose actions were halved; at a beginning they are not read."""
    model, (observations, rewards) = make_model("mingru"), random_episode(5, 6)
    policy, gave, did, reward = Policy(model, target=5.0, mode=mode), [], [], None
    for observation, after in zip(observations, rewards, strict=True):
        gave.append(policy.act(observation, reward, did[-1] if did else np.full(ACTIONS, np.nan)))
        did.append(gave[-1] / 2)
        reward = after
    assert_close(
        torch.from_numpy(np.stack(gave)), whole_pass(model, observations, rewards, np.stack(did), 5.0), torch.float32
    )
    own = play(policy, observations, rewards)
    assert np.abs(own[1:] - np.stack(gave)[1:]).max() > 1e-3
    for wrong in (np.zeros(ACTIONS + 1), np.zeros((2, ACTIONS)), np.full(ACTIONS, np.nan)):
        with pytest.raises(ValueError, match=r"Policy: previous_action must be finite numbers \(N, A\) = \(1, "):
            policy.act(observations[0], 0.0, wrong)


def test_the_target_that_was_given_may_be_changed():
    model, target, observations = make_model(), np.array([5.0, 6.0]), np.zeros((2, SIZE))
    policy = Policy(model, target=target)
    expected = policy.act(observations)
    target[:] = -500
    policy.reset()
    assert np.array_equal(policy.act(observations), expected)


def test_what_is_handed_out_may_be_changed():
    model, (observations, _) = make_model(), random_episode(3, 7)
    policy, untouched = (Policy(model, target=5.0, mode="stream") for _ in range(2))
    for t in range(3):
        action = policy.act(observations[t], 0.0)
        assert np.array_equal(action, untouched.act(observations[t], 0.0))
        action[:] = np.nan


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_constant_state_is_said(mixer):
    model = make_model(mixer)
    assert Policy(model, target=1.0, mode="window").constant_state
    assert Policy(model, target=1.0, mode="stream").constant_state == (mixer != "attention")


def started(count=2, **settings):
    policy = Policy(make_model(), **{"target": 1.0, "mode": "stream", **settings})
    policy.act(np.zeros((count, SIZE)))
    return policy


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda: Policy(make_model(), target=1.0, mode="both"), r"mode must be one of .* got 'both'"),
        (lambda: Policy(make_model()), "target must be a return to ask for, got none"),
        (lambda: Policy(make_model(), target=float("nan")), "target must be a finite number"),
        (lambda: started(target=[1.0, 2.0, 3.0]), "target must be one number or one for each of 2, got 3"),
        (lambda: started().act(np.zeros((2, 3)), np.zeros(2)), r"observation must be \(N, O\) .* O = 4, got \(2, 3\)"),
        (lambda: started().act(np.zeros((3, SIZE)), np.zeros(3)), "observation must be for 2 environments, got 3"),
        (lambda: started().act(np.zeros((2, SIZE))), "previous_reward must be given once an episode has begun"),
        (lambda: started().act(np.zeros((2, SIZE)), 1.0), r"previous_reward must be \(N,\) = \(2,\), got \(\)"),
        (lambda: started().act(np.zeros((2, SIZE)), np.array([0, np.nan])), "finite, got nan in environment 1"),
        (
            lambda: started().act(np.array([[0.0] * SIZE, [0, 0, np.inf, 0]]), np.zeros(2)),
            "observation must be finite, got inf at 2 in environment 1",
        ),
        (lambda: started().act(np.full((2, SIZE), 1e39), np.zeros(2)), "observation must be finite, got 1e.39 at 0"),
        (lambda: started().act(np.zeros((2, SIZE)), np.array([0, 1e39])), "finite, got 1e.39 in environment 1"),
        (lambda: Policy(make_model(), target=1e39), "target must be a finite number"),
        (lambda: started(0, mode="window"), r"observation must be \(N, O\) or .* got \(0, 4\)"),
        (lambda: (policy := started()).model.train() and policy.act(np.zeros((2, SIZE)), np.zeros(2)), "eval mode"),
        (lambda: started().reset(np.zeros(3, bool)), r"mask must be \(N,\) = \(2,\), got \(3,\)"),
        (lambda: started().reset(np.zeros(2)), "mask must be bool, got float64"),
        (lambda: Policy(make_model(), target=1.0).reset(np.ones(2, bool)), "mask must be None before the first call"),
    ],
)
def test_what_cannot_be_is_said(call, wanted):
    with pytest.raises((ValueError, TypeError), match=f"Policy: .*{wanted}"):
        call()


def test_nothing_is_remembered_of_a_call_that_is_refused():
    model, (observations, rewards) = make_model(), random_episode(6, 8)
    expected = play(Policy(model, target=5.0, mode="stream"), observations, rewards)
    policy, reward = Policy(model, target=5.0, mode="stream"), None
    with pytest.raises(ValueError, match=r"previous_reward must be \(N,\) = \(3,\), got \(2,\)"):
        policy.act(np.zeros((3, SIZE)), np.zeros(2))  # of which not even the number of environments is remembered
    for t in range(6):
        for bad in ((np.full(SIZE, np.nan), reward), (observations[t], np.zeros(7))):
            with pytest.raises(ValueError, match="Policy: "):
                policy.act(*bad)
        assert np.array_equal(policy.act(observations[t], reward), expected[t])
        reward = rewards[t]


def test_resets_add_up_and_leave_their_masks_alone():
    """Two calls before an action mean both; each mask stays its caller's."""
    policy, other, random = started(3), started(3), np.random.default_rng(0)
    masks = np.array([True, False, False]), np.array([False, False, True])
    for mask in masks:
        policy.reset(mask)
    other.reset(masks[0] | masks[1])
    for _ in range(2):
        observation, reward = random.normal(size=(3, SIZE)), random.normal(size=3)
        assert np.array_equal(policy.act(observation, reward), other.act(observation, reward))
    assert masks[0].tolist() == [True, False, False] and masks[1].tolist() == [False, False, True]


def test_the_reward_of_an_episode_that_ended_is_not_read():
    policy, other = started(), started()
    for each, reward in ((policy, np.nan), (other, 5.0)):
        each.reset(np.array([True, False]))
        each.given = each.act(np.ones((2, SIZE)), np.array([reward, 1.0]))
    assert np.array_equal(policy.given, other.given)


def test_a_directory_without_a_policy_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run must be a directory that holds config\.json"):
        Policy.load(tmp_path)
    Policy(make_model(), PolicyFacts(targets=[1.0])).save(tmp_path)
    for content, wanted in (
        ("{", "Expecting property name"),
        ('{"env": 3}', "env must be of type"),
        ('{"targets": ["high"]}', "returns must be finite numbers, got 'high'"),
        (json.dumps({"targets": [float("nan")]}), "returns must be finite numbers, got nan"),
    ):
        (tmp_path / "policy.json").write_text(content)
        with pytest.raises(ValueError, match=rf"load: .*policy\.json must be the facts of a policy, .*{wanted}"):
            Policy.load(tmp_path)
    (tmp_path / "policy.json").unlink()
    with pytest.raises(ValueError, match=r"run must be a directory that holds policy\.json"):
        Policy.load(tmp_path)
