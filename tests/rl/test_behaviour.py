"""Behaviour policies: against stable-baselines3's own forward pass, and episodes that follow from numbers alone."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from conftest import assert_close
from minrnn.rl import digests, ppo
from minrnn.rl.behaviour import GRID, LARGEST, Behaviour, Digest, load_behaviour, roll
from minrnn.rl.collect import SHIPPED, STEPS, CollectConfig
from minrnn.rl.environments import make_env


def policy(seed=0, hidden=8, activation="tanh", sizes=(11, 3), **facts) -> Behaviour:
    draw = np.random.default_rng(seed)
    widths = (sizes[0], hidden, hidden, sizes[1])
    layers = tuple(
        (draw.normal(size=(b, a)).astype(np.float32) / np.float32(np.sqrt(a)), draw.normal(size=b).astype(np.float32))
        for a, b in pairwise(widths)
    )
    mean, scale = draw.normal(size=sizes[0]), draw.uniform(0.5, 2, sizes[0])
    facts = {"env": "Hopper-v5", "steps": seed, **facts}
    return Behaviour(mean, scale, 10.0, layers, activation, np.full(sizes[1], -1, np.float32), facts)


@pytest.mark.parametrize(("activation", "module"), [("tanh", torch.nn.Tanh), ("relu", torch.nn.ReLU)])
def test_the_forward_pass_is_that_of_stable_baselines3(activation, module):
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    torch.set_num_threads(1)
    envs = VecNormalize(DummyVecEnv([lambda: make_env("Hopper-v5")] * 2))
    options = {"net_arch": [16, 16], "activation_fn": module, "log_std_init": -0.5}
    model = PPO("MlpPolicy", envs, policy_kwargs=options, seed=0, device="cpu", n_steps=64, batch_size=64)
    envs.seed(0)
    model.learn(256)
    ours = ppo.behaviour_of(model, envs, activation, {})
    observations = np.random.default_rng(0).normal(0, 5, (50, 11))
    observations[0] *= 1e4  # clipped
    normal = envs.normalize_obs(observations)
    theirs, _ = model.predict(normal, deterministic=True)
    mine = np.clip([ours.mean_action(each) for each in observations], -1, 1)
    assert_close(torch.from_numpy(mine), torch.from_numpy(theirs), torch.float32)
    with torch.no_grad():
        spread = model.policy.get_distribution(torch.from_numpy(normal).float()).distribution
    noise = np.random.default_rng(1).normal(size=(50, 3))
    drawn = np.array([ours.act(o, n) for o, n in zip(observations, noise, strict=True)])
    wanted = spread.mean + spread.stddev * torch.from_numpy(noise)
    assert_close(torch.from_numpy(drawn), wanted, torch.float32)


def test_a_snapshot_comes_back_as_it_was_and_any_reader_of_safetensors_sees_it(tmp_path):
    before = policy(7, note="x")
    before.save(tmp_path / "a.safetensors")
    after = load_behaviour(tmp_path / "a.safetensors")
    assert after.facts == before.facts
    assert (after.clip, after.activation) == (10.0, "tanh")
    observation = np.arange(11.0)
    np.testing.assert_array_equal(after.act(observation, np.ones(3)), before.act(observation, np.ones(3)))
    tensors = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(tensors["layers.2.weight"], before.layers[2][0])


def test_a_snapshot_is_small_or_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=f"at most {LARGEST} bytes, got"):
        policy(hidden=600).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_no_snapshot_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    policy().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.safetensors must be a snapshot of a behaviour policy"):
        load_behaviour(path)
    safetensors.numpy.save_file({"mean": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"a.safetensors must be a snapshot of a behaviour policy"):
        load_behaviour(path)
    with pytest.raises(ValueError, match=r"b.safetensors must be a snapshot"):
        load_behaviour(tmp_path / "b.safetensors")


def test_bad_numbers_and_shapes_are_named():
    good = policy()
    parts = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(ValueError, match="activation must be one of tanh, relu, got 'elu'"):
        Behaviour(**{**parts, "activation": "elu"})
    with pytest.raises(ValueError, match=r"scale must have shape \(11,\), got \(10,\)"):
        Behaviour(**{**parts, "scale": np.ones(10)})
    with pytest.raises(ValueError, match=r"log_std must have shape \(3,\), got \(2,\)"):
        Behaviour(**{**parts, "log_std": np.ones(2)})
    with pytest.raises(ValueError, match="log_std must be finite"):
        Behaviour(**{**parts, "log_std": np.full(3, np.nan)})
    with pytest.raises(ValueError, match="at least one, got none"):
        Behaviour(**{**parts, "layers": ()})


@pytest.fixture(scope="module")
def env():
    with make_env("Hopper-v5") as env:
        yield env


def same(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_episode_follows_from_its_numbers_alone(env):
    episode = roll(env, policy(), 3, 1, 5)
    roll(env, policy(), 3, 1, 6)
    assert same(roll(env, policy(), 3, 1, 5), episode)
    for other in ((4, 1, 5), (3, 2, 5), (3, 1, 6)):
        assert not same(roll(env, policy(), *other), episode)
    with make_env("Hopper-v5") as fresh:
        assert same(roll(fresh, policy(), 3, 1, 5), episode)


@pytest.mark.parametrize("who", ["policy", "random"])
def test_gymnasium_gives_the_same_episode_for_the_same_actions(env, who):
    rolled = roll(env, policy() if who == "policy" else None, 0, 0, 0)
    with make_env("Hopper-v5", disable_env_checker=False) as fresh:
        observation, _ = fresh.reset(seed=int(rolled.seed))
        for number, action in enumerate(rolled.actions):
            np.testing.assert_array_equal(observation, rolled.observations[number])
            observation, reward, terminated, truncated, _ = fresh.step(action)
            assert reward == rolled.rewards[number]
        assert terminated or truncated
    assert terminated == rolled.terminated
    np.testing.assert_array_equal(observation, rolled.observations[-1])


def test_actions_are_on_the_grid_and_allowed(env):
    loud = policy(hidden=32)
    actions = np.concatenate([roll(env, loud, 0, 0, each).actions for each in range(5)])
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions * GRID, np.rint(actions * GRID))
    assert np.abs(actions).max() == 1
    assert len(np.unique(actions)) > 10


def test_the_last_bits_of_a_product_do_not_reach_the_simulator(env):
    """Another build of BLAS adds up in another order: as if the mean action were off by some 1e-15."""

    class Elsewhere(Behaviour):
        def mean_action(self, observation):
            return super().mean_action(observation) * (1 + 1e-14) - 1e-15

    here = policy()
    elsewhere = Elsewhere(**{name: getattr(here, name) for name in here.__dataclass_fields__})
    for episode in range(5):
        assert same(roll(env, here, 0, 0, episode), roll(env, elsewhere, 0, 0, episode))


def digest(*episodes) -> str:
    result = Digest()
    for each in episodes:
        result.add(each)
    return str(result)


def test_the_digest_sees_every_number_and_the_order(env):
    first, second = (roll(env, policy(), 0, 0, each) for each in range(2))
    whole = digest(first, second)
    assert whole == digest(first, second)
    assert whole != digest(second, first)
    assert whole != digest(first)
    for name in first._fields:
        changed = getattr(first, name).copy()
        changed[...] = (
            ~changed
            if name == "terminated"
            else np.where(np.arange(changed.size) == 0, 7, changed.ravel()).reshape(changed.shape)
        )
        assert digest(first._replace(**{name: changed}), second) != whole


SETS = [folder for folder in sorted(SHIPPED.iterdir()) if folder.is_dir()] if SHIPPED.is_dir() else []


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_the_policies_that_come_with_minrnn_are_whole_and_small(folder):
    found = ppo.snapshots(folder)
    files = {path.name for path in folder.iterdir()}
    assert files == {path.name for path, _ in found} | {ppo.INDEX, digests.FILE}
    assert 2 <= len(found) <= ppo.KEPT
    assert all(path.stat().st_size <= LARGEST for path, _ in found)
    steps = [each.facts["steps"] for _, each in found]
    assert steps == sorted(steps)
    with make_env(folder.name) as env:
        for _, each in found:
            assert each.facts["env"] == folder.name
            assert (len(each.mean), len(each.log_std)) == (env.observation_space.shape[0], env.action_space.shape[0])
    assert found[-1][1].facts["return"] >= ppo.wanted_return(folder.name)
    known = json.loads((folder / digests.FILE).read_bytes())
    for quality in STEPS:
        config = CollectConfig(folder.name, quality)
        assert f"{quality}, {config.steps} steps, seed 0" in known


def test_there_are_policies_for_three_environments_and_they_are_small_together():
    assert [folder.name for folder in SETS] == ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.*")) < 4 << 20


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    def index(entries) -> Path:
        (tmp_path / ppo.INDEX).write_text(json.dumps({"snapshots": entries}))
        return tmp_path

    assert ppo.snapshots(tmp_path) == []
    policy().save(tmp_path / "a.safetensors")
    good = {"file": "a.safetensors", "sha256": ppo.sha256(tmp_path / "a.safetensors")}
    assert [path.name for path, _ in ppo.snapshots(index([good]))] == ["a.safetensors"]
    with pytest.raises(ValueError, match=r"b.safetensors must be there, because behaviours.json names it"):
        ppo.snapshots(index([good, {**good, "file": "b.safetensors"}]))
    policy(1).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors must have SHA-256 .*, as behaviours.json says, got"):
        ppo.snapshots(index([good]))
    (tmp_path / ppo.INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"behaviours.json must list snapshots, got: JSONDecodeError"):
        ppo.snapshots(tmp_path)
