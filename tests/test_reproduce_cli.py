"""`minrnn reproduce` as it is typed."""

import os
import pty
import re
import select
import signal
import subprocess
import sys

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
    terminal, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "minrnn.cli", "reproduce", "layers", "--systems", "minGRU", "--out", str(tmp_path)],
        stdin=subprocess.DEVNULL, stdout=screen, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever runs the tests ignores
    )  # fmt: skip
    os.close(screen)
    work = tmp_path / "work" / "layers" / "mingru-1-layer-0"
    try:
        while not (work / "metrics.jsonl").exists():
            assert process.poll() is None
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 4096)
        if signum == signal.SIGHUP:
            os.close(terminal)
        process.send_signal(signum)
        process.communicate(timeout=60)  # the pipe is closed: the worker has ended too
    finally:
        process.kill()
        if signum != signal.SIGHUP:
            os.close(terminal)
    assert process.returncode == 128 + signum
    assert (work / "checkpoint.pt").exists() and not (tmp_path / "layers").exists()


@pytest.mark.parametrize("arguments", [["--report"], ["listops"]])
@pytest.mark.parametrize("experiment", ["layers", "speed"])
def test_the_folder_of_another_scale_is_left_alone(experiment, arguments, tmp_path, capsys):
    """Also where files of the two have other names, and beside a cell that both scales have."""
    results = Results(tmp_path)
    (common,) = (cell for cell in cells(["rl"], "paper") if cell in cells(["rl"], "laptop"))
    for cell in [common, *cells([experiment], "paper")]:
        results.write(cell, {"result": {}, "seconds": 1.0, "facts": {}})
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments, "--out", str(tmp_path)])
    wanted = rf"--out: must be a folder of scale laptop, got .*, which has {experiment}/.* of scale paper: results"
    assert stop.value.code == 2 and re.search(wanted, capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"rl", experiment}


def test_without_matplotlib_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [each for each in sys.modules if each.startswith("minrnn.reproduce")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["reproduce", "layers", "--scale", "smoke"]) == 1
    assert "needs matplotlib, which is not installed: pip install minrnn[train]" in capsys.readouterr().err
