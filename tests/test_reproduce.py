"""`minrnn reproduce`: cells that are measured once, fail alone, and go on where they were cut off."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib import resources

import pytest
import torch
import yaml
from rich.console import Console

import minrnn
from conftest import QUIET
from minrnn.bench import facts
from minrnn.models import BackboneConfig, LanguageModel, LanguageModelConfig
from minrnn.reproduce import runner, worker
from minrnn.reproduce.cells import SCALES, Cell, Results, with_defaults
from minrnn.reproduce.experiments import EXPERIMENTS, cells
from minrnn.reproduce.measure_training import make_task, train
from minrnn.reproduce.runner import run
from minrnn.tasks import TextConfig
from minrnn.train import RunConfig, TrainConfig

TRAIN = {"steps": 40, "lr": 1e-3, "warmup": 2, "eval_every": 20, "save_every": 5}


def cell(seed=0, **train):
    config = {
        "measure": "training",
        "task": {"name": "copying", "length": 8, "tokens": 2, "batch_size": 4, "examination": 1},
        "backbone": {"width": 8, "layers": 1, "mixer": "mingru", "conv": 0, "mlp": 0.0},
        "train": {**TRAIN, **train},
    }
    return Cell("copying", "minGRU", "", seed, config)


def measured(record):
    """What must not depend on time."""
    drop = {"seconds", "facts", "earlier_sessions"}
    return json.loads(
        json.dumps({name: value for name, value in record.items() if name not in drop}),
        object_hook=lambda table: {name: value for name, value in table.items() if name not in drop},
    )


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_has_a_file_of_its_own_and_a_config_in_plain_values(scale):
    found = cells(EXPERIMENTS, scale)
    assert {each.experiment for each in found} == set(EXPERIMENTS)
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert re.fullmatch(r"[a-z]+/[a-z0-9-]+", each.name)
        assert json.loads(json.dumps(each.config)) == each.config
    assert all(scale in each.changed for each in EXPERIMENTS.values())


@pytest.mark.parametrize("scale", SCALES)
def test_every_training_cell_can_be_built(scale):
    """On the meta device, so that the paper's sizes cost nothing."""
    for each in cells(EXPERIMENTS, scale):
        if each.config["measure"] == "training":
            config = BackboneConfig(**each.config["backbone"])
            TrainConfig(seed=each.seed, **each.config["train"])
            with torch.device("meta"):
                LanguageModel(LanguageModelConfig(16, config))
            if each.config["task"]["name"] != "text":
                make_task(each.config["task"])


def test_the_preset_is_the_best_recipe_at_the_papers_size():
    preset = yaml.safe_load((resources.files("minrnn") / "configs" / "shakespeare-best.yaml").read_text())
    (found,) = cells(["best"], "paper", ["shakespeare-best"])
    config, task = RunConfig.from_dict(preset), found.config["task"]
    assert task.pop("name") == "text" and config.task == TextConfig(**task)
    assert with_defaults(config.backbone) == found.config["backbone"]
    assert config.train == TrainConfig(**found.config["train"])
    with torch.device("meta"):
        weights = LanguageModel(LanguageModelConfig(65, config.backbone)).parameters()
    assert sum(each.numel() for each in weights) <= 6.3e6
    assert config.train.steps <= 1500


def test_names_that_do_not_exist_are_answered_with_those_that_do():
    with pytest.raises(ValueError, match=r"experiments must be of .*layers, copying.*, got 'x'"):
        cells(["x"], "smoke")
    with pytest.raises(ValueError, match=r"scale must be one of smoke, laptop, paper, got 'big'"):
        cells(["layers"], "big")
    with pytest.raises(ValueError, match=r"systems must be of minLSTM; minGRU.*, got 'mingru'"):
        cells(["layers"], "smoke", ["mingru"])
    assert {each.system for each in cells(["layers"], "smoke", iter(["minGRU"]))} == {"minGRU"}
    assert cells(["layers", "layers"], "smoke") == cells(iter(["layers"]), "smoke")  # no cell is measured twice


