"""`minrnn reproduce` as it is typed."""

import re
import signal
import subprocess
import sys
import time

import pytest

from minrnn import cli
from minrnn.reproduce.cells import Results
from minrnn.reproduce.experiments import cells


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nothing"], "experiments must be of .*, got 'nothing'"),
        (["--scale", "big"], "scale must be one of smoke, laptop, paper, got 'big'"),
        (["layers", "--systems", "x"], "systems must be of .*, got 'x'"),
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["lm", "--data", "none.txt"], "--data: must be a file, got 'none.txt'"),
        (["rl", "--scale", "paper", "--data", __file__], "--data: must be a directory, got"),
        (["lm", "rl", "--scale", "paper", "--data", "."], "--data: a file for lm and best, a directory for rl"),
        (["lm", "--scale", "smoke", "--data", __file__], "--data: none of these experiments reads it at this scale"),
        (["layers", "--report"], "--report: the page is of all that is there"),
    ],
)
def test_bad_arguments_are_named(arguments, match, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments])
    assert stop.value.code == 2 and re.search(match, capsys.readouterr().err)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_at_work_is_saved_and_no_process_is_left(signum, tmp_path):
    """As a batch system ends a job, or a terminal that goes away."""
    command = [sys.executable, "-m", "minrnn.cli", "reproduce", "layers", "--systems", "minGRU", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    work = tmp_path / "work" / "layers" / "mingru-1-layer-0"
    while not (work / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    process.communicate(timeout=60)  # the pipe is closed: the worker has ended too
    assert process.returncode == 128 + signum
    assert (work / "checkpoint.pt").exists() and not (tmp_path / "layers").exists()


@pytest.mark.parametrize("arguments", [["--report"], ["listops"]])
def test_the_folder_of_another_scale_is_left_alone(arguments, tmp_path, capsys):
    results = Results(tmp_path)
    for cell in cells(["layers"], "smoke"):
        results.write(cell, {"result": {}, "seconds": 1.0, "facts": {}})
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2 and "results are not mixed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["layers"]


def test_without_matplotlib_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [each for each in sys.modules if each.startswith("minrnn.reproduce")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["reproduce", "layers", "--scale", "smoke"]) == 1
    assert "needs matplotlib, which is not installed: pip install minrnn[train]" in capsys.readouterr().err
