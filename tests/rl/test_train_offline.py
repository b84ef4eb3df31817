"""`minrnn train` on logged episodes: what a run leaves behind, and that no interruption changes or costs anything."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from offline_toys import TOY, make_episodes, save_episodes

from conftest import QUIET
from minrnn.cli import main
from minrnn.models import load_model
from minrnn.rl import DecisionModel, OfflineConfig, OfflineTask, Policy
from minrnn.rl import task as rl_task
from minrnn.rl.evaluate import evaluate
from minrnn.train import RunConfig, jobs
from minrnn.train.files import Metrics
from minrnn.train.module import Interrupted
from minrnn.train.run import train

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--task=offline", "--context=6", "--batch-size=16", "--width=16", "--layers=1", "--lr=3e-3", "--warmup=5"]
SMALL += ["--steps=40", "--eval-every=20", "--save-every=10", "--return-scale=10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_episodes(make_episodes(lengths=[7, 1, 30, 12, 3] * 8), tmp_path_factory.mktemp("data") / "episodes")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", "--data", str(data), "--env", TOY, "--out", str(run), *SMALL]) == 0
    return run


def curve(run):
    lines = Metrics(run / "metrics.jsonl").read()
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(run, whole):
    assert curve(run) == curve(whole)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_holds_everything(whole, data):
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "model.safetensors",
        "policy.json",
        "result.json",
        "train.json",
    ]
    config = RunConfig.of_run(whole)
    assert (config.kind, config.task.data, config.task.env) == ("offline", str(data), TOY)
    assert (config.backbone.conv, config.backbone.mlp_kind, config.train.clip) == (0, "gelu", 0.25)
    result, task = json.loads((whole / "result.json").read_text()), OfflineTask(config.task)
    model = load_model(whole, DecisionModel)
    assert result["held_out"] == pytest.approx(task.evaluate(model)["held_out"], rel=1e-5)
    assert result["held_out"] < 0.5 * curve(whole)[0]["loss"]  # it learns: more than the mean action
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    facts = json.loads((whole / "policy.json").read_text())
    assert facts == {"env": TOY, "targets": [pytest.approx(task.episodes.returns.max())], "references": {}}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("eval", "run must have learned a text, got"),
        ("generate", "config.json must be the config of a LanguageModel, got"),
    ],
)
def test_a_policy_is_no_language_model(whole, command, reason, capsys):
    assert main([command, str(whole)]) == 1
    assert reason in capsys.readouterr().err


def test_a_run_acts(whole):
    returns, lengths = evaluate(Policy.load(whole, mode="stream"), TOY, episodes=3)
    assert np.isfinite(returns).all() and (lengths <= 30).all()


def test_a_run_that_was_cut_off_is_told_so(whole, tmp_path, capsys):
    for finished in (True, False):
        shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
        if not finished:
            (tmp_path / "run" / "result.json").unlink()
        assert main(["rl", "evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0
        told = f"not finished: {tmp_path / 'run'} has no result.json; its model is the one that it saved last\n"
        assert (told in capsys.readouterr().out) != finished


def test_references_are_of_the_same_environment(data, monkeypatch):
    known = {"random": 1.0, "behaviour": 2.0}
    monkeypatch.setattr(jobs, "references", lambda data: known)
    for asked, named, env, references in (
        ("Walker2d-v5", "Walker2d-v5", "Walker2d-v5", known),
        (None, "Walker2d-v5", "Walker2d-v5", known),
        ("Walker2d-v4", "Walker2d-v5", "Walker2d-v4", {}),
        (TOY, "Walker2d-v5", TOY, {}),
    ):
        monkeypatch.setattr(jobs, "named_env", lambda data, named=named: named)
        monkeypatch.setattr(jobs, "check_fits", lambda *arguments: None)  # the toy data are of no Walker
        facts = json.loads(jobs.OfflineJob(OfflineConfig(str(data), asked), None).files()["policy.json"])
        assert (facts["env"], facts["references"]) == (env, references)


def test_data_that_are_downloaded_now_tell_their_environment(data, monkeypatch):
    load, there = rl_task.load_episodes, []
    monkeypatch.setattr(rl_task, "load_episodes", lambda source: there.append(source) or load(source))
    monkeypatch.setattr(jobs, "named_env", lambda source: "Walker2d-v5" if there else None)
    facts = json.loads(jobs.OfflineJob(OfflineConfig(str(data)), None).files()["policy.json"])
    assert facts["env"] == "Walker2d-v5"


def test_data_of_another_environment_are_refused(data, tmp_path, monkeypatch, capsys):
    def refused(data, env):
        arguments = ["train", "--config", "rl/halfcheetah", "--steps", "1", "--data", str(data), "--env", env]
        assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    walker = tmp_path / "walker2d_medium-v2"
    shutil.copytree(data, walker)
    for source in (walker, f"{data}+{walker}"):
        wanted = f"env must be a version of walker2d, of which {walker} is, got HalfCheetah-v5"
        assert wanted in refused(source, "HalfCheetah-v5")
    hopper = tmp_path / "hopper_medium-v2"
    shutil.copytree(data, hopper)
    both = OfflineConfig(f"{hopper}+{walker}")
    with pytest.raises(ValueError, match=f"data must be of one environment, got {hopper} of hopper and {walker} of"):
        jobs.OfflineJob(both, None)
    assert "env: observation space of HalfCheetah-v5 must have size 4, as the data, got 17" in refused(
        data, "HalfCheetah-v5"
    )
    assert "env: action space of CartPole-v1 must be a Box" in refused(data, "CartPole-v1")
    monkeypatch.setattr(jobs, "named_env", lambda data: "Walker2d-v5")
    wanted = f"env must be a version of Walker2d-v5, of which {data} is, got HalfCheetah-v5"
    assert wanted in refused(data, "HalfCheetah-v5")


def test_to_learn_from_data_needs_no_simulator(data, monkeypatch):
    """Without Gymnasium, without MuJoCo, without what draws, and where a module would be imported for a name."""
    config = OfflineConfig(str(data), "HalfCheetah-v5")
    for error in (gymnasium.error.DependencyNotInstalled("no MuJoCo"), RuntimeError("invalid value for MUJOCO_GL")):

        def broken(*arguments, error=error, **options):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(gymnasium, "make", broken)
            jobs.OfflineJob(config, None)
    for env in ("nowhere:HalfCheetah-v5", "Nowhere-v0"):
        jobs.OfflineJob(OfflineConfig(str(data), env), None)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    jobs.OfflineJob(config, None)


@pytest.mark.parametrize("mixer", ["attention", "mamba", "aaren", "minlstm", "s4"])
def test_every_system_trains(mixer, data, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--mixer", mixer, "--steps", "4", "--eval-every", "4"]
    options += ["--mixer_options", '{"inner_options": {"state": 4}}'] if mixer == "s4" else []
    assert main(["train", "--data", str(data), "--out", str(run), *SMALL, *options]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"38 episodes to train on, 2 held out, 424 steps, returns -?\d+ ± \d+, at most", shown)
    assert re.search(r"held out: a mean squared error of \d\.\d{4} per number of an action", shown)
    config = Policy.load(run).model.config
    assert config.backbone.mixer == mixer
    assert config.layout == ("concatenated" if mixer == "s4" else "interleaved")
    assert config.backbone.mlp_kind == ("relu" if mixer in ("attention", "aaren") else "gelu")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_is_uninterrupted(whole, tmp_path, monkeypatch, signum, capsys):
    run, batch = tmp_path / "run", OfflineTask.batch
    config = dataclasses.replace(RunConfig.of_run(whole))

    def stopping(self, seed, step):
        if step == 23:
            os.kill(os.getpid(), signum)
        return batch(self, seed, step)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(OfflineTask, "batch", stopping)
        train(config, run, console=QUIET)
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert_same_run(run, whole)


def test_killed_and_resumed_is_uninterrupted(whole, data, tmp_path):
    run = tmp_path / "run"
    script = f"""