def test_what_is_there_is_not_measured_again(tmp_path):
    results, wanted = Results(tmp_path), [cell(), cell(1)]
    first = run(wanted, results, console=QUIET)
    assert [each["result"]["step"] for each in first] == [40, 40]
    assert first[0]["result"]["held_out"] != first[1]["result"]["held_out"]
    assert first[0]["parameters"] > 0 and [line["step"] for line in first[0]["metrics"]] == [20, 40]
    assert first[0]["facts"]["minrnn"] == minrnn.__version__ and first[0]["config"] == cell().config
    assert not any((tmp_path / "work").rglob("checkpoint.pt"))
    assert run(wanted, results, console=QUIET) == first
    torn = results.path(wanted[0])
    torn.write_bytes(torn.read_bytes()[:100])
    again = run(wanted, results, console=QUIET)
    assert measured(again[0]) == measured(first[0]) and again[1] == first[1]


def test_results_of_another_config_or_version_are_not_mixed(tmp_path, monkeypatch):
    results = Results(tmp_path)
    results.write(cell(), {"facts": {}})
    assert results.read(cell()) is None  # neither measured nor failed: as good as torn
    results.write(cell(), {"result": {"held_out": 1.0}, "seconds": 1.0, "facts": {}})
    assert results.read(cell())["result"] == {"held_out": 1.0}
    with pytest.raises(
        ValueError, match=r"must be of a cell with config.train.lr = 0.5, got 0.001: results are not mixed"
    ):
        run([cell(lr=0.5)], results, console=QUIET)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"with minrnn = '9', got"):
        patch.setattr(minrnn, "__version__", "9")
        results.read(cell())
    results.path(cell()).write_text("[]")
    with pytest.raises(ValueError, match="with format = 1, got None"):
        results.read(cell())


def test_a_cell_fails_alone_and_is_tried_again(tmp_path):
    results, bad = Results(tmp_path), dataclasses.replace(cell(7), system="bad")
    bad.config["backbone"] = {**bad.config["backbone"], "width": -1}
    records = run([bad, cell()], results, console=QUIET)
    assert records[0]["error"] == "ValueError: BackboneConfig: width must be at least 1, got -1"
    assert records[1]["result"]["step"] == 40
    screen = io.StringIO()
    run([bad, cell()], results, console=Console(file=screen, width=200))
    assert "2 cells, 1 of them measured before" in screen.getvalue()
    assert "copying/bad-7: failed: ValueError: BackboneConfig" in screen.getvalue()


def test_a_cell_after_one_that_failed_has_a_process_of_its_own(tmp_path, monkeypatch):
    """An error may leave its process broken: a GPU refuses all work after some. A ValueError is of what was asked."""
    begun, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: begun.append(args) or start(*args, **kwargs))
    first, second, third = (dataclasses.replace(cell(seed, steps=2), system=f"{seed}") for seed in range(3))
    first.config["task"] = {"name": "unknown"}
    second.config["task"]["length"] = 0
    records = run([first, second, third], Results(tmp_path), console=QUIET)
    assert [record.get("error", "").partition(":")[0] for record in records] == ["KeyError", "ValueError", ""]
    assert sum("minrnn.reproduce.worker" in args[0] for args in begun) == 2


def test_what_ends_a_server_ends_the_run(tmp_path):
    """A folder that cannot be written: nothing is reported as measured."""
    (tmp_path / "copying").write_text("in the way")
    with pytest.raises(OSError, match="copying"):
        run([cell(steps=2)], Results(tmp_path), console=QUIET)


def test_a_cell_is_measured_by_one_process_at_a_time(tmp_path):
    results, screen, ended = Results(tmp_path), io.StringIO(), []

    def other():
        with results.claim(cell().name, Console(file=screen)):
            ended.append(results.has(cell()))

    with results.claim(cell().name, QUIET):
        thread = threading.Thread(target=other)
        thread.start()
        while "another process is at work on it" not in screen.getvalue():
            time.sleep(0.01)
        assert ended == []
        results.write(cell(), {"result": {}, "seconds": 1.0, "facts": {}})
    thread.join()
    assert ended == [True] and not list((tmp_path / "work").rglob("*.lock"))
    worker.measure(cell(), results, None, QUIET)
    assert results.read(cell())["result"] == {}  # what another process has measured meanwhile stays


