"""benchmarks/gpu.py without a GPU: every part on the CPU at small shapes."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import lstm_has_bfloat16
from minrnn.bench import check, gpu, gpu_report, gpu_scans, measure, table
from minrnn.bench.check import Case
from minrnn.bench.measure import Summary
from minrnn.bench.systems import SYSTEMS, Workload
from minrnn.ops import why_not

PATH = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
SMALL = Workload(2, 5, 4, 4)


def load_script():
    spec = importlib.util.spec_from_file_location("gpu_script", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script()


def dry_run(folder: Path) -> None:
    """Every part, as the command runs them; Triton's kernels, ours and accelerated-scan's, in the interpreter."""
    importlib.import_module("conftest")  # which mends the interpreter
    torch.set_num_threads(1)
    script = load_script()
    run = gpu.Run("cpu", folder / "cpu.json", time.monotonic() + 200, rounds=2)
    run.result["seed"] = 1
    backend = None if why_not("triton", torch.zeros(1)) else "triton"
    cases = [Case(op, "float32", 2, 37, 5, ("initial",)) for op in check.OPS]
    names = [*script.LAYERS, *gpu.LOOPS]
    measured = {
        "check": partial(gpu.correct, cases=cases, workers=0, backend=backend),
        "bandwidth": partial(gpu.bandwidth, shape=(2, 9, 4), dtype="bfloat16", bound=0.8),
        "layers at 5": partial(gpu.layers, load=SMALL, names=names),
        "layers at 9": partial(gpu.layers, load=Workload(2, 9, 4, 4), names=names),
        "layers in bfloat16": partial(gpu.layers, load=Workload(2, 5, 4, 4, dtype="bfloat16"), names=script.LAYERS),
        "layers in tf32": partial(gpu.layers, load=SMALL, names=["MinGRU", "products-2H"], tf32=True),
        "linear_scan": partial(gpu_scans.public_scan, batch=1, channels=2, length=16),
        "first calls": partial(gpu.first_calls, hidden=8),
        "graph": partial(gpu.graph, load=SMALL),
        "selective_scan": partial(gpu_scans.selective, batch=1, length=8, width=16, states=4, dtype="bfloat16"),
    }
    parts = [script.Part(name, name, 0, part) for name, part in measured.items()]
    script.execute(run, [*parts, script.Part("late", "what comes too late", 1e9, gpu.first_calls)])


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The result of a dry run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if importlib.util.find_spec("triton") else {})}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "cpu.json").read_text()), folder, done.stdout


def accelerated_scan() -> bool:
    return all(importlib.util.find_spec(name) for name in ("accelerated_scan", "triton"))


def test_every_part_ran_and_what_could_not_is_named(dry):
    result, _, _ = dry
    absent = [] if lstm_has_bfloat16() else ["nn.LSTM at (2, 5, 4, 4) bfloat16"]
    absent += [] if accelerated_scan() else ["linear_scan"]
    assert [each.split(": ")[0] for each in result["left_out"]] == [*absent, "graph", "what comes too late"]
    assert result["errors"] == []
    assert {each["op"] for each in result["checks"]} == set(check.OPS)
    # Not whether they are right to the last bit: that depends on who computes exp in the interpreter.
    assert all(each["error"] <= max(check.TOLERANCE[each["dtype"]]) for each in result["checks"])
    assert [len(result["first_call"][key]) for key in ("first", "again", "new")] == [2, 2, 5]
    assert result["first_call"]["kernels"] == result["first_call"]["kernels_of_new"] == 0
    assert {(each["what"], *each["seconds"])[:2] for each in result["scans"]} == {
        (what, name)
        for what in ("forward", "forward + backward")
        for name in (*(["linear_scan"] if accelerated_scan() else []), "selective_scan")
    }
    assert all(len(each["seconds"]) == 2 or "mambapy" in result["missing"] for each in result["scans"])


def test_all_systems_are_measured_side_by_side(dry):
    result, _, _ = dry
    for length, dtype in ((5, "float32"), (9, "float32"), (5, "bfloat16"), (5, "tf32")):
        points = {p["system"]: p for p in result["points"] if (p["length"], p["dtype"]) == (length, dtype)}
        here = ["MinGRU", "products-2H"] if dtype == "tf32" else [*load_script().LAYERS]
        here += gpu.LOOPS if dtype == "float32" else ()
        if dtype == "bfloat16" and not lstm_has_bfloat16():
            here.remove("nn.LSTM")
        assert set(points) == {name for name in here if not SYSTEMS[name].missing()}
        for name, point in points.items():
            assert point["seconds"]["median"] > 0 and point["peak_bytes"] >= 0
            assert (point["forward"] is None) == (name in gpu.LOOPS)
        assert points["MinGRU"]["over_floor"] > 0 and points["MinGRU"]["over_limit"]["count"] == 2
        assert dtype == "tf32" or points["MinGRU"]["speedup_over"].keys() >= {"nn.GRU"}


def test_what_is_promised_is_judged(dry):
    measures = [line["measure"].split(" at ")[0] for line in dry[0]["lines"]]
    wanted = [
        "bandwidth backward: copy_ / mingru_scan",
        "bandwidth forward: copy_ / mingru_scan",
        "first training step of MinGRU, nothing compiled before, s",
        "forward + backward: accelerated_scan.scalar / linear_scan",
        "forward: accelerated_scan.scalar / linear_scan",
        "kernels compiled for a new B or T",
        "nn.GRU / MinGRU",
        "peak memory, MinGRU / nn.GRU",
    ]
    assert sorted(set(measures)) == [name for name in wanted if accelerated_scan() or "accelerated" not in name]
    assert measures.count("nn.GRU / MinGRU") == 3
    for line in dry[0]["lines"]:
        came, bound = line["came"]["median"], line["bound"]
        assert line["met"] == (came <= bound if line["sign"] == "<=" else came >= bound)


def test_the_files_and_the_table_come_last(dry):
    result, folder, printed = dry
    assert printed.rstrip().endswith("\n".join(gpu_report.short(result)).rstrip())
    text = (folder / "cpu.md").read_text()
    assert all(line["measure"] in text for line in result["lines"])
    assert text.count("\n| (2, 9, 4, 4) | float32 |") == 1
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_has_all_that_is_asked(script):
    plan = script.plan()
    assert plan[0].name == "check"
    assert [part.name for part in plan[1:5]] == ["bandwidth"] * 4
    layers = [part.measure.keywords for part in plan if part.name == "layers"]
    shapes = {(w["load"].length, w["load"].input_size, w["load"].hidden_size, w["load"].dtype) for w in layers}
    assert shapes == {
        (*shape, dtype)
        for dtype in ("float32", "bfloat16")
        for shape in (*((2**n, 256, 256) for n in range(7, 17)), (1000, 10, 100), (4096, 64, 64))
    }
    for words in layers:
        assert {w.batch for w in [words["load"]]} == {64}
        assert ("GRU-loop" in words["names"]) <= (words["load"].length <= 4096)
        assert {"MinGRU", "nn.GRU", "nn.LSTM", "products-2H"} <= set(words["names"])
    long = [words["load"].length for words in layers[-4:]]
    assert long == [2**15, 2**15, 2**16, 2**16]  # what may be too much for a peer spoils nothing after it
    lengths = [part.measure.keywords["length"] for part in plan if part.name == "scan"]
    assert lengths == [2048, 4096, 8192, 16384, 32768, 65536]


def test_the_short_table_is_short_however_bad_it_is(script, dry):
    summary = vars(Summary.of([1.0]))
    points, lines = [], []
    for part in script.plan():
        if part.name == "layers":
            load = part.measure.keywords["load"]
            for name in part.measure.keywords["names"]:
                point = next(p for p in dry[0]["points"] if p["system"] == "MinGRU")
                shape = {key: getattr(load, key) for key in ("batch", "length", "input_size", "hidden_size", "dtype")}
                points.append({**point, **shape, "system": name})
            for what in ("nn.GRU / MinGRU", "peak memory, MinGRU / nn.GRU"):
                where = f"{what} at {table.at(load)} {load.dtype}"
                lines.append({"measure": where, "sign": ">=", "bound": 1, "came": summary, "met": False})
    lines += [{**lines[0], "measure": f"{kind} at here"} for kind in range(12)]
    wrong = [{**dry[0]["checks"][0], "status": "wrong", "why": "all of it"}] * 117
    scans = dry[0]["scans"][:1] * 16
    worst = {"points": points, "lines": lines, "checks": wrong, "scans": scans}
    worst |= {"left_out": ["much"] * 50, "errors": ["much"] * 50}
    assert len(gpu_report.short(dry[0] | worst)) < 100


def test_without_a_gpu_it_says_so_in_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(PATH)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"gpu.py: this needs an NVIDIA GPU, and torch {torch.__version__} finds none\n"
    assert done.stdout == ""


@pytest.fixture
def run(tmp_path):
    return gpu.Run("cpu", tmp_path / "x.json", time.monotonic() + 100, rounds=1)


def test_a_system_that_would_take_too_long_is_left_out(run):
    gpu.layers(run, SMALL, ["MinGRU", "GRU-loop"])
    for point in run.result["points"]:
        point["seconds"]["median"] = 2.0
    run.end = time.monotonic() + 100
    longer = Workload(2, 10, 4, 4)
    assert gpu._expected(run, "GRU-loop", longer, "float32") == 4
    assert gpu._expected(run, "GRU-loop", longer, "bfloat16") == 0
    gpu.layers(run, longer, ["GRU-loop"])
    assert run.result["left_out"] == ["GRU-loop at (2, 10, 4, 4) float32: no time for the 32 s that it would take"]


def test_who_has_no_room_is_left_out_the_largest_first(run, monkeypatch):
    real = measure.training_step

    def training_step(module, *others):
        if type(module).__name__ == "LSTM":
            raise torch.OutOfMemoryError("out of memory\nthat is all")
        return real(module, *others)

    monkeypatch.setattr(measure, "training_step", training_step)
    peaks = {"MinGRU": 1.0, "nn.LSTM": 3.0, "MinLSTM": 2.0}
    times, forwards, _ = gpu._timed(run, SMALL, peaks, "here")
    assert times.keys() == forwards.keys() == {"MinGRU", "MinLSTM"}
    assert run.result["left_out"] == ["nn.LSTM at here: out of memory"]


def test_who_fails_beside_the_others_is_left_out(run, monkeypatch):
    real = measure.training_step

    def fail():
        raise RuntimeError("no such algorithm")

    def training_step(module, *others):
        return fail if type(module).__name__ == "GRU" else real(module, *others)

    monkeypatch.setattr(measure, "training_step", training_step)
    times, forwards, _ = gpu._timed(run, SMALL, {"MinGRU": 3.0, "nn.GRU": 1.0}, "here")
    assert times.keys() == forwards.keys() == {"MinGRU"}
    assert run.result["left_out"] == ["nn.GRU at here: RuntimeError: no such algorithm"]


def test_the_table_comes_even_where_cuda_is_gone(script, run, monkeypatch, capsys):
    def gone(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", gone)
    monkeypatch.setattr(script, "draw", gone)
    monkeypatch.setattr(run, "device", "cuda")
    assert not script.execute(run, [script.Part("one", "one thing", 0, gone), script.Part("two", "another", 0, gone)])
    assert [each.split(": ")[0] for each in run.result["errors"]] == ["one thing", "another", "the figure"]
    assert "ERRORS:" in capsys.readouterr().out and run.path.with_suffix(".md").exists()


def test_a_system_that_fails_is_left_out(run, monkeypatch):
    def fail(load):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(SYSTEMS, "nn.GRU", gpu.systems.System(fail))
    gpu.layers(run, SMALL, ["MinGRU", "nn.GRU"])
    monkeypatch.setitem(SYSTEMS, "MinLSTM", gpu.systems.System(fail))
    gpu.layers(run, SMALL, ["MinLSTM"])
    theirs, ours = (f"{name} at (2, 5, 4, 4) float32: RuntimeError: no such kernel" for name in ("nn.GRU", "MinLSTM"))
    assert run.result["left_out"] == [theirs, ours]
    assert run.result["errors"] == [ours]
    assert [point["system"] for point in run.result["points"]] == ["MinGRU"]


@pytest.mark.parametrize(
    ("load", "bounds"),
    [
        (Workload(64, 4096, 256, 256), {"nn.GRU / MinGRU": 10, "peak memory, MinGRU / nn.GRU": 0.6}),
        (Workload(64, 1000, 10, 100), {"nn.GRU / MinGRU": 1, "peak memory, MinGRU / nn.GRU": 0.6}),
        (
            Workload(64, 4096, 64, 64),
            {"nn.GRU / MinGRU": 1, "peak memory, MinGRU / nn.GRU": 0.6, "GRU-loop / MinGRU": 1000},
        ),
    ],
)
def test_the_bounds(run, load, bounds):
    times = {"MinGRU": [1.0], "nn.GRU": [9.0], "GRU-loop": [2000.0]}
    gpu.judge_layers(run, load, times, {"MinGRU": 5.0, "nn.GRU": 10.0}, "here")
    lines = {line["measure"].removesuffix(" at here"): line for line in run.result["lines"]}
    assert {name: line["bound"] for name, line in lines.items()} == bounds
    assert lines["nn.GRU / MinGRU"]["met"] == (bounds["nn.GRU / MinGRU"] == 1)
    assert lines["peak memory, MinGRU / nn.GRU"]["came"]["median"] == 0.5


def test_tf32_is_on_for_its_part_only(run, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "_layers", lambda *args: seen.append((torch.get_float32_matmul_precision(), args[-1])))
    gpu.layers(run, SMALL, [], tf32=True)
    gpu.layers(run, SMALL, [])
    assert seen == [("high", "tf32"), ("highest", "float32")]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("takes", "calls"), [(0.5, 1), (0.1, 2), (0.003, 5), (1e-9, 1001)])
def test_gpu_time_is_between_events(monkeypatch, takes, calls):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def step():
        now[0] += takes
        called.append(1)

    called = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert measure.gpu_seconds(step) == pytest.approx(takes)
    assert len(called) == calls


def test_accelerated_scan_by_either_name(monkeypatch):
    found = {"accelerated_scan.triton": type("module", (), {"scan": staticmethod(print)})}

    def import_module(name):
        if name not in found:
            raise ModuleNotFoundError(name)
        return found[name]

    monkeypatch.setattr(gpu_scans.importlib, "import_module", import_module)
    assert gpu_scans.accelerated() == ("accelerated_scan.triton", print)
    found.clear()
    with pytest.raises(table.Skipped, match="accelerated_scan, or Triton, is not installed"):
        gpu_scans.accelerated()


if __name__ == "__main__":
    dry_run(Path(sys.argv[1]))
