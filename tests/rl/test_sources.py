"""The readers, against files written by hand with h5py and NumPy, and against Minari's own writer and reader."""

import os
import tempfile
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from conftest import assert_close
from minrnn.rl import episodes as module
from minrnn.rl import load_episodes, sources

LENGTHS = (7, 1, 4)
SIZE, ACTIONS = 3, 2


def log(lengths=LENGTHS, seed=0):
    """Episodes as lists of (observations (T + 1, O), actions (T, A), rewards (T,))."""
    draw = np.random.default_rng(seed)
    return [
        (draw.normal(size=(length + 1, SIZE)), draw.normal(size=(length, ACTIONS)), draw.normal(size=length))
        for length in lengths
    ]


def write_d4rl(path, episodes, ended, tail=0, **changes):
    """D4RL's -v2 layout: steps end to end, the last observation of an episode left out."""
    steps = sum(len(rewards) for *_, rewards in episodes)
    stops = np.cumsum([len(rewards) for *_, rewards in episodes]) - 1
    terminals, timeouts = np.zeros((2, steps + tail), bool)
    terminals[stops] = ended
    timeouts[stops] = ~np.asarray(ended)
    fields = {
        "observations": np.concatenate([o[:-1] for o, *_ in episodes] + [np.ones((tail, SIZE))]).astype(np.float32),
        "actions": np.concatenate([a for _, a, _ in episodes] + [np.ones((tail, ACTIONS))]).astype(np.float32),
        "rewards": np.concatenate([r for *_, r in episodes] + [np.ones(tail)]).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, field in fields.items():
            if field is not None:
                file.create_dataset(name, data=field, compression="gzip")
        file["infos/qpos"] = np.zeros(3)
    return path


def write_folder(folder, episodes, ended):
    folder.mkdir(exist_ok=True)
    for number, ((observations, actions, rewards), end) in enumerate(zip(episodes, ended, strict=True)):
        path = folder / f"{number:04}.npz"
        np.savez_compressed(path, observations=observations, actions=actions, rewards=rewards, terminated=end)
    return folder


def write_minari(root, name, episodes, ended, monkeypatch, action_space=None):
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    buffers = [
        EpisodeBuffer(
            observations=list(observations),
            actions=list(actions),
            rewards=list(rewards),
            terminations=[False] * (len(rewards) - 1) + [bool(end)],
            truncations=[False] * (len(rewards) - 1) + [not end],
            infos={},
        )
        for (observations, actions, rewards), end in zip(episodes, ended, strict=True)
    ]
    box = Box(-np.inf, np.inf, (SIZE,), np.float64)
    space = action_space or Box(-np.inf, np.inf, (ACTIONS,), np.float64)
    return minari.create_dataset_from_buffers(name, buffers, observation_space=box, action_space=space)


ENDED = (True, False, True)


@pytest.fixture(params=["d4rl", "minari", "named", "npz"])
def source(request, tmp_path, monkeypatch):
    if request.param == "d4rl":
        return str(write_d4rl(tmp_path / "log.hdf5", log(), ENDED, tail=3))
    if request.param == "npz":
        return str(write_folder(tmp_path / "log", log(), ENDED))
    write_minari(tmp_path, "toy/walk-v0", log(), ENDED, monkeypatch)
    return str(tmp_path / "toy" / "walk-v0") if request.param == "minari" else "toy/walk-v0"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("memory", [1 << 40, 1], ids=["in memory", "on disk"])
def test_every_source_gives_the_episodes_that_were_written(source, memory, monkeypatch):
    monkeypatch.setattr(sources, "available_memory", lambda: memory)
    episodes = load_episodes(source)
    kind = np.memmap if memory == 1 else np.ndarray
    assert type(episodes.observations) is type(episodes.actions) is kind
    assert list(episodes.lengths) == list(LENGTHS)
    assert list(episodes.terminated) == list(ENDED)
    assert (episodes.observation_size, episodes.action_size) == (SIZE, ACTIONS)
    for start, (observations, actions, rewards) in zip(episodes.starts, log(), strict=True):
        rows = slice(start, start + len(rewards))
        np.testing.assert_array_equal(episodes.observations[rows], observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(episodes.actions[rows], actions.astype(np.float32))
        np.testing.assert_array_equal(episodes.rewards[rows], rewards.astype(np.float32))
    mean, std = episodes.statistics()
    seen = np.concatenate([o[:-1] for o, *_ in log()])
    assert_close(torch.from_numpy(mean), torch.from_numpy(seen.mean(0)), torch.float32)
    assert_close(torch.from_numpy(std), torch.from_numpy(seen.std(0)), torch.float32)


def test_half_of_the_memory_is_the_limit(tmp_path, monkeypatch):
    path = write_d4rl(tmp_path / "log.hdf5", log(), ENDED)
    size = 4 * sum(LENGTHS) * (SIZE + ACTIONS)
    monkeypatch.setattr(sources, "available_memory", lambda: 2 * size)
    assert type(load_episodes(path).observations) is np.ndarray
    monkeypatch.setattr(sources, "available_memory", lambda: 2 * size - 1)
    assert type(load_episodes(path).observations) is np.memmap


def test_what_is_on_disk_is_read_in_blocks_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "available_memory", lambda: 1)
    monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write_d4rl(tmp_path / "log.hdf5", log(), ENDED)
    episodes = load_episodes(path)
    path.unlink()
    wanted = np.concatenate([o[:-1] for o, *_ in log()]).astype(np.float32)
    np.testing.assert_array_equal(episodes.observations[:], wanted)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    @contextmanager
    def full(dir):
        with open("/dev/full", "wb") as file:
            yield file

    monkeypatch.setattr(sources, "available_memory", lambda: 1)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    refuses(
        write_d4rl(tmp_path / "log.hdf5", log(), ENDED),
        r"144 bytes must fit into .* \(TMPDIR may name another directory\), got: .*No space left on device",
    )


def test_available_memory_is_a_number_of_this_machine():
    assert 1 << 20 < sources.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("controllers", "root", "names"),
    [
        ("", "", ("memory.max", "memory.current", "inactive_file")),
        ("cpuset,memory", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
    ids=["version 2", "version 1"],
)
def test_limits_of_control_groups_are_seen_up_to_the_root(tmp_path, controllers, root, names):
    def group(path, most, used, files):
        folder = tmp_path / root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{most}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {files}\nfile 9\n")

    group("job", 1000, 600, 50)
    group("job/step", "max", 300, 0)
    group("job/step/task", 500, 200, 10)
    assert list(sources._left_in_groups(controllers, "/job/step/task", tmp_path)) == [310, 450]
    assert list(sources._left_in_groups(controllers, "/not/seen/here", tmp_path)) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_field_of_minari_stays_open(tmp_path, monkeypatch):
    """HDF5 keeps what it has decompressed of each open field, all together the whole file."""
    write_minari(tmp_path, "walk-v0", log(), ENDED, monkeypatch)
    with ExitStack() as files:
        found = sources._read_minari(str(tmp_path / "walk-v0"), files)
        assert [found.actions[e][0:2].shape for e in range(3)] == [(2, ACTIONS), (1, ACTIONS), (2, ACTIONS)]
        assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_DATASET) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minaris_own_reader_sees_the_same(tmp_path, monkeypatch):
    dataset = write_minari(tmp_path, "walk-v0", log(seed=3), ENDED, monkeypatch)
    episodes = load_episodes("walk-v0")
    for start, theirs in zip(episodes.starts, dataset.iterate_episodes(), strict=True):
        rows = slice(start, start + len(theirs.rewards))
        np.testing.assert_array_equal(episodes.observations[rows], theirs.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(episodes.actions[rows], theirs.actions.astype(np.float32))
        np.testing.assert_array_equal(episodes.rewards[rows], theirs.rewards.astype(np.float32))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_episodes_come_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    write_minari(tmp_path, "walk-v0", log(range(1, 13)), [True] * 12, monkeypatch)
    assert list(load_episodes("walk-v0").lengths) == list(range(1, 13))  # by name, episode_10 comes before episode_2


@pytest.mark.parametrize("memory", [1 << 40, 1], ids=["in memory", "on disk"])
def test_sources_joined_by_a_plus_follow_each_other(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(sources, "available_memory", lambda: memory)
    medium = write_d4rl(tmp_path / "medium.hdf5", log(), ENDED)
    expert = write_folder(tmp_path / "expert", log((9, 2), seed=1), (False, False))
    both = load_episodes(f"{medium} + {expert}")
    assert list(both.lengths) == [*LENGTHS, 9, 2]
    np.testing.assert_array_equal(both.observations[:12], load_episodes(medium).observations[:12])
    np.testing.assert_array_equal(both.actions[12:23], load_episodes(expert).actions[0:11])


def test_data_are_not_joined_with_themselves(tmp_path):
    path = write_d4rl(tmp_path / "medium.hdf5", log(), ENDED)
    with pytest.raises(ValueError, match=r"load_episodes: .* must be different data, got the same twice"):
        load_episodes(f"{path}+{tmp_path / 'x' / '..' / 'medium.hdf5'}")


def test_a_path_with_a_plus_is_a_path(tmp_path):
    path = write_d4rl(tmp_path / "a+b.hdf5", log(), ENDED)
    assert len(load_episodes(path).lengths) == 3
    folder = tmp_path / "x+y"
    folder.mkdir()
    other = write_d4rl(folder / "b.hdf5", log(), ENDED)
    assert sources.split(f"{path} + {other}+c") == [str(path), str(other), "c"]
    assert len(load_episodes(f"{other}+{path}").lengths) == 6


def test_a_terminal_wins_over_a_timeout_at_the_same_step(tmp_path):
    ends = np.zeros(12, bool)
    ends[[6, 7, 11]] = True
    path = write_d4rl(tmp_path / "log.hdf5", log(), ENDED, terminals=ends, timeouts=ends)
    assert list(load_episodes(path).terminated) == [True, True, True]


def test_flags_per_step_count_by_the_last(tmp_path):
    folder = write_folder(tmp_path / "log", log(), (np.zeros(7, bool), np.ones(1), np.array([0, 0, 0, 1])))
    assert list(load_episodes(folder).terminated) == [False, True, True]


def test_observations_without_the_last_one_do_in_a_folder(tmp_path):
    folder = write_folder(tmp_path / "log", [(o[:-1], a, r) for o, a, r in log()], ENDED)
    np.testing.assert_array_equal(load_episodes(folder).observations[0:7], log()[0][0][:-1].astype(np.float32))


def refuses(source, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_episodes(source)
    assert str(source).partition(" + ")[0] in str(caught.value)


def test_nothing_there(tmp_path):
    refuses(tmp_path / "log.hdf5", "must be an existing .hdf5 file or directory.*no such file")
    refuses("gone", "must be an existing .hdf5 file or directory.*no such file")
    refuses(tmp_path, "must be a directory of Minari .* or hold .npz files, got neither")
    for empty in ("", f"{tmp_path}+", f"+{tmp_path}"):  # as of a variable that is not set, not the working directory
        with pytest.raises(ValueError, match=r"source must name data, on both sides of a \+, got"):
            load_episodes(empty)
    (tmp_path / "log.txt").write_text("steps")
    refuses(tmp_path / "log.txt", "must be an .hdf5 file or a directory, got a .txt file")


def test_a_dataset_that_is_not_here_and_cannot_be_downloaded(tmp_path, monkeypatch):
    """Also where a directory of its name holds others."""
    import minari

    def offline(name, download):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(minari, "load_dataset", offline)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "mujoco" / "hopper" / "medium-v0" / "other-v0" / "data").mkdir(parents=True)
    refuses("mujoco/hopper/medium-v0", "a Minari dataset that is here or can be downloaded, .*no route to host")


def test_a_dataset_whose_download_was_cut_off_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "full" / "half-v0" / "data").mkdir(parents=True)
    wanted = rf"must be a whole Minari dataset, got '{tmp_path}/full/half-v0': .* removing that directory lets it begin"
    refuses("full/half-v0", wanted)


def test_minaris_other_storages_are_named(tmp_path, monkeypatch):
    import minari

    found = SimpleNamespace(storage=SimpleNamespace(data_path=tmp_path, FORMAT="arrow"))
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: found)
    refuses("mujoco/hopper/medium-v0", "mujoco/hopper/medium-v0: must be stored as HDF5, got arrow")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_half_downloaded_hdf5(tmp_path, share):
    path = write_d4rl(tmp_path / "log.hdf5", log((300, 400)), (True, True))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuses(path, "log.hdf5: must be a whole HDF5 file, got one that is torn")


def test_a_web_page_instead_of_hdf5(tmp_path):
    (tmp_path / "log.hdf5").write_text("<html>403 Forbidden</html>")
    refuses(tmp_path / "log.hdf5", "must be a whole HDF5 file")


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals", "timeouts"])
def test_a_missing_field_is_named(tmp_path, name):
    path = write_d4rl(tmp_path / "log.hdf5", log(), ENDED, **{name: None})
    refuses(path, f"log.hdf5: {name} must be there, got only .*infos")


def test_fields_of_other_lengths_and_shapes(tmp_path):
    path = write_d4rl(tmp_path / "log.hdf5", log(), ENDED, rewards=np.zeros(11))
    refuses(path, "rewards must have 12 rows, as observations have, got 11")
    write_d4rl(path, log(), ENDED, actions=np.zeros(12, np.int64))
    refuses(path, r"actions must be \(steps, size\) of floats, as of a Box space, got int64 of shape \(12,\)")
    write_d4rl(path, log(), ENDED, actions=np.zeros((12, 1), np.int64))
    refuses(path, "actions must be .* got int64")
    write_d4rl(path, log(), ENDED, terminals=np.zeros(12), timeouts=np.zeros(12))
    refuses(path, "terminals or timeouts must end at least one episode, got none in 12 steps")
    write_d4rl(path, log(), ENDED, timeouts=np.ones(11))
    refuses(path, "timeouts must have 12 flags for 12 rewards, got 11")
    write_d4rl(path, log(), ENDED, terminals=np.array([0.0, np.nan] * 6))
    refuses(path, "terminals must be flags, got nan at step 1")


def test_numbers_that_are_not_finite_are_named_by_file_and_episode(tmp_path, monkeypatch):
    bad = log()
    bad[2][0][1, 2] = np.nan
    words = r"observations must be finite, got nan at step 1 of episode 2, column 2"
    refuses(write_d4rl(tmp_path / "log.hdf5", bad, ENDED), f"log.hdf5: {words}")
    refuses(write_folder(tmp_path / "log", bad, ENDED), words)
    monkeypatch.setattr(sources, "available_memory", lambda: 1)
    refuses(tmp_path / "log", words)
    monkeypatch.undo()
    write_d4rl(tmp_path / "log.hdf5", log(), ENDED, actions=np.full((12, 2), 1e300))
    refuses(tmp_path / "log.hdf5", "actions must be finite, got inf at step 0 of episode 0")


def test_an_episode_of_length_0(tmp_path):
    folder = write_folder(tmp_path / "log", log((3, 0)), (True, True))
    refuses(folder, "0001.npz: rewards must have at least one step, got an episode of length 0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observations": np.zeros((9, 3))}, r"0001.npz: observations must have 1 or 2 rows for 1 rewards, got 9"),
        ({"actions": np.zeros((2, 2))}, "0001.npz: actions must have 1 rows, as rewards have, got 2"),
        ({"actions": np.zeros((1, 5))}, r"0001.npz: must have .* actions of size 2, as 0000.npz has, got 3 and 5"),
        ({"actions": np.zeros(1, int)}, r"0001.npz: actions must be \(steps, size\) of floats"),
        ({"rewards": np.zeros((1, 1))}, r"0001.npz: rewards must be \(steps,\) of numbers, got float64 of shape"),
        ({"rewards": np.array(["a"])}, r"0001.npz: rewards must be \(steps,\) of numbers"),
        ({"rewards": np.array([None])}, "0001.npz: Object arrays cannot be loaded"),
        ({"terminated": np.ones(3)}, "0001.npz: terminated must have 1 flags for 1 rewards, got 3"),
        ({"terminated": np.array("yes")}, r"0001.npz: terminated must be \(steps,\) of numbers, got <U3"),
    ],
)
def test_a_bad_file_in_a_folder_is_named(tmp_path, change, words):
    folder = write_folder(tmp_path / "log", log(), ENDED)
    observations, actions, rewards = log()[1]
    fields = {"observations": observations, "actions": actions, "rewards": rewards, "terminated": True}
    np.savez(folder / "0001.npz", **{**fields, **change})
    refuses(folder, words)