def test_the_commit_is_of_the_code_that_the_process_has_loaded(monkeypatch):
    loaded = facts.gather()["commit"]
    monkeypatch.setattr(facts.subprocess, "run", lambda *arguments, **kwargs: pytest.fail("it is looked at again"))
    assert facts.gather()["commit"] == loaded


def test_a_process_that_ends_after_its_cell_loses_nothing(tmp_path, monkeypatch):
    """Killed between the file and the word that it is there."""
    script = "import sys, signal, os; sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)"
    start = subprocess.Popen
    results = Results(tmp_path)

    def begin(arguments, **kwargs):
        results.write(cell(), {"result": {"held_out": 1.0}, "seconds": 1.0, "facts": {}})
        return start([sys.executable, "-c", script], **kwargs)

    monkeypatch.setattr("minrnn.reproduce.runner.subprocess.Popen", begin)
    assert run([cell()], results, console=QUIET)[0]["result"] == {"held_out": 1.0}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_worker_loses_only_its_own_cell(jobs, tmp_path, monkeypatch):
    results = Results(tmp_path)
    wanted = [cell(steps=100_000, save_every=100_000), cell(1), cell(2)]
    at_work = {}

    class Seen(runner._Server):
        def _measure(self, cell):
            at_work[cell.name] = self
            super()._measure(cell)

    monkeypatch.setattr(runner, "_Server", Seen)

    def kill():
        while not results.work(wanted[0]).joinpath("metrics.jsonl").exists():
            time.sleep(0.05)
        at_work[wanted[0].name].worker.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    records = run(wanted, results, jobs=jobs, console=QUIET)
    assert records[0]["error"] == "its process ended by SIGKILL"
    assert [record["result"]["step"] for record in records[1:]] == [40, 40]


def test_a_worker_killed_between_two_cells_loses_none(tmp_path, monkeypatch):
    measure = runner._Server._measure

    def then_kill(self, cell):
        measure(self, cell)
        self.worker.kill()
        self.worker.wait()

    monkeypatch.setattr(runner._Server, "_measure", then_kill)
    records = run([cell(steps=2), cell(1, steps=2)], Results(tmp_path), console=QUIET)
    assert [record["result"]["step"] for record in records] == [2, 2]