import os, signal, torch
from minrnn.rl import OfflineTask
from minrnn.cli import main
torch.set_num_threads(1)
batch = OfflineTask.batch
def killing(self, seed, step):
    if step == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, seed, step)
OfflineTask.batch = killing
main(["train", "--data", {str(data)!r}, "--env", {TOY!r}, "--out", {str(run)!r}, *{SMALL!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert_same_run(run, whole)


def test_data_that_moved_or_changed(whole, data, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole, run)
    (run / "checkpoint.pt").unlink()
    shutil.copytree(data, moved)
    policy = json.loads((run / "policy.json").read_text()) | {"env": "Named-v0"}  # as by data that name theirs
    (run / "policy.json").write_text(json.dumps(policy))
    assert main(["train", "--out", str(run), "--resume", "--data", str(moved)]) == 0
    assert json.loads((run / "policy.json").read_text()) == policy
    shutil.copy(whole / "policy.json", run)
    assert RunConfig.of_run(run).task.data == str(moved)
    assert_same_run(run, whole)
    (moved / "000.npz").unlink()
    assert main(["train", "--out", str(run), "--resume"]) == 1
    assert "must have SHA-256" in capsys.readouterr().err
    for arguments, wanted in (
        (["--context", "7"], "--context must be 6 to resume"),
        (["--task", "text"], "--task must be 'offline' to resume"),
    ):
        assert main(["train", "--out", str(run), "--resume", *arguments]) == 1
        assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--task", "offline"], "data must name logged episodes, got none: --data FILE"),
        (["--task", "online"], "task must be one of text, offline, got 'online'"),
        (["--task", "offline", "--data", "nowhere.hdf5"], "nowhere.hdf5"),
        (["--config", "rl/hopper", "--data", "nowhere.hdf5"], "nowhere.hdf5"),
        (["--config", "rl/hopper"], "`minrnn rl collect --env Hopper-v5 --quality medium`"),
    ],
)
def test_what_cannot_be_trained_is_told(arguments, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 1
    shown = capsys.readouterr().err
    assert wanted in shown and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "sizes"), [("hopper", (11, 3)), ("halfcheetah", (17, 6)), ("walker2d", (17, 6))])
def test_presets_are_runs(name, sizes, tmp_path, capsys):
    run, toys = tmp_path / "run", make_episodes()
    observations, actions = (
        np.resize(each, (len(each), size)) for each, size in zip((toys.observations, toys.actions), sizes, strict=True)
    )
    toys = dataclasses.replace(toys, observations=observations, actions=actions)
    data = save_episodes(toys, tmp_path / "data")
    small = ["--steps", "1", "--width", "8", "--layers", "1", "--batch_size", "2"]
    assert main(["train", "--config", f"rl/{name}", "--data", str(data), "--out", str(run), *small]) == 0
    config = RunConfig.of_run(run)
    assert config.kind == "offline" and config.task.env.lower() == f"{name}-v5" and config.train.lr == 1e-3
    assert Policy.load(run).facts.targets == [pytest.approx(toys.returns.max())]


def test_help_lists_the_keys_of_the_task(capsys):
    for arguments, there, absent in (
        (["--help"], "--tokens", "--return_scale"),
        (["--task", "offline", "--help"], "--return_scale", "--tokens"),
        (["--config", "rl/hopper", "--help"], "--return_scale", "--tokens"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *arguments])
        shown = capsys.readouterr().out
        assert there in shown and absent not in shown and "rl/hopper" in shown
