"""Training: what a run leaves behind, and that no interruption changes or costs anything."""

import dataclasses
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from matplotlib.figure import Figure
from rich.console import Console
from torch.utils.data import DataLoader

import minrnn.models
import minrnn.train.module
from conftest import QUIET
from minrnn._console import say
from minrnn._files import locked
from minrnn.models import BackboneConfig
from minrnn.tasks import ListOps, TextConfig, TextTask
from minrnn.tasks.answers import Questions
from minrnn.tasks.text import score
from minrnn.train import RunConfig, TrainConfig
from minrnn.train.curve import draw_curve
from minrnn.train.files import CheckpointFile, Metrics
from minrnn.train.module import AT_ONCE, Batches, Interrupted, Journal, Training
from minrnn.train.run import train

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory, request):
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    return RunConfig(
        TextConfig(data=str(text), length=24, batch_size=4),
        BackboneConfig(width=16, layers=2, dropout=0.2),
        TrainConfig(
            steps=STEPS,
            lr=4e-3,
            warmup=5,
            eval_every=20,
            save_every=15,
            precision=getattr(request, "param", "32-true"),
        ),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config, run, console=QUIET)
    return run


def curve(run):
    """All measurements but the time that they took."""
    lines = Metrics(run / "metrics.jsonl").read()
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(run, whole):
    assert curve(run) == curve(whole)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def stop_at(step, signum, monkeypatch, times=1):
    """Send this process a signal when the batch of `step` is asked for."""
    batch = TextTask.batch

    def stopping(self, seed, at):
        if at == step:
            for _ in range(times):
                os.kill(os.getpid(), signum)
        return batch(self, seed, at)

    monkeypatch.setattr(TextTask, "batch", stopping)


def test_a_run_holds_everything(whole, config):
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
        "tokenizer.json",
        "train.json",
    ]
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = Metrics(whole / "metrics.jsonl").read()
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in lines if "held_out" in line] == [20, 40, 60]
    stored = RunConfig.of_run(whole)
    assert (stored.backbone, stored.train) == (config.backbone, config.train)
    task, model = TextTask(stored.task), minrnn.models.load(whole)
    result = json.loads((whole / "result.json").read_text())
    assert result["held_out"] == pytest.approx(task.evaluate(model)["held_out"], rel=1e-6)
    carried = score(model, task.held_out, task.config, carried=True)
    assert result["held_out_carried"] == pytest.approx(carried, rel=1e-6)
    assert result["held_out"] < 2.6 < lines[0]["loss"]  # it learns
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("config", ["bf16-mixed"], indirect=True)
def test_mixed_precision_trains_with_clipped_gradients(config, kernels, tmp_path, monkeypatch):
    """On a processor with bfloat16 kernels; without them it says that it takes float32."""
    mixed, loss = [], TextTask.loss

    def noted(self, model, batch):
        mixed.append(torch.is_autocast_enabled("cpu"))
        return loss(self, model, batch)

    monkeypatch.setattr(TextTask, "loss", noted)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def clipping(parameters, most):
        parameters = list(parameters)
        norms.append((clip(parameters, most), most))
        return norms[-1][0]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=20, clip=0.25))
    console = Console(file=io.StringIO())
    result = train(config, tmp_path / "run", console=console)
    assert result["held_out"] < 3.2 and result["precision"] == ("bf16-mixed" if kernels else "32-true")
    assert len(norms) == 20 and {most for _, most in norms} == {0.25}
    assert mixed == [kernels] * 20
    assert ("precision: 32-true" in console.file.getvalue()) is not kernels


def test_training_ends_where_it_no_longer_helps_and_keeps_the_best(config, tmp_path, monkeypatch):
    """A held-out loss that only rises after step 20; stopped and resumed, once at its end too."""
    measured, evaluate = [], TextTask.evaluate

    def rising(self, model, *, device="cpu"):
        metrics = evaluate(self, model, device=device)
        measured.append(metrics["held_out"])
        return metrics if len(measured) == 1 else {"held_out": measured[0] + len(measured)}

    monkeypatch.setattr(TextTask, "evaluate", rising)
    settings = dataclasses.replace(config.train, eval_every=10, patience=20, keep="best", steps=1000)
    config = dataclasses.replace(config, train=settings)
    console = Console(file=io.StringIO())
    result = train(config, tmp_path / "run", console=console)
    assert "--keep best" not in console.file.getvalue()
    assert result["held_out"] == measured[0] and (result["steps"], result["best_step"]) == (30, 10)
    assert curve(tmp_path / "run")[-1]["step"] == 30 and len(measured) == 3
    task, model = TextTask(config.task), minrnn.models.load(tmp_path / "run")
    assert evaluate(task, model)["held_out"] == pytest.approx(measured[0], rel=1e-6)
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = train(RunConfig.of_run(tmp_path / "run"), tmp_path / "run", resume=True, console=QUIET)
    assert {**again, "seconds": 0} == {**result, "seconds": 0} and len(measured) == 3
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept


def test_a_run_that_ends_within_a_few_steps_has_a_curve(config, tmp_path, monkeypatch):
    """Before the first of the training losses that are noted every ten steps."""
    monkeypatch.setattr(TextTask, "evaluate", lambda self, model, *, device="cpu": next(losses))
    losses = ({"held_out": float(loss)} for loss in range(5, 99))
    settings = dataclasses.replace(config.train, eval_every=1, patience=2)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure.axes[0]))
    console = Console(file=io.StringIO())
    assert train(dataclasses.replace(config, train=settings), tmp_path / "run", console=console)["steps"] == 3
    assert "the lowest was 5.0000, at step 1: --keep best keeps that model" in console.file.getvalue()
    (axes,) = drawn
    low, high = axes.get_ylim()
    training, held_out = (line.get_ydata() for line in axes.lines)
    assert list(held_out) == [5, 6, 7] and len(training) == 3 and low < min(training) and 7 < high < 8


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_curve_shows_all_that_was_held_out_whatever_its_unit(scale, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure.axes[0]))
    lines = [{"step": step, "loss": scale * (1 + 100 / step**2), "held_out": scale * 2} for step in range(1, 50)]
    draw_curve(lines, tmp_path / "curve.png", "cost_$5_vs_$6, mingru", "squared error")
    (axes,) = drawn
    low, high = axes.get_ylim()
    assert 0.5 * scale < low < scale and 2 * scale < high < 8 * scale
    assert not axes.title.get_parse_math()


def test_two_processes_do_not_train_in_one_directory(config, tmp_path):
    """The second waits: a new run is then refused, one that is resumed has ended."""
    console = Console(file=io.StringIO(), width=200)
    refused = []

    def second():
        with pytest.raises(ValueError, match="must be a new directory"):
            train(config, tmp_path / "run", console=console)
        refused.append(console.file.getvalue())

    with locked(tmp_path / "run" / ".lock", print):
        thread = threading.Thread(target=second)
        thread.start()
        while "another process is at work on it: waits" not in console.file.getvalue():
            assert thread.is_alive()
            time.sleep(0.01)
        (tmp_path / "run" / "train.json").touch()
    thread.join()
    assert refused and sorted(path.name for path in (tmp_path / "run").iterdir()) == ["train.json"]


def test_a_run_that_fails_at_once_leaves_its_directory_free(config, tmp_path):
    attention = dataclasses.replace(config.backbone, mixer="attention", mixer_options={"max_length": 8})
    with pytest.raises(ValueError, match="max_length = 8"):
        train(dataclasses.replace(config, backbone=attention), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_from_any_number_of_processes(workers):
    task = ListOps(length=30, shortest=5, batch_size=4, depth=3, arguments=4)
    made = DataLoader(Batches(task, seed=5, start=7, rank=1, size=2), batch_size=None, num_workers=workers)
    for step, batch in zip(range(7, 12), made, strict=False):
        wanted = task.batch(5, step)
        assert isinstance(batch, Questions) and all(map(torch.equal, batch, (each[1::2] for each in wanted)))


def test_processes_that_make_batches_leave_a_hangup_to_the_first():
    """It reaches all processes of a terminal; the first one saves, and then ends the others."""
    task = ListOps(length=20, shortest=5, depth=3, arguments=4, batch_size=2, examination=1)
    loader = DataLoader(Batches(task, seed=0, start=0, rank=0, size=1), batch_size=None, num_workers=1)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever runs the tests ignores
    try:
        batches = iter(loader)
    finally:
        signal.signal(signal.SIGHUP, before)
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGHUP)
    assert all(next(batches) is not None for _ in range(20)) and worker.is_alive()


def test_the_seed_decides_the_run(whole, config, tmp_path):
    train(config, tmp_path / "again", console=QUIET)
    assert_same_run(tmp_path / "again", whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 15, 37])
