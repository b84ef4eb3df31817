"""Collecting: the same data however it is rolled and whenever it was killed, read by Minari itself."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from offline_toys import ENDLESS
from rich.console import Console

from conftest import QUIET
from minrnn import cli
from minrnn._files import locked
from minrnn.rl import digests, load_episodes, ppo, rolling
from minrnn.rl.behaviour import Behaviour, Digest, Rolled
from minrnn.rl.collect import SHIPPED, STEPS, CollectConfig, collect, named_env, provenance, references
from minrnn.rl.environments import make_env

ENV = "Hopper-v5"
TOO_FEW = CollectConfig(ENV, steps=60)


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory) -> Path:
    """Three policies of random numbers, as if from steps 0, 10 and 20 of a training."""
    root = tmp_path_factory.mktemp("behaviours")
    folder = root / ENV
    folder.mkdir()
    entries = []
    for steps in (0, 10, 20):
        draw = np.random.default_rng(steps)
        layer = draw.normal(size=(3, 11)).astype(np.float32), np.zeros(3, np.float32)
        facts = {"env": ENV, "steps": steps}
        path = folder / f"{steps:08}.safetensors"
        Behaviour(np.zeros(11), np.ones(11), 10.0, (layer,), "tanh", np.zeros(3, np.float32), facts).save(path)
        entries.append({"file": path.name, "sha256": ppo.sha256(path)})
    (folder / ppo.INDEX).write_text(json.dumps({"snapshots": entries}))
    return root


def digest_by_minari(directory: Path) -> str:
    """The SHA-256 of a dataset, of what Minari's own reader gives."""
    result = Digest()
    for each in minari.MinariDataset(directory / "data").iterate_episodes():
        seed = minari.MinariDataset(directory / "data").storage.get_episode_metadata([each.id])
        (metadata,) = seed
        ended = each.terminations[-1]
        result.add(Rolled(each.observations, each.actions, each.rewards, ended, np.array(metadata["seed"])))
    return str(result)


