"""The command line from end to end: train, kill, resume, evaluate, generate; and what it says when it cannot."""

import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import minrnn.models
from minrnn.cli import main
from minrnn.tasks.text import score
from minrnn.tasks.vocabulary import encode, load_tokenizer
from minrnn.train.files import Metrics

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    "--length=24",
    "--batch-size=4",
    "--width=16",
    "--layers=1",
    "--warmup=5",
    "--eval-every=20",
    "--save-every=10",
]
SMALL += ["--steps=40"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(text), "--out", str(run), *SMALL]) == 0
    return run


def refused(capsys, *arguments):
    """The sentence with which a command gives up, with exit status 1."""
    assert main([str(each) for each in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_train_reports_the_end(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(out), "--mixer", "minlstm", *SMALL]) == 0
    shown, result = capsys.readouterr().out, json.loads((out / "result.json").read_text())
    assert "THP_MEM_ALLOC_ENABLE=1" in shown
    assert re.search(r"step 40/40 · loss \d\.\d+ · held out \d\.\d+ · [\d.]+k positions/s · 0:00 left", shown)
    assert f"held out: {result['held_out']:.4f} nats per character in windows of 24 from zero state" in shown
    assert f"held out: {result['held_out_carried']:.4f} nats per character with the state carried on" in shown
    assert re.search(r"trained 40 steps in \d+ s", shown) and str(out) in shown
    assert minrnn.models.load(out).config.backbone.mixer == "minlstm"


def test_a_mixer_without_a_constant_state_trains_and_generates(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(out), "--mixer", "attention", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "from zero state" in shown and "carried on" not in shown
    assert json.loads((out / "result.json").read_text())["held_out_carried"] is None
    assert main(["eval", str(out)]) == 0
    assert "carried on" not in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "12 times", "--length", "10"]) == 0
    assert capsys.readouterr().out.startswith("12 times")
    assert main(["generate", str(out), "--prompt", "12 times"]) == 0  # by default no longer than a training window
    shown = capsys.readouterr()
    assert len(shown.out) == 24 + len("\n") and not shown.err
    assert main(["generate", str(out), "--prompt", "12 times " * 3]) == 0
    shown = capsys.readouterr()
    assert len(shown.out) == 27 + 1 + len("\n") and "one token more, for the prompt of 27 tokens fills" in shown.err


def test_a_prompt_that_is_too_long_is_not_echoed(text, tmp_path, capsys):
    out, short = tmp_path / "run", ["--mixer", "attention", "--mixer_options.max_length", "24"]
    assert main(["train", "--data", str(text), "--out", str(out), *short, *SMALL]) == 0
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "12 times " * 3]) == 1
    shown = capsys.readouterr()
    assert not shown.out and "max_length = 24 long, got 27" in shown.err
    assert main(["generate", str(out), "--prompt", "12 times", "--length", "40"]) == 1
    assert re.fullmatch(r"(?s)12 times.{17}\n", capsys.readouterr().out)  # whatever there is, and the line's end