def test_what_measures_time_is_measured_alone_and_with_all_threads(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(runner, "_serve", lambda cells, jobs, *_: served.append(({each.name for each in cells}, jobs)))
    trained, timed = cells(["layers", "lm"], "smoke"), cells(["speed", "inference"], "smoke")
    timed += [each for each in cells(["rl"], "smoke") if each.system == "all"]
    run([*trained, *timed], Results(tmp_path), jobs=3, console=QUIET)
    assert served == [({each.name for each in timed}, 1), ({each.name for each in trained}, 3)]


def test_threads_do_not_depend_on_how_many_cells_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    (record,) = run([cell(steps=2)], Results(tmp_path), jobs=2, console=QUIET)
    assert record["facts"]["threads"] == 2


def test_a_worker_whose_parent_is_gone_ends_without_a_record(tmp_path):
    long = cell(steps=100_000, save_every=100_000)
    command = [sys.executable, "-m", "minrnn.reproduce.worker", str(tmp_path), "1", ""]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(dataclasses.asdict(long)) + "\n")
    process.stdin.close()
    process.stdout.close()  # as when a kill -9 has ended who reads it
    try:
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert not Results(tmp_path).path(long).exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gymnasium", "needs gymnasium, which is not installed: pip install minrnn[rl]"),
        ("xlstm.blocks", "needs xlstm.blocks, which is not installed: pip install minrnn[peers]"),
        ("unheard", "No module named 'unheard'"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(name, reason, tmp_path, monkeypatch):
    def needs(*_):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setitem(worker.MEASURES, "training", needs)
    worker.measure(cell(), Results(tmp_path), None, QUIET)
    assert Results(tmp_path).read(cell())["error"] == f"ModuleNotFoundError: {reason}"


def test_ctrl_c_keeps_what_is_finished_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """Through the command line, at a terminal's process group; two workers at once."""
    wanted = [cell(), *(cell(seed, steps=1000, save_every=50) for seed in (1, 2))]
    whole = run(wanted, Results(tmp_path / "whole"), jobs=2, console=QUIET)
    (tmp_path / "cells.json").write_text(json.dumps([dataclasses.asdict(each) for each in wanted]))
    script = f"""
import json
from pathlib import Path
from rich.console import Console
from minrnn.reproduce.cells import Cell, Results
from minrnn.reproduce.runner import run
wanted = [Cell(**each) for each in json.loads(Path({str(tmp_path / "cells.json")!r}).read_text())]
try:
    run(wanted, Results(Path({str(tmp_path / "cut")!r})), jobs=2, console=Console())
except KeyboardInterrupt:
    print("stopped")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{script}"],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    results = Results(tmp_path / "cut")
    while not all(results.work(each).joinpath("checkpoint.pt").exists() for each in wanted[1:]):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0].endswith("stopped\n")
    assert results.read(wanted[0]) and not any(results.read(each) for each in wanted[1:])
    records = run(wanted, results, jobs=2, console=QUIET)
    assert [measured(each) for each in records] == [measured(each) for each in whole]


def test_a_checkpoint_of_another_config_or_version_is_not_mixed(tmp_path, monkeypatch):
    results = Results(tmp_path)
    work = results.work(cell())
    first = train(cell(), work, None, QUIET)
    (work / "mark").touch()
    other = r"cell.json must be of a cell with train.lr = 0.002, got 0.001: results are not mixed"
    for measure in (lambda each: train(each, work, None, QUIET), lambda each: run([each], results, console=QUIET)):
        with pytest.raises(ValueError, match=other):
            measure(cell(lr=2e-3))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"cell.json .* minrnn = '9', got"):
        patch.setattr(minrnn, "__version__", "9")
        results.read(cell())
    assert measured(train(cell(), work, None, QUIET)) == measured(first) and (work / "mark").exists()
    (work / "cell.json").write_text("{torn")  # whose checkpoint it is, nobody knows
    assert measured(train(cell(), work, None, QUIET)) == measured(first) and not (work / "mark").exists()


def test_sessions_that_were_cut_off_are_named(tmp_path):
    """Those whose checkpoint was gone on from, not those that left none."""
    assert train(cell(), tmp_path, None, QUIET)["earlier_sessions"] == []
    again = train(cell(), tmp_path, None, QUIET)["earlier_sessions"]
    assert [(each["threads"], each["precision"]) for each in again] == [(torch.get_num_threads(), "32-true")]
    (tmp_path / "checkpoint.pt").unlink()
    assert train(cell(), tmp_path, None, QUIET)["earlier_sessions"] == []


def test_a_torn_checkpoint_fails_once(tmp_path):
    whole = train(cell(), tmp_path, None, QUIET)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"checkpoint.pt is torn"):
        train(cell(), tmp_path, None, QUIET)
    assert measured(train(cell(), tmp_path, None, QUIET)) == measured(whole)


def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path):
    """What is wrong is the disk, not the file."""
    train(cell(), tmp_path, None, QUIET)
    (tmp_path / "checkpoint.pt").unlink()
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        train(cell(), tmp_path, None, QUIET)
    assert (tmp_path / "checkpoint.pt").exists()


def test_patience_ends_a_run_only_where_the_loss_was_measured(tmp_path):
    record = train(cell(patience=5), tmp_path, None, QUIET)
    assert record["result"]["step"] == 40


def test_a_text_that_is_not_shakespeare_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    wanted = cells(["lm"], "paper", ["minGRU"])
    (record,) = run(wanted, Results(tmp_path), data=str(tmp_path / "text.txt"), console=QUIET)
    assert re.match(r"ValueError: data: .*text.txt must have SHA-256 86c4e6aa", record["error"])
