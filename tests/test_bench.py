"""`minrnn bench`: the arithmetic of the measuring, and the command end to end."""

import contextlib
import io
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from conftest import lstm_has_bfloat16
from minrnn.bench import facts, main, measure, memory, report, systems, table
from minrnn.bench.systems import SYSTEMS, Products, Workload

TINY = Workload(batch=2, length=5, input_size=3, hidden_size=4)


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if not system.mixes])
@pytest.mark.parametrize(
    "load", [TINY, Workload(2, 5, 3, 4, layers=2), Workload(2, 5, 4, 4, dtype="bfloat16")], ids=str
)
def test_every_system_maps_the_workload_and_has_all_gradients(name, load):
    if reason := SYSTEMS[name].missing():
        pytest.skip(reason)
    if name == "nn.LSTM" and load.dtype == "bfloat16" and not lstm_has_bfloat16():
        pytest.skip("torch's LSTM has no bfloat16 kernel for this processor")
    module, x = systems.build([name], load)[name], load.input()
    results = measure.outputs(module, x, load)
    width = {"products-2H": 2, "products-3H": 3}.get(name, 1) * load.hidden_size
    assert [result.shape for result in results] == [(load.batch, load.length, width)] * len(results)
    measure.training_step(module, x, measure.Gradients(), load)()
    for parameter in [x, *module.parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_an_input_without_gradient_stays_without():
    load = Workload(2, 5, 3, 4, first_layer=True)
    x = load.input()
    measure.training_step(systems.build(["MinGRU"], load)["MinGRU"], x, measure.Gradients(), load)()
    assert x.grad is None


def test_the_limit_has_exactly_the_weights_of_the_layer():
    for limit, layer in (("products-2H", "MinGRU"), ("products-3H", "MinLSTM")):
        for layers in (1, 3):
            load = Workload(2, 5, 3, 4, layers=layers)
            shapes = [
                sorted(tuple(p.shape) for p in systems.build([name], load)[name].parameters() if p.dim() == 2)
                for name in (limit, layer)
            ]
            assert shapes[0] == shapes[1]
    assert len(Products(Workload(2, 5, 3, 4, layers=3), 2)(torch.randn(2, 5, 3))) == 3


def test_systems_get_the_same_output_gradient():
    gradients = measure.Gradients()
    assert gradients.like(torch.zeros(2, 3)) is gradients.like(torch.ones(2, 3))
    assert gradients.like(torch.zeros(2, 3)) is not gradients.like(torch.zeros(3, 2))


def test_steps_take_turns_and_the_slow_one_drops_out():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.02)

    times = measure.alternate({"fast": lambda: calls.append("fast"), "slow": slow}, rounds=6, budget=0.03)
    assert calls[:6] == ["fast", "slow", "fast", "slow", "slow", "fast"]  # the warm-up, one round, one round backwards
    assert len(times["fast"]) == 6
    assert len(times["slow"]) == measure.LEAST_ROUNDS
    assert min(times["slow"]) >= 0.02


def test_a_ratio_pairs_what_ran_in_the_same_round():
    summary = measure.ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0, 100.0]}, "a", "b")
    assert (summary.median, summary.q1, summary.q3, summary.count) == (2.0, 1.5, 2.5, 3)
    assert measure.Summary.of([5.0]) == measure.Summary(5.0, 5.0, 5.0, 1)


@pytest.mark.skipif(not memory.STATUS.exists(), reason="needs Linux's /proc")
def test_peak_memory_counts_what_a_step_adds():
    load = Workload(batch=8, length=4096, input_size=64, hidden_size=64)
    unit = 4 * load.batch * load.length * load.hidden_size
    # An nn.Linear of 2H: the output, its expanded or dense gradient, the input's gradient.
    assert 3 * unit <= measure.peak_memory("products-2H", load) <= 7 * unit


def test_a_failed_child_says_which_system_and_why():
    with pytest.raises(RuntimeError, match="peak memory of nothing: KeyError"):
        measure.peak_memory("nothing", TINY)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A small sweep: its folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    flags = "--batch 2 --lengths 4 9 --input-size 3 --hidden-size 4 --repeats 3 --systems MinGRU nn.GRU GRU-loop"
    with contextlib.redirect_stdout(printed):
        assert main([*flags.split(), "--out", str(folder)]) == 0
    return folder, printed.getvalue()