def test_info_lists_the_mixers(capsys):
    assert main(["info", "--mixers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mixer", *minrnn.mixers.MIXERS]


def test_eval_measures_what_was_held_out(run, text, capsys):
    result = json.loads((run / "result.json").read_text())
    wanted = (
        f"{result['held_out']:.4f} nats per character in windows of 24",
        f"{result['held_out_carried']:.4f} nats per character",
    )
    for arguments in ([], ["--data", str(text)]):
        assert main(["eval", str(run), *arguments]) == 0
        shown = capsys.readouterr().out
        assert "what was held out of" in shown and all(line in shown for line in wanted)


def test_eval_measures_all_of_another_text(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("7 times 7 is 49.\n" * 9)
    assert main(["eval", str(run), "--data", str(tmp_path / "other.txt")]) == 0
    shown = capsys.readouterr().out
    tokens = torch.from_numpy(encode(load_tokenizer(run / "tokenizer.json"), "7 times 7 is 49.\n" * 9))
    config = minrnn.tasks.TextConfig(length=24)
    assert "152 characters, all of" in shown
    assert f"{score(minrnn.models.load(run), tokens, config):.4f} nats per character in windows of 24" in shown


def test_generate_is_decided_by_the_seed(run, capsys):
    def made(*arguments):
        assert main(["generate", str(run), "--prompt", "12 times", "--length", "40", *arguments]) == 0
        return capsys.readouterr().out

    one = made("--seed", "1")
    assert one.startswith("12 times") and len(one) == len("12 times") + 40 + 1
    assert one == made("--seed", "1") != made("--seed", "2")
    assert made("--temperature", "0") == made("--top-k", "1") == made("--top-p", "1e-9")


def test_generate_streams(run, monkeypatch):
    class Stream(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    monkeypatch.setattr(sys, "stdout", Stream())
    assert main(["generate", str(run), "--length", "30", "--seed", "1"]) == 0
    assert sys.stdout.flushed >= 30


def test_a_process_that_is_stopped_and_killed_goes_on(text, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "a run"
    begin = ["train", "--data", str(text), *SMALL[:-1], "--steps", "400", "--out"]
    assert main([*begin, str(whole)]) == 0

    def interrupted(arguments, step, signum):
        """Signal a process of its own once it has noted this step."""
        script = (
            f"import sys, torch; torch.set_num_threads(1); from minrnn.cli import main; sys.exit(main({arguments!r}))"
        )
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        while process.poll() is None and not any(
            line["step"] >= step for line in Metrics(run / "metrics.jsonl").read()
        ):
            time.sleep(0.01)
        process.send_signal(signum)
        return process.communicate()[0], process.returncode

    shown, status = interrupted([*begin, str(run)], 30, signal.SIGINT)
    assert status == 130 and f"to go on: minrnn train --out {shlex.quote(str(run))} --resume" in shown
    resume = ["train", "--out", str(run), "--resume"]
    assert interrupted(resume, 170, signal.SIGKILL)[1] == -signal.SIGKILL
    assert main(resume) == 0
    losses = [
        [(line["step"], line.get("loss"), line.get("held_out")) for line in Metrics(each / "metrics.jsonl").read()]
        for each in (run, whole)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 60
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("hangs_up", [True, False])
def test_a_terminal_that_goes_away_costs_nothing(hangs_up, text, tmp_path):
    """It is saved where the process is told so, and goes on where it is not, as after `disown`."""
    run, (terminal, screen) = tmp_path / "run", pty.openpty()
    steps = ["--steps", "100000" if hangs_up else "400", "--save_every", "100000"]
    begin = ["train", "--data", str(text), *SMALL[:-1], *steps, "--out", str(run)]
    script = f"import sys, torch; torch.set_num_threads(1); from minrnn.cli import main; sys.exit(main({begin!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=screen, stderr=subprocess.PIPE, start_new_session=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever runs the tests ignores
    )  # fmt: skip
    os.close(screen)
    try:
        while not Metrics(run / "metrics.jsonl").read():
            assert process.poll() is None
            if select.select([terminal], [], [], 0.01)[0]:
                os.read(terminal, 1 << 16)
        os.close(terminal)
        if hangs_up:
            process.send_signal(signal.SIGHUP)
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert (process.returncode, error) == (128 + signal.SIGHUP if hangs_up else 0, "")
    assert (run / "checkpoint.pt").exists() and (run / "result.json").exists() is not hangs_up


def test_a_run_goes_on_from_elsewhere_and_with_its_text_moved(text, tmp_path, monkeypatch, capsys):
    def noted():
        return json.loads((tmp_path / "run" / "train.json").read_text())["data"]

    monkeypatch.chdir(text.parent)
    assert main(["train", "--data", text.name, "--out", str(tmp_path / "run"), *SMALL]) == 0
    monkeypatch.chdir(tmp_path)
    resume = ["train", "--out", "run", "--resume"]
    assert main(resume) == 0 and noted() == str(text)
    Path("moved.txt").write_bytes(text.read_bytes())
    assert main([*resume, "--data", "moved.txt"]) == 0 and noted() == str(tmp_path / "moved.txt")
    Path("other.txt").write_bytes(text.read_bytes() + b"more")
    capsys.readouterr()
    assert "must have SHA-256" in refused(capsys, *resume, "--data", "other.txt")
    assert noted() == str(tmp_path / "moved.txt")


def test_ctrl_c_at_once_ends_with_130(text, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(minrnn.tasks.TextTask, "loss", interrupted)
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    assert main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert capsys.readouterr().err == "minrnn train: stopped\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_prompt_is_found_for_a_model_that_saw_no_line_break(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abcd" * 100)
    out = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "text.txt"), "--out", str(out), *SMALL, "--steps", "1"]) == 0
    capsys.readouterr()
    assert main(["generate", str(out), "--length", "5"]) == 0
    assert re.fullmatch(r"a[a-d]{5}\n", capsys.readouterr().out)


def test_every_key_can_come_from_a_file(run, tmp_path):
    """The run's own train.json is such a file, and options after it win."""
    out = tmp_path / "run"
    assert main(["train", "--config", str(run / "train.json"), "--steps", "5", "--out", str(out)]) == 0
    stored, first = (json.loads((each / "train.json").read_text()) for each in (out, run))
    assert stored == {**first, "steps": 5}


def test_bytes_are_tokens_too(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("naïve café — ☕\n" * 100)
    out = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "text.txt"), "--tokens", "bytes", "--out", str(out), *SMALL]) == 0
    assert main(["generate", str(out), "--prompt", "a prompt of unseen characters: żółw ", "--length", "20"]) == 0
    assert "żółw" in capsys.readouterr().out