def test_minari_and_our_reader_see_what_was_rolled(tmp_path, behaviours):
    out = tmp_path / "set"
    record = collect(CollectConfig(ENV, steps=300), out=out, behaviours=behaviours, console=QUIET)
    dataset = minari.MinariDataset(out / "data")
    assert dataset.total_steps == record["returns"]["steps"] >= 300
    assert dataset.total_steps - len(dataset[-1].rewards) < 300
    assert digest_by_minari(out) == record["sha256"]
    assert dataset.recover_environment().spec.id == ENV
    episodes = load_episodes(out)
    assert episodes.returns.mean() == pytest.approx(record["returns"]["mean"])
    for start, theirs in zip(episodes.starts, dataset.iterate_episodes(), strict=True):
        rows = slice(start, start + len(theirs.rewards))
        np.testing.assert_array_equal(episodes.observations[rows], theirs.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(episodes.actions[rows], theirs.actions)
    assert list(episodes.terminated) == [bool(each.terminations[-1]) for each in dataset.iterate_episodes()]
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "nothing else is left"


def test_the_provenance_names_what_the_data_is_made_of(tmp_path, behaviours):
    out = tmp_path / "set"
    config = CollectConfig(ENV, "medium-replay", 100, 4)
    record = collect(config, out=out, behaviours=behaviours, console=QUIET)
    assert provenance(out) == record
    assert (record["env"], record["quality"], record["steps"], record["seed"]) == (ENV, "medium-replay", 100, 4)
    assert [each["file"] for each in record["behaviours"]] == [f"{n:08}.safetensors" for n in (0, 10, 20)]
    assert all(each["steps"] >= 34 for each in record["behaviours"]), "a third each"
    assert sum(each["episodes"] for each in record["behaviours"]) == record["returns"]["episodes"]
    assert {"minrnn", "gymnasium", "mujoco", "numpy"} <= record["versions"].keys()
    first = record["behaviours"][0]
    assert load_episodes(out).returns[: first["episodes"]].mean() == pytest.approx(first["mean"])
    with make_env(ENV) as env:
        returns = []
        env.action_space.seed(0)
        for episode in range(100):
            env.reset(seed=episode)
            total, over = 0.0, False
            while not over:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total, over = total + float(reward), terminated or truncated
            returns.append(total)
    spread = 4 * np.hypot(np.std(returns), record["random"]["std"]) / 10
    assert abs(np.mean(returns) - record["random"]["mean"]) < spread
    assert references(out) == {"random": record["random"]["mean"], "behaviour": record["behaviours"][-1]["mean"]}
    assert references(f"{out}+{tmp_path}") == {}


def test_other_data_has_no_provenance(tmp_path):
    assert provenance(tmp_path) == {}
    assert references("mujoco/hopper/medium-v0") == {}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_data_of_others_name_their_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    steps, flags = {"actions": [np.zeros(1)] * 2, "rewards": [0.0] * 2}, [False, False]
    episode = EpisodeBuffer(observations=[np.zeros(3)] * 3, **steps, terminations=flags, truncations=flags, infos={})
    minari.create_dataset_from_buffers("swing/up-v0", [episode], env="Pendulum-v1")
    folder = tmp_path / "swing" / "up-v0"
    for name in ("swing/up-v0", folder, folder / "data", f"{folder}+{tmp_path}"):
        assert named_env(name) == "Pendulum-v1"
    assert provenance(folder) == {}
    assert named_env(tmp_path) is None


def test_the_number_of_processes_changes_nothing(tmp_path, behaviours):
    config = CollectConfig(ENV, "medium-replay", 400)
    one = collect(config, out=tmp_path / "one", behaviours=behaviours, console=QUIET)
    three = collect(config, out=tmp_path / "three", behaviours=behaviours, processes=3, console=QUIET)
    assert three["sha256"] == one["sha256"]
    assert three["random"] == one["random"]


def test_another_seed_gives_other_data_and_more_steps_go_on_with_the_same(tmp_path, behaviours):
    shorter, longer, other = (
        collect(CollectConfig(ENV, "medium", steps, seed), out=tmp_path / name, behaviours=behaviours, console=QUIET)
        for name, steps, seed in (("a", 100, 0), ("b", 300, 0), ("c", 100, 1))
    )
    assert other["sha256"] != shorter["sha256"]
    first = shorter["returns"]["steps"]
    np.testing.assert_array_equal(
        load_episodes(tmp_path / "a").observations[:first], load_episodes(tmp_path / "b").observations[:first]
    )
    assert longer["returns"]["steps"] >= 300


def counted(monkeypatch) -> list[tuple[int, int]]:
    """The episodes that are rolled in this process from now on."""
    rolled, before = [], rolling._Roller.roll
    monkeypatch.setattr(rolling._Roller, "roll", lambda self, *task: rolled.append(task) or before(self, *task))
    return rolled


def test_killed_rolling_keeps_its_episodes_and_leaves_no_process(tmp_path, behaviours, monkeypatch):
    config = CollectConfig(ENV, steps=6000)
    whole = collect(config, out=tmp_path / "whole", behaviours=behaviours, console=QUIET)
    arguments = f"rl collect --env {ENV} --steps 6000 --behaviours {behaviours} --out {tmp_path / 'set'} --processes 2"
    code = f"from minrnn.cli import main; main({arguments.split()!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"], start_new_session=True
    )
    while len(list(tmp_path.glob(".set-*/*.npz"))) < 10:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("processes are left")
    kept = len(list(tmp_path.glob(".set-*/*.npz")))
    assert not (tmp_path / "set").exists()
    rolled = counted(monkeypatch)
    record = collect(config, out=tmp_path / "set", behaviours=behaviours, console=QUIET)
    assert record["sha256"] == whole["sha256"]
    assert kept >= 10
    total = record["returns"]["episodes"] + record["random"]["episodes"]
    assert len(rolled) <= total - kept + 2, "at most one episode of each process is rolled for nothing"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_at_once_make_it_once(tmp_path, behaviours, monkeypatch):
    rolled = counted(monkeypatch)

    def make(_):
        return collect(TOO_FEW, out=tmp_path / "set", behaviours=behaviours, console=QUIET)

    with ThreadPoolExecutor() as pool:
        one, two = pool.map(make, range(2))
    assert one["sha256"] == two["sha256"]
    assert len(rolled) == one["returns"]["episodes"] + one["random"]["episodes"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_episode_that_cannot_be_kept_is_told_as_what_it_is(tmp_path, processes):
    store, part = rolling.RolloutStore(ENV, 0, tmp_path), rolling.Part(None, 1, 1, 1)
    (tmp_path / f"{store.path(part, 0).name}.part").mkdir()
    with pytest.raises(IsADirectoryError, match="00000001-000000.npz.part"):
        rolling.roll_parts(store, [part], processes=processes, told=lambda *_: None)


def test_a_directory_may_have_a_plus_in_its_name(tmp_path, behaviours):
    collect(CollectConfig(ENV, steps=61), out=tmp_path / "a", behaviours=behaviours, console=QUIET)
    for _ in range(2):
        record = collect(TOO_FEW, out=tmp_path / "a+b", behaviours=behaviours, console=QUIET)
        assert record["steps"] == provenance(tmp_path / "a+b")["steps"] == 60


def test_what_is_there_is_not_made_again(tmp_path, behaviours, monkeypatch):
    first = collect(TOO_FEW, out=tmp_path / "set", behaviours=behaviours, console=QUIET)
    rolled = counted(monkeypatch)
    assert collect(TOO_FEW, out=tmp_path / "set", behaviours=behaviours, console=QUIET)["sha256"] == first["sha256"]
    assert rolled == []
    with pytest.raises(ValueError, match=r"out must be new or have this very data, got .*, which has steps 60$"):
        collect(CollectConfig(ENV, steps=61), out=tmp_path / "set", behaviours=behaviours, console=QUIET)
    with pytest.raises(ValueError, match=r"which has other behaviour policies$"):
        collect(TOO_FEW, out=tmp_path / "set", behaviours=SHIPPED, console=QUIET)


def test_without_out_minari_finds_it_by_its_name(tmp_path, behaviours, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    record = collect(TOO_FEW, behaviours=behaviours, console=QUIET)
    assert TOO_FEW.name == "minrnn/Hopper-v5/medium-v0"
    assert minari.load_dataset(TOO_FEW.name).total_steps == record["returns"]["steps"]
    assert list(minari.list_local_datasets()) == [TOO_FEW.name]
    assert len(load_episodes(TOO_FEW.name).rewards) == record["returns"]["steps"]
    assert references(TOO_FEW.name)["random"] == record["random"]["mean"]


def test_the_first_rolling_is_what_later_ones_are_compared_with(tmp_path, behaviours):
    (behaviours / ENV / digests.FILE).unlink(missing_ok=True)
    said = [collect(TOO_FEW, out=tmp_path / n, behaviours=behaviours, console=QUIET)["digest"] for n in "ab"]
    assert said == ["", "as it must be"]
    path = behaviours / ENV / digests.FILE
    path.write_text(path.read_text().replace('"mujoco": "', '"mujoco": "0'))
    known = json.loads(path.read_text())
    known["medium, 60 steps, seed 0"]["sha256"] = "beef"
    path.write_text(json.dumps(known))
    for name in "cca":  # made, there already, and made before the first digest was another
        screen = io.StringIO()
        said = collect(TOO_FEW, out=tmp_path / name, behaviours=behaviours, console=Console(file=screen))["digest"]
        assert said.startswith("MISMATCH: it was beef with mujoco 0")
        assert f"SHA-256 {provenance(tmp_path / name)['sha256']}, {said}\n" in screen.getvalue()
    assert [provenance(tmp_path / name)["digest"] for name in "ac"] == ["", said]
    path.unlink()


def test_digests_are_noted_under_the_lock_of_the_policies(tmp_path, behaviours):
    """Collections into other places share the file."""
    screen, config = io.StringIO(), CollectConfig(ENV, steps=60, seed=5)
    with ThreadPoolExecutor() as pool, locked(behaviours / f".{ENV}.lock", print):
        made = pool.submit(collect, config, out=tmp_path / "set", behaviours=behaviours, console=Console(file=screen))
        while "another process is at work" not in screen.getvalue():
            assert not made.done(), "it did not wait"
            time.sleep(0.01)
        path = behaviours / ENV / digests.FILE
        path.write_text(json.dumps({"another": {}}))
        assert not (tmp_path / "set").exists()
    assert json.loads(path.read_text()).keys() == {"another", "medium, 60 steps, seed 5"}
    assert made.result()["digest"] == ""
    path.unlink()


def test_killed_when_the_dataset_stands_in_its_place_loses_no_digest_and_leaves_nothing(
    tmp_path, behaviours, monkeypatch
):
    remove = shutil.rmtree

    def killed(path, **options):
        if re.fullmatch(r"\.set-\w{12}", path.name):
            raise Stop
        remove(path, **options)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(shutil, "rmtree", killed)
        collect(CollectConfig(ENV, steps=60, seed=6), out=tmp_path / "set", behaviours=behaviours, console=QUIET)
    assert (tmp_path / "set").exists()
    assert "medium, 60 steps, seed 6" in json.loads((behaviours / ENV / digests.FILE).read_text())
    (tmp_path / ".set-b-0123456789ab").mkdir()  # of the dataset set-b
    collect(CollectConfig(ENV, steps=60, seed=6), out=tmp_path / "set", behaviours=behaviours, console=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set-b-0123456789ab", "set"]


class Stop(Exception):
    pass


@pytest.fixture
def small_legs(monkeypatch):
    for name, value in (("ENVS", 2), ("ROLLOUT", 64), ("LEG", 256), ("EPISODES", 3)):
        monkeypatch.setattr(ppo, name, value)


def trained(folder: Path, stop: int | None = None, **changes) -> list[ppo.Leg]:
    legs = []

    def told(leg):
        legs.append(leg)
        if len(legs) == stop:
            raise Stop

    asked = {"target": 1e9, "settings": ppo.Settings(hidden=8), "seed": 0, **changes}
    ppo.train("InvertedPendulum-v5", folder, told=told, **asked)
    return legs


def test_killed_training_goes_on_and_ends_with_the_same_numbers(tmp_path, small_legs, monkeypatch):
    monkeypatch.setattr(ppo, "LONGEST", 1280)
    monkeypatch.setattr(ppo, "KEPT", 3)
    with pytest.raises(ValueError, match=r"must reach a return of .* in InvertedPendulum-v5 within 1280 steps, got"):
        trained(tmp_path / "hard")
    reached = max(each["legs"][-1][1] for each in [ppo.torch.load(tmp_path / "hard" / ppo.CHECKPOINT)])
    whole = trained(tmp_path / "whole", target=reached)
    with pytest.raises(Stop):
        trained(tmp_path / "cut", 2, target=reached)
    assert (tmp_path / "cut" / ppo.CHECKPOINT).is_file()
    with pytest.raises(ValueError, match=r"training.pt must be of training with the same seed, got seed 0; remove it"):
        trained(tmp_path / "cut", seed=1)
    rest = trained(tmp_path / "cut", target=reached)
    assert rest == whole[2:]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert len(names) <= 4
    assert ppo.CHECKPOINT not in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    found = ppo.snapshots(tmp_path / "cut")
    assert found[-1][1].facts["return"] >= reached
    assert [each.facts["steps"] for _, each in found] == sorted(each.facts["steps"] for _, each in found)


def test_a_torn_checkpoint_is_named(tmp_path, small_legs):
    with pytest.raises(Stop):
        trained(tmp_path, 1)
    path = tmp_path / ppo.CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training.pt must be a checkpoint of training, got"):
        trained(tmp_path)


@pytest.mark.parametrize("env", [ENV, "mine/Hopper-v0"])
def test_without_policies_they_are_trained_first(tmp_path, small_legs, monkeypatch, env):
    monkeypatch.setitem(gymnasium.registry, "mine/Hopper-v0", replace(gymnasium.spec(ENV), id="mine/Hopper-v0"))
    monkeypatch.setattr(ppo, "wanted_return", lambda env: 12.0)
    config = CollectConfig(env, steps=60)
    record = collect(config, out=tmp_path / "set", behaviours=tmp_path / "policies", console=QUIET)
    last = ppo.snapshots(tmp_path / "policies" / env)[-1][1]
    assert last.facts["return"] >= 12
    assert record["behaviours"][0]["file"] == f"{last.facts['steps']:08}.safetensors"
    assert (tmp_path / "policies" / env / digests.FILE).is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quality": "expert"}, "quality must be one of medium, medium-replay, got 'expert'"),
        ({"steps": 0}, r"steps must be a whole number in \[1, .*, got 0"),
        ({"seed": -1}, r"seed must be a whole number in \[0, .*, got -1"),
        ({"env": "Hoppper-v5"}, "env must be an environment that is installed, got 'Hoppper-v5'"),
        ({"env": "CartPole-v1"}, r"action space of CartPole-v1 must be a Box .*, got Discrete\(2\)"),
        ({"env": "Humanoid-v5"}, "env_id must be one of halfcheetah, hopper, walker2d"),
        ({"env": "Pendulum-v1"}, "env_id must be one of halfcheetah, hopper, walker2d"),
        ({"env": ENDLESS}, "env: minrnn-tests/Endless-v0 must have a limit of steps, got none"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        collect(CollectConfig(**{"env": ENV, **changes}), out=tmp_path, behaviours=tmp_path / "none", console=QUIET)


def test_policies_for_another_environment_are_refused(tmp_path, behaviours):
    (tmp_path / "Walker2d-v5").symlink_to(behaviours / ENV)
    with pytest.raises(
        ValueError, match=r"00000000.safetensors must be a policy for Walker2d-v5, got one for Hopper-v5"
    ):
        collect(CollectConfig("Walker2d-v5"), out=tmp_path / "set", behaviours=tmp_path, console=QUIET)


def test_a_directory_with_something_else_is_left_alone(tmp_path, behaviours):
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(ValueError, match="out must be a new directory, got .*, where something else is"):
        collect(TOO_FEW, out=tmp_path, behaviours=behaviours, console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_the_command(tmp_path, behaviours, capsys):
    arguments = ["rl", "collect", "--env", ENV, "--steps", "60", "--behaviours", str(behaviours), "--processes", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "set")]) == 0
    said = capsys.readouterr().out
    assert "episodes" in said
    assert provenance(tmp_path / "set")["sha256"] in said
    assert cli.main([*arguments, "--out", str(tmp_path / "set"), "--quality", "expert"]) == 1
    assert "minrnn rl: collect: quality must be one of medium, medium-replay" in capsys.readouterr().err
    assert cli.main(["rl", "sleep"]) == 2
    assert "no command 'sleep'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--processes", "0"])


@pytest.mark.parametrize("name", ["gymnasium", "minari"])
def test_a_missing_library_is_named_with_its_extra(tmp_path, behaviours, capsys, monkeypatch, name):
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    arguments = ["rl", "collect", "--env", ENV, "--steps", "60", "--behaviours", str(behaviours), "--processes", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "set")]) == 1
    assert f"needs {name}, which is not installed: pip install minrnn[rl]" in capsys.readouterr().err


def test_importing_loads_no_library_of_the_extra():
    heavy = ("gymnasium", "minari", "h5py", "stable_baselines3", "mujoco", "imageio")
    code = f"import sys, minrnn.rl; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("quality", STEPS)
@pytest.mark.parametrize("env", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
def test_the_policies_that_come_with_minrnn_give_the_data_that_they_must(tmp_path, env, quality):
    record = collect(CollectConfig(env, quality), out=tmp_path / "set", processes=2, console=QUIET)
    (wanted,) = [
        each
        for name, each in json.loads((SHIPPED / env / digests.FILE).read_bytes()).items()
        if name == f"{quality}, {STEPS[quality]} steps, seed 0"
    ]
    if any(wanted["versions"][name] != record["versions"][name] for name in ("mujoco", "gymnasium", "machine", "libc")):
        pytest.skip("the digests are of another simulator")
    assert record["sha256"] == wanted["sha256"]
    assert record["digest"] == "as it must be"