def test_sweep_end_to_end(swept):
    folder, printed = swept
    result = json.loads((folder / f"{facts.machine()}-lengths.json").read_text())
    about = result["facts"]
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert {
        "machine",
        "cpu",
        "cores",
        "commit",
        "minrnn",
        "peers",
        "huge_pages",
        "memory_method",
        "date",
    } <= about.keys()
    assert result["copy_gb_per_s"] > 0
    assert result["settings"]["workload"]["hidden_size"] == 4
    names = ["products-2H", "MinGRU", "nn.GRU", "GRU-loop"]
    assert [(p["length"], p["system"]) for p in result["points"]] == [(t, name) for t in (4, 9) for name in names]
    for point in result["points"]:
        seconds = point["seconds"]
        assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert seconds["count"] == 3
        assert point["peak_bytes"] >= 0
    mingru = result["points"][1]
    assert mingru["over_limit"]["count"] == 3
    assert mingru["speedup_over"].keys() == {"nn.GRU", "GRU-loop"}
    rows = [line.split() for line in printed.splitlines()]
    assert [(int(row[0]), row[1]) for row in rows if row and row[0].isdigit()] == [
        (t, n) for t in (4, 9) for n in names
    ]
    assert "GB/s" in printed


@pytest.mark.parametrize(("count", "words"), [(1, "a CPU, 1 thread, torch 2"), (2, "a CPU, 2 threads, torch 2")])
def test_a_figure_says_where_it_is_from(count, words):
    assert report.host({"cpu": "a CPU", "threads": count, "torch": "2"}) == words


def test_the_figure_is_a_png(swept):
    pytest.importorskip("matplotlib")
    picture = (swept[0] / f"{facts.machine()}-lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


def test_a_system_that_runs_out_of_memory_is_a_row_without_memory(tmp_path, monkeypatch, capsys):
    def killed(name, load):
        raise RuntimeError(f"peak memory of {name}: exit status -9")

    monkeypatch.setattr(measure, "peak_memory", killed)
    flags = "--batch 2 --lengths 4 --input-size 3 --hidden-size 4 --repeats 2 --systems MinGRU"
    assert main([*flags.split(), "--out", str(tmp_path)]) == 0
    assert "peak memory of MinGRU: exit status -9" in capsys.readouterr().out
    result = json.loads((tmp_path / f"{facts.machine()}-lengths.json").read_text())
    assert [point["peak_bytes"] for point in result["points"]] == [None, None]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, AssertionError])
def test_a_system_that_cannot_run_the_workload_is_left_out(kind, tmp_path, monkeypatch, capsys):
    def refuse(load):
        raise kind("no such primitive")

    monkeypatch.setitem(SYSTEMS, "nn.LSTM", systems.System(refuse))
    monkeypatch.setattr(measure, "peak_memory", lambda name, load: 1.0)
    flags = "--batch 2 --lengths 4 4 --input-size 3 --hidden-size 4 --repeats 2 --systems MinLSTM nn.LSTM"
    assert main([*flags.split(), "--out", str(tmp_path)]) == 0
    assert "nn.LSTM is left out: no such primitive" in capsys.readouterr().out
    result = json.loads((tmp_path / f"{facts.machine()}-lengths.json").read_text())
    assert [point["system"] for point in result["points"]] == ["products-3H", "MinLSTM"]


