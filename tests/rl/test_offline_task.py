"""Learning from episodes: which windows are drawn, what counts in the loss, and what is refused."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from offline_toys import ACTIONS, SIZE, make_backbone, make_episodes, make_model, save_episodes

from conftest import assert_close
from minrnn.models import BackboneConfig
from minrnn.rl import OfflineConfig, OfflineTask, Trajectory
from minrnn.rl.episodes import concatenate
from minrnn.rl.task import action_bounds, checksum, locate
from minrnn.train import RunConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 6


def make_task(episodes=None, **settings):
    config = OfflineConfig(**{"data": "made", "context": CONTEXT, "batch_size": 32, "return_scale": 10.0, **settings})
    return OfflineTask(config, episodes or make_episodes())


def rows(windows):
    """What each window holds of the steps that are there, as plain lists of arrays."""
    for b in range(len(windows.there)):
        size = int(windows.there[b].sum())
        assert windows.there[b, :size].all()
        yield size, [each[b].numpy() for each in (*windows.trajectory, windows.actions)]


def test_windows_are_pieces_of_episodes():
    task = make_task()
    data = task.episodes
    sizes = set()
    for step in range(20):
        for size, (wanted, observations, previous, times, actions) in rows(task.batch(0, step)):
            begin = times[0]
            (episode,) = (
                e
                for e in range(len(data.lengths))
                if begin < data.lengths[e]
                and np.array_equal(data.observations[data.starts[e] + begin], observations[0])
            )
            first, end = data.starts[episode] + begin, data.starts[episode] + data.lengths[episode]
            assert episode in task.train and size == min(CONTEXT, end - first)
            assert np.array_equal(times, begin + np.arange(CONTEXT))
            assert np.array_equal(observations[:size], data.observations[first : first + size])
            assert np.array_equal(actions[:size], data.actions[first : first + size])
            assert np.array_equal(previous[1:size], data.actions[first : first + size - 1])
            for t in range(size):
                assert wanted[t] == pytest.approx(data.rewards[first + t : end].astype(float).sum(), abs=1e-5)
            for each in (wanted, observations, actions):
                assert (each[size:] == 0).all()
            sizes.add(size)
    assert sizes == set(range(1, CONTEXT + 1))


def test_a_batch_follows_from_seed_and_step():
    task, again = make_task(), make_task()
    for a, b in zip(task.batch(3, 7).trajectory, again.batch(3, 7).trajectory, strict=True):
        assert torch.equal(a, b)
    drawn = {float(task.batch(seed, step).trajectory.observations[0, 0, 0]) for seed in range(2) for step in range(5)}
    assert len(drawn) > 5


def test_every_training_step_begins_a_window_equally_often():
    task = make_task(batch_size=1000)
    counts = np.zeros(len(task.episodes.rewards))
    place = {each.tobytes(): row for row, each in enumerate(task.episodes.observations)}
    for step in range(20):
        for each in task.batch(0, step).trajectory.observations[:, 0].numpy():
            counts[place[each.tobytes()]] += 1
    trained = np.zeros(len(counts), bool)
    for episode in task.train:
        first = task.episodes.starts[episode]
        trained[first : first + task.episodes.lengths[episode]] = True
    assert (counts[~trained] == 0).all() and not trained.all()
    expected = 20_000 / trained.sum()
    assert ((counts[trained] - expected) ** 2 / expected).sum() < 2 * trained.sum()  # chi-squared, mean trained.sum()
    assert (np.abs(counts[trained] - expected) < 6 * expected**0.5).all()


def test_what_is_held_out_is_fixed():
    episodes = make_episodes(lengths=[5] * 100)
    task = make_task(episodes)
    assert len(task.held_out) == 5 and len(set(task.held_out) | set(task.train)) == 100
    assert not set(task.held_out) & set(task.train)
    assert np.array_equal(make_task(episodes, batch_size=3).held_out, task.held_out)
    assert task.held_out.tolist() != [0, 1, 2, 3, 4]
    assert len(make_task(make_episodes(lengths=[3, 3])).held_out) == 1


def test_the_loss_is_that_of_the_steps_that_are_there():
    task = make_task()
    model = task.make_model(make_backbone("mingru")).double().eval()
    batch = task.batch(0, 0)
    errors = []
    for (size, (wanted, observations, previous, times, actions)), _ in zip(rows(batch), range(99), strict=False):
        each = (wanted, observations, previous, times)
        alone, _ = model(Trajectory(*(torch.from_numpy(part[:size])[None] for part in each)))
        errors += ((alone[0].detach().numpy() - actions[:size]) ** 2).ravel().tolist()
    assert task.loss(model, batch).item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert len(errors) < CONTEXT * 32 * ACTIONS
    spoiled = batch.actions.clone()
    spoiled[~batch.there] = float("nan")
    assert task.loss(model, batch._replace(actions=spoiled)) == task.loss(model, batch)


@pytest.mark.parametrize("mixer", ["attention", "s4", "mamba"])
def test_padding_changes_no_gradient(mixer):
    task = make_task()
    model, batch = task.make_model(make_backbone(mixer)).double().eval(), task.batch(0, 0)
    found = []
    for filling in (0.0, 7.0):
        filled = [
            each.where(batch.there if each.dim() == 2 else batch.there[..., None], filling)
            for each in batch.trajectory[:3]
        ]
        loss = task.loss(model, batch._replace(trajectory=Trajectory(*filled, batch.trajectory.timesteps)))
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert a is b is None or assert_close(a, b, torch.float64) is None


def test_held_out_is_every_step_once():
    task = make_task(make_episodes(lengths=[13, 6, 1, 20] * 10))
    model = task.make_model(make_backbone("minlstm")).double().eval()
    data, errors = task.episodes, []
    for episode in task.held_out:
        end = data.starts[episode] + data.lengths[episode]
        for begin in range(0, data.lengths[episode], CONTEXT):
            part = slice(data.starts[episode] + begin, min(data.starts[episode] + begin + CONTEXT, end))
            actions = torch.from_numpy(data.actions[part])
            size = len(actions)
            with torch.no_grad():
                found, _ = model(
                    Trajectory(
                        torch.tensor([[data.rewards[t:end].sum() for t in range(part.start, part.stop)]]),
                        torch.from_numpy(data.observations[part])[None],
                        torch.cat([torch.zeros(1, ACTIONS), actions[:-1]])[None],
                        torch.arange(begin, begin + size)[None],
                    )
                )
            errors += (found[0] - actions).square().flatten().tolist()
    assert len(errors) == ACTIONS * data.lengths[task.held_out].sum()
    assert task.evaluate(model) == {"held_out": pytest.approx(np.mean(errors), rel=1e-5)}


def test_what_lies_on_disk_gives_the_same(tmp_path):
    memory = make_episodes()
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        on_disk = {name: file.create_dataset(name, data=getattr(memory, name)) for name in ("observations", "actions")}
        task, other = make_task(memory), make_task(dataclasses.replace(memory, **on_disk))
        for a, b in zip(task.batch(0, 1).trajectory, other.batch(0, 1).trajectory, strict=True):
            assert torch.equal(a, b)
        models = [each.make_model(make_backbone("mingru")).eval() for each in (task, other)]
        assert all(torch.equal(a, b) for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True))


def test_a_model_knows_the_scales_of_its_data():
    episodes = make_episodes()
    model = make_task(episodes).make_model(make_backbone("mingru"))
    assert_close(model.mean, torch.from_numpy(episodes.observations.mean(0)), torch.float32)
    assert_close(model.std, torch.from_numpy(episodes.observations.std(0)), torch.float32)
    assert model.middle.tolist() == [0, 0] and model.reach.tolist() == [1, 1]
    assert (model.config.context, model.config.return_scale) == (CONTEXT, 10.0)


def test_actions_beyond_one_give_their_own_bounds():
    episodes = make_episodes()
    wide = dataclasses.replace(episodes, actions=episodes.actions * np.float32([3, 0.1]) + np.float32([1, 0]))
    low, high = action_bounds(wide)
    assert np.array_equal(low, wide.actions.min(0)) and np.array_equal(high, wide.actions.max(0))
    model = make_task(wide).make_model(make_backbone("mingru"))
    torch.nn.init.normal_(model.head.weight, std=1e4)
    actions, _ = model.eval()(make_task(wide).batch(0, 0).trajectory)
    assert_close(actions.amin((0, 1)), torch.from_numpy(low), torch.float32)
    assert_close(actions.amax((0, 1)), torch.from_numpy(high), torch.float32)


def test_targets_are_the_highest_return_unless_given():
    episodes = make_episodes()
    highest = max(
        episodes.rewards[first : first + length].sum()
        for first, length in zip(episodes.starts, episodes.lengths, strict=True)
    )
    assert make_task(episodes).targets == [pytest.approx(highest, rel=1e-5)]
    assert make_task(episodes, targets=[7.0, 8.0]).targets == [7.0, 8.0]


def test_changed_data_are_told():
    episodes = make_episodes()
    good = checksum(episodes)
    make_task(episodes, sha256=good)
    rewards = episodes.rewards.copy()
    rewards[3] += 1
    for changed in (
        dataclasses.replace(episodes, rewards=rewards),
        dataclasses.replace(episodes, lengths=episodes.lengths[::-1].copy()),
        dataclasses.replace(episodes, terminated=~episodes.terminated),
    ):
        with pytest.raises(ValueError, match=r"data: made must have SHA-256 .* over rewards and lengths"):
            make_task(changed, sha256=good)


def test_no_episode_is_held_out_and_learned_from():
    """Two of what is joined may have it."""
    once = make_episodes()
    twice = concatenate([once, once])
    task = OfflineTask(OfflineConfig("x"), twice)
    count = len(once.lengths)
    assert not {each % count for each in task.held_out} & {each % count for each in task.train}
    assert len(task.train) == len(twice.lengths) - 2 * len(task.held_out)
    with pytest.raises(ValueError, match="at least 2 different episodes, got 2 that are alike"):
        OfflineTask(OfflineConfig("x"), concatenate([make_episodes((5,)), make_episodes((5,))]))


def test_the_loss_of_float64_is_float64():
    task = OfflineTask(OfflineConfig("x", context=5, batch_size=4), make_episodes())
    model = make_model("mingru").double()
    batch = task.batch(0, 0)
    trajectory = Trajectory(*(each.double() if each.is_floating_point() else each for each in batch.trajectory))
    assert task.loss(model, batch._replace(trajectory=trajectory)).dtype == torch.float64


def test_one_episode_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"data: made must have at least 2 episodes, one of them to hold out, got 1"):
        make_task(make_episodes(lengths=[9]))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("data", "", "data must name logged episodes"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("context", 0, "context must be at least 1"),
        ("return_scale", -1.0, "return_scale must be above 0"),
        ("layout", "left", "layout must be one of"),
        ("targets", [float("inf")], "targets must be finite"),
        ("targets", ["high"], "targets must be finite"),
    ],
)
def test_the_config_is_checked(field, value, wanted):
    with pytest.raises(ValueError, match=rf"\w+: {wanted}"):
        OfflineConfig(**{"data": "x", field: value})


def test_names_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("medium.hdf5", "expert.hdf5"):
        (tmp_path / name).touch()
    config = OfflineConfig(data="medium.hdf5 + expert.hdf5")
    assert config.name == "medium+expert"
    assert locate(config.data) == f"{tmp_path}/medium.hdf5+{tmp_path}/expert.hdf5"
    assert locate("minrnn/Hopper-v5/medium-v0") == "minrnn/Hopper-v5/medium-v0"
    assert OfflineConfig(data="minrnn/Hopper-v5/medium-v0").name == "Hopper-v5-medium-v0"
    save_episodes(make_episodes(), tmp_path / "a+b")
    assert locate("a+b") == f"{tmp_path}/a+b"
    assert OfflineTask(OfflineConfig(data="a+b")).sha256 == checksum(make_episodes())


def test_an_offline_run_is_a_flat_table():
    config = RunConfig.from_dict({"task": "offline", "data": "x", "mixer": "attention", "layers": 5})
    assert isinstance(config.task, OfflineConfig) and config.kind == "offline"
    assert (config.backbone.mlp_kind, config.backbone.mixer_options["positions"]) == ("relu", "none")
    assert (config.backbone.layers, config.backbone.width, config.train.clip) == (5, 128, 0.25)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict({"task": "offline", "data": "x", "mixer": "s4"}).task.layout == "concatenated"
    assert RunConfig.from_dict({}).kind == RunConfig().kind == "text"
    with pytest.raises(ValueError, match="fields must be known, got tokens"):
        RunConfig.from_dict({"task": "offline", "data": "x", "tokens": "chars"})
    with pytest.raises(ValueError, match="task must be one of text, offline, got 'online'"):
        RunConfig.from_dict({"task": "online"})


def test_a_given_mixer_option_leaves_the_usual_others():
    given = {"task": "offline", "data": "x", "mixer": "attention", "mixer_options": {"dropout": 0.0}}
    config = RunConfig.from_dict(given)
    assert config.backbone.mixer_options == {"heads": 1, "positions": "none", "dropout": 0.0, "bias": True}
    bare = RunConfig(OfflineConfig(data="x"), BackboneConfig(mixer="attention", mixer_options={"heads": 2}))
    assert RunConfig.from_dict(bare.to_dict()) == bare  # whose other options are the mixer's own defaults


def test_a_wrong_size_is_told_by_the_model():
    model = make_model(size=SIZE + 1)
    with pytest.raises(ValueError, match=r"DecisionModel: observations must be \(B, T, O\)"):
        make_task().loss(model, make_task().batch(0, 0))