@pytest.mark.parametrize("config", ["32-true", "64-true"], indirect=True)
def test_stopped_and_resumed_is_uninterrupted(whole, config, tmp_path, monkeypatch, step, signum):
    run, handler = tmp_path / "run", signal.getsignal(signum)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        stop_at(step, signum, patch)
        train(config, run, console=QUIET)
    assert stop.value.signal == signum and step <= stop.value.step <= step + 1
    assert signal.getsignal(signum) is handler
    minrnn.models.load(run)
    train(RunConfig.of_run(run), run, resume=True, console=QUIET)
    assert_same_run(run, whole)


def test_killed_and_resumed_is_uninterrupted(whole, config, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    script = f"""
import json, os, signal, torch
from pathlib import Path
from minrnn.tasks import TextTask
from minrnn.train import RunConfig
from minrnn.train.run import train
torch.set_num_threads(1)
batch = TextTask.batch
def killing(self, seed, step):
    if step == 42:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, seed, step)
TextTask.batch = killing
train(RunConfig.from_dict(json.loads(Path({str(tmp_path / "config.json")!r}).read_text())), Path({str(run)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert curve(run)[-1]["step"] == 40  # ten steps after the last checkpoint
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    train(RunConfig.of_run(run), run, resume=True, console=QUIET)
    assert_same_run(run, whole)


def test_killed_before_the_first_checkpoint_begins_again(whole, config, tmp_path):
    run = tmp_path / "run"
    train(config, run, console=QUIET)
    (run / "checkpoint.pt").unlink()
    train(RunConfig.of_run(run), run, resume=True, console=QUIET)
    assert_same_run(run, whole)


def test_killed_between_the_model_and_the_checkpoint_is_uninterrupted(whole, config, tmp_path, monkeypatch):
    run, written = tmp_path / "run", []

    def killing(original):
        def write(*arguments, **options):
            original(*arguments, **options)
            written.append(1)
            if len(written) == 7:  # the first of the last two
                raise RuntimeError("killed")

        return write

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        for owner, name in ((minrnn.train.module, "save"), (CheckpointFile, "save_checkpoint")):
            patch.setattr(owner, name, killing(getattr(owner, name)))
        train(config, run, console=QUIET)
    train(RunConfig.of_run(run), run, resume=True, console=QUIET)
    assert_same_run(run, whole)


def test_killed_before_there_is_a_model_begins_again(whole, tmp_path):
    for name in ("train.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    train(RunConfig.of_run(tmp_path), tmp_path, resume=True, console=QUIET)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("times", "end"), [(1, Interrupted), (2, KeyboardInterrupt)])
def test_ctrl_c_gives_back_terminal_signals_and_warnings(config, tmp_path, monkeypatch, times, end):
    def held():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(warnings.filters)

    before, screen = held(), io.StringIO()
    stop_at(37, signal.SIGINT, monkeypatch, times)
    with pytest.raises(end):
        train(config, tmp_path / "run", console=Console(force_terminal=True, file=screen))
    shown = screen.getvalue()
    assert "stopping after this step" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again
    assert held() == before


@pytest.mark.parametrize("signum", AT_ONCE)
def test_a_second_request_is_obeyed_at_once_and_close_gives_all_back(signum, tmp_path):
    before = [signal.getsignal(each) for each in AT_ONCE]
    screen = io.StringIO()
    journal = Journal(tmp_path, Console(file=screen), "32-true")
    try:
        trainer = SimpleNamespace(is_global_zero=False, global_step=0)
        journal.on_train_start(trainer, SimpleNamespace(config=TrainConfig()))
        signal.raise_signal(signum)
        assert "stopping after this step" in screen.getvalue()
        assert signal.getsignal(signum) == AT_ONCE[signum]
    finally:
        journal.close()
    assert [signal.getsignal(each) for each in AT_ONCE] == before


def test_a_request_to_another_process_stops_this_one(config, tmp_path, monkeypatch):
    def reduce(self, own, *arguments, **options):
        return torch.stack([own[0], torch.tensor(0.5)])  # the mean over two

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 1"):
        train(config, tmp_path / "run", console=QUIET)


def test_a_run_that_diverges_says_so(config, tmp_path):
    wild = dataclasses.replace(config.train, lr=1e30, warmup=0, save_every=1)
    with pytest.raises(ValueError, match=r"loss must stay finite, got nan at step 2.* a lower learning rate may help$"):
        train(dataclasses.replace(config, train=wild), tmp_path / "run", console=QUIET)
    assert all(weight.isfinite().all() for weight in minrnn.models.load(tmp_path / "run").parameters())


def test_a_run_that_never_began_leaves_its_directory_free(config, tmp_path, monkeypatch):
    """Even one that cannot be removed: the reason is told, not that."""
    monkeypatch.chdir(tmp_path)
    wild = dataclasses.replace(config.train, lr=1e30, warmup=0, save_every=100)
    with pytest.raises(ValueError, match="a lower learning rate may help$"):
        train(dataclasses.replace(config, train=wild), Path("."), console=QUIET)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(stopped, monkeypatch):
    before = {name: (stopped / name).read_bytes() for name in ("checkpoint.pt", "model.safetensors")}
    loss = TextTask.loss
    monkeypatch.setattr(  # a finite loss whose gradient is NaN
        TextTask, "loss", lambda self, model, batch: loss(self, model, batch) + (0 * model.head.weight.sum()).sqrt()
    )
    config = RunConfig.of_run(stopped)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=1))
    with pytest.raises(ValueError, match=r"sum of the weights must stay finite, got nan .*\(first seen in embedding"):
        train(config, stopped, resume=True, console=QUIET)
    assert {name: (stopped / name).read_bytes() for name in before} == before


@pytest.fixture
def stopped(config, tmp_path, monkeypatch):
    """A run that was stopped after about 37 steps."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(37, signal.SIGINT, patch)
        train(config, tmp_path / "run", console=QUIET)
    return tmp_path / "run"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_costs_nothing(whole, stopped, name):
    before = (stopped / "checkpoint.pt").read_bytes()
    (stopped / f"{name}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write into .*run: No space left on device; .* unharmed"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)
    assert (stopped / "checkpoint.pt").read_bytes() == before
    assert not list(stopped.glob("*.part"))
    train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)
    assert_same_run(stopped, whole)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(stopped, tmp_path):
    torch.save({"state_dict": Malicious(tmp_path / "owned")}, stopped / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint: .* is torn, or not a checkpoint of minrnn"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)
    (stopped / "checkpoint.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    with pytest.raises(ValueError, match=r"checkpoint: .* is torn, or not a checkpoint of minrnn"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_a_torn_checkpoint_is_named(stopped, size):
    content = (stopped / "checkpoint.pt").read_bytes()
    (stopped / "checkpoint.pt").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"checkpoint: .*checkpoint.pt is torn"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)


def test_what_fails_before_the_checkpoint_is_read_is_not_its_fault(stopped, monkeypatch):
    def fail(strategy):
        raise RuntimeError("the port is in use")

    monkeypatch.setattr(SingleDeviceStrategy, "setup_environment", fail)
    with pytest.raises(RuntimeError, match="the port is in use"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_the_machine_lacks_is_not_the_checkpoints_fault(stopped, kind, monkeypatch):
    def fail(module):
        raise kind("out of memory")

    monkeypatch.setattr(Training, "configure_optimizers", fail)
    with pytest.raises(kind):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)


def test_a_checkpoint_of_something_else_is_named(stopped):
    torch.save({"weights": torch.zeros(3)}, stopped / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint: .*checkpoint.pt is torn, or not a checkpoint"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)


def test_a_checkpoint_without_tensors_is_named(stopped):
    checkpoint = torch.load(stopped / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "state_dict": dict.fromkeys(checkpoint["state_dict"], 1.0)}, stopped / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt is torn, or not a checkpoint of minrnn: its weights are no"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)


@pytest.mark.parametrize("part", ["loops", "optimizer_states", "lr_schedulers", "callbacks"])
@pytest.mark.parametrize("value", [{"fit_loop": {}}, [], [{}], {"Journal": {}}, None, 3])
def test_a_checkpoint_with_a_strange_part_is_named(stopped, part, value):
    checkpoint = torch.load(stopped / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, part: value}, stopped / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint: .*checkpoint.pt is torn, or not a checkpoint"):
        train(RunConfig.of_run(stopped), stopped, resume=True, console=QUIET)


def test_a_checkpoint_of_another_model_is_named(stopped):
    config = RunConfig.of_run(stopped)
    other = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, width=8))
    with pytest.raises(ValueError, match="checkpoint: must hold the weights of this run's model"):
        train(other, stopped, resume=True, console=QUIET)