def test_every_system_has_a_style_of_its_own():
    assert report.STYLES.keys() == {name for name, system in SYSTEMS.items() if not system.mixes}
    looks = [tuple(sorted((key, str(value)) for key, value in style.items())) for style in report.STYLES.values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--batch 0", "argument --batch: must be a whole number of at least 1, got '0'"),
        ("--lengths 4 -1", "argument --lengths: "),
        ("--lengths 1.5", "argument --lengths: must be a whole number of at least 1, got '1.5'"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--systems nothing", "argument --systems: invalid choice: 'nothing'"),
        ("--rows cell", "--rows has no meaning without --table"),
        ("--table --hidden-size 3", "--hidden-size has no meaning with --table"),
        ("--table --rows nothing", "argument --rows: invalid choice: 'nothing'"),
        ("--width 3", "unrecognized arguments"),
    ],
)
def test_bad_flags_exit_with_a_sentence(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--systems", "minGRU-pytorch"])
    assert "minGRU_pytorch is not installed" in capsys.readouterr().err


def test_workload_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Workload(length=0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        Workload(dtype="int8")


PLAN = table.Plan(repeats=3)


@pytest.mark.parametrize(
    ("row", "lines"),
    [
        (lambda: table.layers(TINY, 1.0, 3.0, 2.0, PLAN), 3),
        (lambda: table.peer(TINY, 5.0, PLAN), 1),
        (lambda: table.scan(TINY, 0.7, PLAN), 3),
        (lambda: table.sigmoid(TINY, 1.1, PLAN), 1),
        (lambda: table.bfloat16(TINY, 0.9, PLAN), 1),
        (lambda: table.threads(TINY, 1.1, PLAN), 1),
        (lambda: table.cell(4, 1.0, PLAN, calls=3), 2),
        (lambda: table.importing(0.15, PLAN), 1),
    ],
    ids=["layers", "peer", "scan", "sigmoid", "bfloat16", "threads", "cell", "import"],
)
def test_every_row_of_the_table_can_be_measured(row, lines):
    torch.set_num_threads(2)
    try:
        measured = row()
    except table.Skipped as reason:
        pytest.skip(str(reason))
    assert torch.get_num_threads() == 2
    assert len(measured) == lines
    for line in measured:
        assert math.isfinite(line.came.median)
        assert line.measure in str(line)


def test_the_memory_row_is_a_quotient_of_peaks(monkeypatch):
    monkeypatch.setattr(measure, "peak_memory", lambda name, load: {"MinGRU": 3.0, "nn.GRU": 8.0}[name])
    (line,) = table.memory(TINY, 0.42, PLAN)
    assert line.came.median == 0.375 and line.met


def test_a_line_is_met_on_the_right_side_of_its_bound():
    came = measure.Summary(1.0, 0.9, 1.1, 3)
    assert table.Line("", "<=", 1.0, came, {}).met and table.Line("", ">=", 1.0, came, {}).met
    assert not table.Line("", "<=", 0.99, came, {}).met and not table.Line("", ">=", 1.01, came, {}).met


@pytest.fixture
def two_rows(monkeypatch):
    """A table of two rows that only count how often they are measured."""
    measured = []

    def row(name, value, plan):
        measured.append(name)
        return [table.Line(name, "<=", 1.0, measure.Summary.of([value]), {})]

    rows = {"good": lambda plan: row("good", 0.5, plan), "bad": lambda plan: row("bad", 2.0, plan)}
    monkeypatch.setattr(table, "ROWS", rows)
    monkeypatch.setattr(facts, "_commit", lambda: "abc")
    return measured


def test_the_table_goes_on_where_it_stopped(two_rows, tmp_path, capsys):
    assert main(["--table", "--rows", "good", "--out", str(tmp_path)]) == 0
    assert main(["--table", "--out", str(tmp_path)]) == 1  # a bound is not met
    assert two_rows == ["good", "bad"]
    assert "1 of 2 lines met" in capsys.readouterr().out
    main(["--table", "--rows", "bad", "--out", str(tmp_path)])
    assert two_rows == ["good", "bad", "bad"]
    rows = json.loads((tmp_path / f"{facts.machine()}.json").read_text())["rows"]
    assert rows["bad"][0]["met"] is False and rows["good"][0]["met"] is True


def test_other_code_starts_a_new_table(two_rows, tmp_path, monkeypatch):
    main(["--table", "--rows", "good", "--out", str(tmp_path)])
    monkeypatch.setattr(facts, "_commit", lambda: "def")
    main(["--table", "--out", str(tmp_path)])
    assert two_rows == ["good", "good", "bad"]
    monkeypatch.setattr(facts, "_commit", lambda: "def-changed")
    main(["--table", "--out", str(tmp_path)])
    main(["--table", "--out", str(tmp_path)])
    assert two_rows[3:] == ["good", "bad"] * 2  # nobody knows whether changed sources are the same sources


def test_a_row_that_cannot_run_here_says_so(two_rows, tmp_path, monkeypatch, capsys):
    def refuse(plan):
        raise table.Skipped("no such instructions")

    monkeypatch.setitem(table.ROWS, "bad", refuse)
    assert main(["--table", "--out", str(tmp_path)]) == 0
    assert "bad: not measured, no such instructions" in capsys.readouterr().out


def test_bench_needs_no_extra():
    heavy = {"matplotlib", "rich", "lightning", "jsonargparse", "minGRU_pytorch"}
    code = f"import sys, minrnn.bench; sys.exit(', '.join({heavy} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