def test_a_torn_npz(tmp_path):
    folder = write_folder(tmp_path / "log", log(), ENDED)
    path = folder / "0002.npz"
    path.write_bytes(path.read_bytes()[:-40])
    refuses(folder, "0002.npz: must be a whole .npz file, got one that is torn")
    path.write_bytes(b"")
    refuses(folder, "0002.npz: must be a whole .npz file, got one that is torn")


def test_an_npz_that_is_something_else(tmp_path):
    folder = write_folder(tmp_path / "log", log(), ENDED)
    (folder / "0002.npz").write_text("steps")
    refuses(folder, "0002.npz: must be a whole .npz file, got one that is torn or none at all")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(folder / "0002.npz")
    refuses(folder, "0002.npz: must be a whole .npz file, got one that is torn or none at all")


def test_damage_inside_a_file_is_told_with_its_field(tmp_path):
    """Of the right size, as downloads that have reserved their place."""
    folder = write_folder(tmp_path / "log", log((300, 400)), (True, True))
    path = folder / "0001.npz"
    content = path.read_bytes()
    for place in range(100, len(content) - 1000, 97):
        path.write_bytes(content[:place] + bytes(40) + content[place + 40 :])
        refuses(folder, "0001.npz: ")
    path = write_d4rl(tmp_path / "log.hdf5", log((3000,)), (True,))
    with h5py.File(path) as file:
        places = {name: file[name].id.get_chunk_info(0) for name in ("observations", "actions", "rewards")}
    content = path.read_bytes()
    for name, chunk in places.items():
        middle = chunk.byte_offset + chunk.size // 2
        path.write_bytes(content[:middle] + bytes(40) + content[middle + 40 :])
        refuses(path, f"log.hdf5: {name}: Can't .*read data")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_episodes_of_minari_are_named(tmp_path, monkeypatch):
    from gymnasium.spaces import Discrete

    write_minari(tmp_path, "walk-v0", log(), ENDED, monkeypatch)
    path = tmp_path / "walk-v0" / "data" / "main_data.hdf5"
    with h5py.File(path, "a") as file:
        del file["episode_1/observations"]
        file["episode_1/observations"] = np.zeros((1, SIZE))
    refuses("walk-v0", "episode_1: observations must have 2 rows for 1 rewards, got 1")
    with h5py.File(path, "a") as file:
        del file["episode_1/actions"]
    refuses("walk-v0", "episode_1: actions must be there, got only")
    refuses(path, "must have D4RL's layout, got a file of Minari")
    discrete = [(o, np.zeros(len(r), int), r) for o, _, r in log()]
    write_minari(tmp_path, "cart-v0", discrete, ENDED, monkeypatch, Discrete(2))
    refuses("cart-v0", r"episode_0: actions must be \(steps, size\) of floats, as of a Box space, got int64")