def test_a_text_that_changed_or_vanished_stops_a_resume(stopped):
    config = RunConfig.of_run(stopped)
    text = Path(config.task.data)
    content = text.read_bytes()
    try:
        text.write_bytes(content + b"more")
        with pytest.raises(ValueError, match=r"must have SHA-256 .* it has changed"):
            train(config, stopped, resume=True, console=QUIET)
        text.unlink()
        with pytest.raises(ValueError, match=r"must be an existing file .* no such file"):
            train(config, stopped, resume=True, console=QUIET)
    finally:
        text.write_bytes(content)


def test_a_run_in_use_is_not_overwritten(whole, config):
    before = curve(whole)
    with pytest.raises(ValueError, match=r"--out must be a new directory, got .* --resume goes on"):
        train(config, whole, console=QUIET)
    assert curve(whole) == before


def test_a_directory_without_a_run_is_not_said_to_have_one(config, tmp_path):
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ValueError, match=r"--out must be a new directory, got .*, and has no run to resume$"):
        train(config, tmp_path, console=QUIET)


def test_nothing_is_left_of_a_run_that_could_not_begin(config, tmp_path):
    bad = RunConfig(TextConfig(data=config.task.data, length=100_000), config.backbone, config.train)
    with pytest.raises(ValueError, match="longer than the training window"):
        train(bad, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_run_config_is_a_flat_table():
    config = RunConfig(TextConfig(length=3), BackboneConfig(width=7), TrainConfig(steps=9))
    assert config.to_dict()["length"] == 3 and config.to_dict()["width"] == 7 and config.to_dict()["steps"] == 9
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="fields must be known, got nonsense"):
        RunConfig.from_dict({"nonsense": 1})


