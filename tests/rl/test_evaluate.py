"""Evaluation against plain loops, scores against their formulas, and the commands in MuJoCo's environments."""

import json
import re

import gymnasium
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
import torch
from offline_toys import ACTIONS, ENDLESS, TOY, Toy, make_model

from minrnn.cli import main
from minrnn.rl import Policy, PolicyFacts, normalized
from minrnn.rl.environments import make_env
from minrnn.rl.evaluate import evaluate, latency, scores
from minrnn.rl.watch import follow, watch

pytestmark = pytest.mark.usefixtures("one_thread")

HOPPER = {"size": 11, "actions": 3, "context": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A policy for Hopper that knows nothing, which falls soon."""
    run = tmp_path_factory.mktemp("runs") / "run"
    facts = PolicyFacts("Hopper-v5", [50.0, 20.0], {"random": 10.0, "behaviour": 60.0})
    Policy(make_model(**HOPPER), facts).save(run)
    return run


def played_alone(policy, env_id, seeds):
    """Returns and lengths of episodes, one after the other."""
    env, found = gymnasium.make(env_id), []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        policy.reset()
        total, length, reward, action, over = 0.0, 0, None, None, False
        while not over:
            action = np.clip(policy.act(observation, reward, action), env.action_space.low, env.action_space.high)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, length, over = total + reward, length + 1, terminated or truncated
        found.append((total, length))
    return tuple(np.array(each) for each in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["window", "stream"])
@pytest.mark.parametrize("most", [1, 3, 8])
def test_returns_are_those_of_single_environments(mode, most):
    """However many play at once; more episodes than environments, fewer, and as many."""
    policy = Policy(make_model(), target=5.0, mode=mode)
    seeds = [int(each) for each in np.random.SeedSequence(4).generate_state(8)]
    expected = played_alone(policy, TOY, seeds)
    returns, lengths = evaluate(policy, TOY, episodes=8, seed=4, most=most)
    np.testing.assert_allclose(returns, expected[0], rtol=1e-4)
    assert np.array_equal(lengths, expected[1]) and len(set(lengths)) > 3


def test_the_seed_decides():
    policy = Policy(make_model(), target=5.0)
    first, again, other = (evaluate(policy, TOY, episodes=3, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.isclose(first, other).any()


def test_more_episodes_begin_with_the_same_ones():
    policy = Policy(make_model(), target=5.0)
    assert np.allclose(evaluate(policy, TOY, episodes=2)[0], evaluate(policy, TOY, episodes=5)[0][:2], rtol=1e-4)


def test_a_return_that_is_no_number_is_an_error(monkeypatch):
    """The last reward of an episode, too, which no policy is told."""
    step = Toy.step

    def broken(self, action):
        observation, reward, terminated, *rest = step(self, action)
        return observation, np.nan if terminated else reward, terminated, *rest

    monkeypatch.setattr(Toy, "step", broken)
    with pytest.raises(ValueError, match="Toy-v0 must give finite rewards, got a return of nan in episode"):
        evaluate(Policy(make_model(), target=5.0), TOY, episodes=8)


def test_scores_are_their_formulas():
    returns = np.array([1000.0, 1400.0])
    found = scores("Hopper-v5", returns, {"random": 15.0, "behaviour": 1115.0})
    assert (found["mean"], found["std"]) == (1200, 200)
    assert found["d4rl"] == pytest.approx(normalized("hopper-medium-v2", 1200.0)) == pytest.approx(37.49, abs=0.01)
    assert found["d4rl_std"] == pytest.approx(normalized("hopper", returns).std())
    assert found["measured"] == pytest.approx(100 * (1200 - 15) / 1100)
    assert found["measured_std"] == pytest.approx(100 * 200 / 1100)
    for env_id, references in (("Hopper-v5", {"random": 3.0}), (TOY, {"random": 3.0, "behaviour": 3.0})):
        assert scores(env_id, returns, references)["measured"] is None
    assert scores(TOY, returns, {})["d4rl"] is None
    assert scores("HopperLike-v0", returns, {})["d4rl"] is None


@pytest.mark.parametrize("mode", ["window", "stream"])
def test_latency_is_of_an_episode_of_a_thousand_steps(mode, monkeypatch):
    policy, called = Policy(make_model(), target=5.0, mode=mode), []
    act = Policy.act
    monkeypatch.setattr(Policy, "act", lambda *arguments: called.append(1) or act(*arguments))
    took = latency(policy)
    assert len(called) == 1000 + 6 + 50
    assert took.keys() == {"median", "early", "late"} and all(5 < each < 1e6 for each in took.values())


def test_the_command_tells_and_writes_everything(run, tmp_path, capsys):
    out = tmp_path / "new" / "record.json"
    assert main(["rl", "evaluate", str(run), "--episodes", "2", "--mode", "both", "--out", str(out)]) == 0
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    number = r"-?[\d,.]+"
    for mode in ("window", "stream"):
        for target in (50, 20):
            line = rf"{mode}, asked for {target}: {number} ± {number} in 2 episodes of Hopper-v5 · {number} ± {number} "
            line += rf"where D4RL's expert has 100 · {number} ± {number} where the behaviour policy has 100"
            assert re.search(line, shown)
        assert re.search(
            rf"{mode}, eager: {number} µs per action, {number} early in an episode, {number} at its", shown
        )
    assert [each["mode"] for each in record["outcomes"]] == ["window", "window", "stream", "stream"]
    policy = Policy.load(run, mode="stream", target=20.0)
    assert record["outcomes"][-1]["returns"] == evaluate(policy, "Hopper-v5", episodes=2)[0].tolist()
    assert record["outcomes"][-1]["mean"] == np.mean(record["outcomes"][-1]["returns"])
    assert [each["compiled"] for each in record["microseconds"]] == [False, False]


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
def test_returns_of_another_version_are_no_references(run, tmp_path, capsys):
    out = tmp_path / "record.json"
    assert main(["rl", "evaluate", str(run), "--env", "Hopper-v4", "--episodes", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    (outcome, _) = record["outcomes"]
    assert [each["mode"] for each in record["microseconds"]] == ["window"]  # what was asked for
    assert outcome["measured"] is None and outcome["d4rl"] is not None
    assert "behaviour policy" not in capsys.readouterr().out


def test_a_directory_is_no_file_to_write(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["rl", "evaluate", str(run), "--out", str(tmp_path)])
    assert "--out: must be a file, got" in capsys.readouterr().err


def test_episodes_are_kept_when_timing_fails(run, tmp_path, monkeypatch, capsys):
    def kept():
        record = json.loads((tmp_path / "record.json").read_text())
        return len(record["outcomes"]), [(each["mode"], each["compiled"]) for each in record["microseconds"]]

    def interrupted(policy):
        raise KeyboardInterrupt

    def uncompiled(*arguments):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    arguments = ["rl", "evaluate", str(run), "--episodes", "1", "--mode", "both", "--compile"]
    arguments += ["--out", str(tmp_path / "record.json")]
    with monkeypatch.context() as patch:
        patch.setattr("minrnn.rl.evaluate.latency", interrupted)
        assert main(arguments) == 130
    assert kept() == (4, [])
    capsys.readouterr()
    monkeypatch.setattr(torch, "compile", lambda model, **_: uncompiled)
    assert main(arguments) == 1
    assert kept() == (4, [("window", False), ("stream", False)])
    wanted = "--compile: torch must be able to compile the model here, got: InvalidCxxCompiler: No working C++ compiler"
    assert capsys.readouterr().err == f"minrnn rl: {wanted} found\n"


@pytest.mark.parametrize(
    ("env_id", "wanted"),
    [
        ("CartPole-v1", "action space of CartPole-v1 must be a Box"),
        ("Walker2d-v5", "observation space of Walker2d-v5 must have size 11, as the data, got 17"),
        ("Nowhere-v0", "env must be an environment that is installed, got 'Nowhere-v0'"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "watch"])
def test_an_environment_that_does_not_fit_is_named(command, env_id, wanted, run, capsys):
    assert main(["rl", command, str(run), "--env", env_id]) == 1
    shown = capsys.readouterr().err
    assert wanted in shown and shown.count("\n") == 1
    assert not (run / "episode.mp4").exists()


def test_an_action_space_of_another_size_is_named():
    policy = Policy(make_model(actions=ACTIONS + 1), target=1.0)
    with pytest.raises(ValueError, match=r"action space of .*Toy-v0 must have size 3, as the data, got 2"):
        evaluate(policy, TOY)


def test_episodes_that_may_never_end_are_not_begun():
    with pytest.raises(ValueError, match=r"env: minrnn-tests/Endless-v0 must have a limit of steps, got none"):
        evaluate(Policy(make_model(), target=1.0), ENDLESS)


def test_a_run_without_environment_or_episodes_is_told(tmp_path, capsys):
    Policy(make_model(), PolicyFacts(targets=[1.0])).save(tmp_path)
    assert main(["rl", "evaluate", str(tmp_path)]) == 1
    assert "env must be given: the run does not know for which environment it is" in capsys.readouterr().err
    assert main(["rl", "evaluate", str(tmp_path), "--env", TOY, "--episodes", "0"]) == 1
    assert "episodes must be at least 1, got 0" in capsys.readouterr().err
    assert main(["rl", "evaluate", str(tmp_path / "nothing")]) == 1
    assert "run must be a directory that holds config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "watch"])
def test_a_run_imports_no_module_by_itself(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "made_by_others.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    Policy(make_model(), PolicyFacts("made_by_others:Env-v0", [1.0])).save(tmp_path / "run")
    assert main(["rl", command, str(tmp_path / "run")]) == 1
    assert "env must be given where a module is imported for it" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="it ran"):
        main(["rl", command, str(tmp_path / "run"), "--env", "made_by_others:Env-v0"])


def can_draw():
    try:
        watch(Policy(make_model(**HOPPER), target=1.0), "Hopper-v5", can_draw.path / "test.gif", steps=1)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
def test_the_camera_follows_what_runs(name):
    with make_env(name, render_mode="rgb_array") as env:
        follow(env)
        mode = env.unwrapped.model.cam_mode[env.unwrapped.mujoco_renderer.camera_id]
        assert mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM
    with make_env(TOY) as env:
        follow(env)  # which has no camera


@pytest.mark.parametrize("name", ["episode.mp4", "episode.gif"])
def test_a_film_shows_the_episode(run, tmp_path, name, capsys):
    can_draw.path = tmp_path
    if reason := can_draw():
        pytest.skip(reason)
    out = tmp_path / "films" / name
    assert main(["rl", "watch", str(run), "--out", str(out), "--mode", "stream", "--seed", "3"]) == 0
    policy = Policy.load(run, mode="stream")
    expected, length = played_alone(policy, "Hopper-v5", [3])
    assert f"a return of {expected[0]:,.0f}, in {out}" in capsys.readouterr().out
    frames = imageio.imread(out, index=None if name.endswith("gif") else ...)
    assert frames.shape[1:] == (480, 480, 3)
    assert abs(len(frames) - -(-length[0] // 3)) <= 1  # 125 frames per second, every third of them
    assert np.abs(frames[0].astype(float) - frames[-1]).mean() > 0.5
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_what_cannot_be_drawn_is_told_in_a_sentence(run, tmp_path, monkeypatch, capsys):
    import minrnn.rl.watch

    def render(self):
        raise error

    def broken(env_id, **options):
        env = gymnasium.make(TOY)
        monkeypatch.setattr(type(env), "render", render)
        return env

    error = IndexError("list index out of range")

    model = Policy(make_model(), PolicyFacts(TOY, [1.0]))
    model.save(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(minrnn.rl.watch, "make_env", broken)
    assert main(["rl", "watch", str(tmp_path)]) == 1
    wanted = (
        "nothing can be drawn here with MUJOCO_GL=osmesa (list index out of range); on Debian, apt install libosmesa6"
    )
    assert wanted in capsys.readouterr().err
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(minrnn.rl.watch, "find_library", lambda name: None)
    monkeypatch.setattr(minrnn.rl.watch.sys, "platform", "linux")
    assert main(["rl", "watch", str(tmp_path)]) == 1
    wanted = "with MUJOCO_GL=glfw (list index out of range); on Debian, apt install libegl1, with MUJOCO_GL=egl"
    assert wanted in capsys.readouterr().err
    error = gymnasium.error.DependencyNotInstalled("pygame is not installed")
    assert main(["rl", "watch", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("nothing can be drawn here: pygame is not installed\n")
    assert main(["rl", "watch", str(tmp_path), "--seed", "-1"]) == 1
    assert "seed must be at least 0, got -1" in capsys.readouterr().err
    assert not (tmp_path / "episode.mp4").exists()


def test_another_kind_of_film_is_refused(run, capsys):
    assert main(["rl", "watch", str(run), "--out", "film.avi"]) == 1
    assert "out must be an .mp4 or .gif file, got film.avi" in capsys.readouterr().err