def test_presets_are_found_by_name(tmp_path, text):
    out = tmp_path / "run"
    assert (
        main(["train", "--config", "shakespeare", "--data", str(text), *SMALL, "--out", str(out), "--steps", "2"]) == 0
    )
    assert json.loads((out / "train.json").read_text())["warmup"] == 5


def test_what_is_said_beside_a_file_overrides_it_wherever_it_stands(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("lr: 0.5\nsteps: 7\n")
    config = str(tmp_path / "x.yaml")
    for given in (["--lr", "0.1", "--config", config], [f"--config={config}", "--lr=0.1"]):
        assert main(["train", *given, "--print_config"]) == 0
        table = yaml.safe_load(capsys.readouterr().out)
        assert (table["lr"], table["steps"]) == (0.1, 7)
    with pytest.raises(SystemExit):
        main(["train", "--steps", "3", "--config"])
    assert "expected one argument" in capsys.readouterr().err


def test_resume_keeps_to_the_run(run, capsys, tmp_path):
    before = (run / "model.safetensors").read_bytes()
    assert main(["train", "--out", str(run), "--resume", "--steps", "40"]) == 0  # it has ended: nothing but the report
    assert (run / "model.safetensors").read_bytes() == before
    capsys.readouterr()
    assert "--steps must be 40 to resume" in refused(capsys, "train", "--out", run, "--resume", "--steps", 50)
    assert "got no train.json" in refused(capsys, "train", "--out", tmp_path / "none", "--resume")


def test_an_option_of_a_mixer_may_be_said_again(tmp_path, capsys):
    """Beside those that its task sets."""
    given = ["--task", "offline", "--data", "x.hdf5", "--mixer", "attention", "--mixer_options.dropout"]
    assert main(["train", *given, "0.2", "--print_config"]) == 0
    table = yaml.safe_load(capsys.readouterr().out)
    assert table["mixer_options"] == {"dropout": 0.2, "heads": 1, "positions": "none", "bias": True}
    (tmp_path / "train.json").write_text(json.dumps(table))
    resume = ["--out", str(tmp_path), "--resume", "--print_config"]
    assert main(["train", *given, "0.2", *resume]) == 0 and yaml.safe_load(capsys.readouterr().out) == table
    assert "--mixer_options must be {'dropout': 0.2} to resume" in refused(capsys, "train", *given, "0.3", *resume)
    default = ["--mixer_options.max_length", "1024"]
    assert main(["train", *default, *resume]) == 0 and yaml.safe_load(capsys.readouterr().out) == table


def test_what_has_no_effect_is_said(text, tmp_path, capsys):
    small = ["--data", str(text), *SMALL, "--steps", "1", "--dropout", "0.5"]
    for mixer, told in (("gru", True), ("attention", False)):
        assert main(["train", *small, "--mixer", mixer, "--out", str(tmp_path / mixer)]) == 0
        said, shown = f"without effect: dropout; {mixer} has no MLP here, --mlp gives it one", capsys.readouterr().out
        assert (said in shown) is told
        assert "the learning rate only rises: --warmup 5 is not below --steps 1" in shown


def test_the_printed_configuration_is_a_configuration(text, tmp_path, capsys):
    assert main(["train", "--data", str(text), "--mixer", "minlstm", "--lr", "0.1", "--print_config"]) == 0
    shown, file = capsys.readouterr().out, tmp_path / "run.yaml"
    file.write_text(shown)
    assert {"mixer: minlstm", "lr: 0.1", "beta2: 0.99"} < set(shown.splitlines())
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run"), "--print_config"]) == 0
    assert capsys.readouterr().out == shown and not (tmp_path / "run").exists()


def test_bad_input_is_one_sentence(run, text, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") * 100)
    (tmp_path / "short.txt").write_text("short")
    new = ["--out", tmp_path / "new"]
    assert "empty file" in refused(capsys, "train", "--data", tmp_path / "empty.txt", *new)
    assert "must be UTF-8" in refused(capsys, "train", "--data", tmp_path / "latin.txt", *new)
    assert "longer than the training window" in refused(capsys, "train", "--data", tmp_path / "short.txt", *new)
    assert "no such file" in refused(capsys, "train", "--data", tmp_path / "none.txt", *new)
    assert "must be a new directory" in refused(capsys, "train", "--data", text, "--out", run)
    assert "name must be one of mingru, minlstm" in refused(capsys, "train", "--mixer", "magic", *new)
    assert "options of mingru must be among" in refused(capsys, "train", "--mixer_options.magic", "1", *new)
    assert "mlp * width must be below" in refused(capsys, "train", "--mlp", "1e308", *new)
    assert "mlp * width must be 0 or at least 1" in refused(capsys, "train", "--mlp", "0.001", *new)
    assert "expansion must be of type float" in refused(capsys, "train", "--mixer_options.expansion", "x", *new)
    assert not (tmp_path / "new").exists()
    assert "model has seen, got '#'" in refused(capsys, "generate", run, "--prompt", "1#2")
    assert "temperature must be at least 0" in refused(capsys, "generate", run, "--temperature", "-1")
    assert "top_k must be at least 1" in refused(capsys, "generate", run, "--top-k", "0")
    assert "holds config.json" in refused(capsys, "generate", tmp_path)
    assert "must be the directory of a run" in refused(capsys, "eval", tmp_path)
    assert "model has seen, got" in refused(capsys, "eval", run, "--data", tmp_path / "short.txt")
    (tmp_path / "one.txt").write_text(text.read_text()[0])
    wanted = "--data must have at least 2 characters, got 1 in"
    assert wanted in refused(capsys, "eval", run, "--data", tmp_path / "one.txt")
    (tmp_path / "latin.yaml").write_bytes("# naïve".encode("latin-1"))
    assert "--config: must be a file of UTF-8" in refused(capsys, "train", "--config", tmp_path / "latin.yaml", *new)


def test_a_torn_model_is_named(run, tmp_path, capsys):
    for name in ("config.json", "train.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-10])
    assert "model.safetensors must be the weights" in refused(capsys, "generate", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer.json must be there, got no such file" in refused(capsys, "generate", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--steps", "many"],
        ["train", "--magic", "1"],
        ["train", "--step", "1"],
        ["bench", "--out", __file__],
        ["eval"],
        ["generate", "x", "--length", "x"],
        ["generate", "x", "--length", "-1"],
        ["generate", "x", "--seed", "-1"],
        ["generate", "x", "--prompt", ""],
        ["generate", "x", "--seed", str(2**64)],
        ["magic"],
    ],
)
def test_bad_arguments_end_with_2(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in ("train", "eval", "generate"))])
def test_help_is_help(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: minrnn") and max(map(len, shown.splitlines())) <= 120


def python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_info_needs_no_extra_and_the_rest_says_which():
    blocked = """
import sys
from importlib.abc import MetaPathFinder
EXTRAS = {"lightning", "jsonargparse", "rich", "tokenizers", "pooch", "safetensors", "matplotlib"}
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from minrnn.cli import main
assert main(["info"]) == 0
assert main(["--help"]) == 0
sys.exit(main(["train"]) + main(["generate", "run"]) + main(["eval", "run"]))
"""
    done = python(blocked, THP_MEM_ALLOC_ENABLE="1")
    assert done.returncode == 3, done.stderr
    for line in ("minrnn  ", "torch  ", "threads  ", "instruction set", "backend native", "huge pages", "extra rl"):
        assert line in done.stdout
    assert re.search(r"huge pages +on", done.stdout)
    assert done.stderr.count("which is not installed: pip install minrnn[train]") == 3


SMAPS, THP = Path("/proc/self/smaps_rollup"), Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not SMAPS.exists() or not THP.exists() or "[never]" in THP.read_text(), reason="no huge pages here")
@pytest.mark.parametrize("command", ["train", "bench"])
def test_huge_pages_are_in_use_when_they_are_said_to_be(command):
    after = f"""
import contextlib
from pathlib import Path
from minrnn.cli import main
with contextlib.suppress(SystemExit):
    main(["{command}", "--help"])
import torch
held = torch.ones(1 << 26)
print(Path("/proc/self/smaps_rollup").read_text())
"""
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", after], capture_output=True, text=True, check=True, env=environment)
    kilobytes = re.search(r"AnonHugePages: +(\d+) kB", done.stdout)
    assert kilobytes and int(kilobytes[1]) > 200_000


def test_ctrl_c_outside_the_steps_ends_with_130(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(minrnn.cli.COMMANDS, "info", interrupted)
    assert main(["info"]) == 130