def test_devices_share_a_batch():
    with pytest.raises(ValueError, match="batch_size must be a multiple of devices = 3, got 4"):
        RunConfig(TextConfig(batch_size=4), train=TrainConfig(devices=3))


@pytest.mark.slow
def test_two_processes_train_as_one(config, tmp_path):
    """Lightning starts the second with the same command."""
    losses = []
    for devices in (1, 2):
        settings = {**config.to_dict(), "dropout": 0.0, "devices": devices, "steps": 20}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        run = tmp_path / str(devices)
        command = ["-m", "minrnn.cli", "train", "--config", str(tmp_path / "config.json"), "--out", str(run)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("parameters, in") == 1
        losses.append([line.get("loss", line.get("held_out")) for line in curve(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be the directory of a run, got no train.json"):
        RunConfig.of_run(tmp_path)
    (tmp_path / "train.json").write_text('{"length": ')
    with pytest.raises(ValueError, match=r"train.json is damaged"):
        RunConfig.of_run(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match=r"train.json is damaged"):
        RunConfig.of_run(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 0, "at least 1"),
        ("warmup", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "below 2\\*\\*32"),
        ("lr", float("nan"), "above 0"),
        ("lr", float("inf"), "above 0 and finite"),
        ("weight_decay", float("inf"), "at least 0 and finite"),
        ("beta2", 1.0, "in \\[0, 1\\)"),
        ("precision", "half", "one of"),
        ("patience", -1, "at least 0"),
        ("decay", "linear", "one of"),
        ("keep", "all", "one of"),
        ("precision", "16-mixed", "one of"),
    ],
)
def test_train_config_is_checked(field, value, wanted):
    with pytest.raises(ValueError, match=f"TrainConfig: {field} must be {wanted}"):
        TrainConfig(**{field: value})


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, warmup=10)
    rates = [config.schedule(step) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1.0 and rates[100] == pytest.approx(0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert TrainConfig(steps=1, warmup=0).schedule(0) == 1.0
    assert [TrainConfig(steps=9, warmup=2, decay="constant").schedule(step) for step in range(4)] == [0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("config", "field", "value", "wanted"),
    [
        (TrainConfig, "steps", 1.5, "int"),
        (TrainConfig, "precision", 32, "str"),
        (TextConfig, "length", "24", "int"),
        (TextConfig, "sha256", 7, r"str \| None"),
    ],
)
def test_types_are_checked(config, field, value, wanted):
    with pytest.raises(TypeError, match=f"{field} must be of type {wanted}, got {value!r}"):
        config(**{field: value})


def test_text_is_shown_as_it_is():
    screen = io.StringIO()
    say(Console(file=screen), "a :key: of [bold]")
    assert screen.getvalue() == "a :key: of [bold]\n"
