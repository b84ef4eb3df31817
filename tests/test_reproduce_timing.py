"""The cells of `minrnn reproduce` that measure time: what is timed is right, and set side by side."""

import dataclasses
import re

import pytest
import torch

from conftest import QUIET
from minrnn.bench import measure
from minrnn.bench.systems import SYSTEMS
from minrnn.models import LanguageModel
from minrnn.reproduce import measure_timing, report_timing
from minrnn.reproduce.experiments import EXPERIMENTS, cells
from minrnn.reproduce.page import Found

TIMED = cells(["speed", "inference"], "smoke")


def find(experiment, **config):
    """The smoke cell with these settings."""
    (cell,) = (each for each in TIMED if each.experiment == experiment and config.items() <= each.config.items())
    return cell


def changed(cell, **config):
    return dataclasses.replace(cell, config={**cell.config, **config})


@pytest.fixture
def rounds(monkeypatch):
    """Each call of `measure.alternate` in this test: its steps and their times."""
    calls, alternate = [], measure.alternate

    def spy(steps, *args):
        times = alternate(steps, *args)
        calls.append((steps, times))
        return times

    monkeypatch.setattr(measure, "alternate", spy)
    return calls


@pytest.fixture(scope="module")
def measured():
    """Each smoke cell of `inference` with its record."""
    return [(cell, measure_timing.inference(cell, QUIET)) for cell in TIMED if cell.experiment == "inference"]


def at(record, system):
    (point,) = (point for point in record["points"] if point["system"] == system)
    return point


def test_a_training_step_of_every_system(rounds, monkeypatch):
    monkeypatch.setattr(measure, "peak_memory", lambda name, load: 1000.0 + load.length)
    cell = find("speed", length=4)
    record = measure_timing.speed(cell, QUIET)
    ((_, times),) = rounds
    assert [point["system"] for point in record["points"]] == cell.config["systems"]
    assert record["left_out"] == {} and record["device"] == "cpu"
    for point in record["points"]:
        assert {name: point[name] for name in ("length", "batch", "width", "peak_bytes")} == {
            "length": 4,
            "batch": 2,
            "width": 8,
            "peak_bytes": 1004.0,
        }
        assert point["seconds"] == dataclasses.asdict(measure.Summary.of(times[point["system"]]))
        assert point["seconds"]["count"] == cell.config["rounds"]
        for other, ratio in point["speedup_over"].items():
            assert ratio == dataclasses.asdict(measure.ratio(times, other, point["system"]))
    assert at(record, "MinGRU")["speedup_over"].keys() == {"GRU-loop", "nn.GRU", "minGRU-pytorch", "mamba"}
    assert at(record, "MinLSTM")["speedup_over"].keys() == {"LSTM-loop", "nn.LSTM", "mamba"}


def test_peak_memory_is_of_a_process_of_its_own():
    cell = changed(find("speed", length=4), systems=["MinGRU"], batch=8, length=4096, width=32)
    (point,) = measure_timing.speed(cell, QUIET)["points"]
    assert point["peak_bytes"] > 3 * 4 * 8 * 4096 * 32  # the projection and h at least


def test_time_is_taken_by_the_clock_of_the_device(monkeypatch):
    """The GPU's only where the config leaves the device open."""
    clocks = {"cpu": lambda step: 1.0, "cuda": lambda step: 2.0}
    monkeypatch.setattr(measure, "clock", clocks.__getitem__)
    monkeypatch.setattr(measure, "peak_memory", lambda name, load: 0.0)
    wanted = changed(find("speed", length=4), systems=["MinGRU"]), find("inference", batch=2, length=4)
    for cell, measured, parts in zip(
        wanted, (measure_timing.speed, measure_timing.inference), (["seconds"], ["prefill", "step"]), strict=True
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            closed = measured(cell, QUIET)
        opened = measured(changed(cell, device="auto"), QUIET)
        for record, device in ((closed, "cpu"), (opened, "cuda" if torch.cuda.is_available() else "cpu")):
            assert record["device"] == device
            for point in record["points"]:
                assert {point[part]["median"] for part in parts} == {clocks[device](None)}


def test_systems_are_left_out_by_length_by_need_and_by_failure(monkeypatch):
    broken = dataclasses.replace(SYSTEMS["nn.GRU"], build=lambda load: torch.nn.Linear(load.input_size + 1, 1))
    absent = dataclasses.replace(SYSTEMS["minGRU-pytorch"], package="no_such_package")
    monkeypatch.setitem(SYSTEMS, "nn.GRU", broken)
    monkeypatch.setitem(SYSTEMS, "minGRU-pytorch", absent)
    monkeypatch.setattr(measure, "peak_memory", lambda name, load: 0.0)
    cell = find("speed", length=8)
    record = measure_timing.speed(cell, QUIET)
    assert [point["system"] for point in record["points"]] == ["nn.LSTM", "MinLSTM", "MinGRU", "mamba"]
    left_out = record["left_out"]
    assert left_out.keys() == {"LSTM-loop", "GRU-loop", "nn.GRU", "minGRU-pytorch"}
    assert left_out["GRU-loop"] == "measured up to length 4"
    assert "no_such_package is not installed" in left_out["minGRU-pytorch"]
    assert re.match("mat1 and mat2 shapes cannot be multiplied", left_out["nn.GRU"])


def test_contexts_of_every_system(measured):
    for cell, record in measured:
        config = cell.config
        expected = [name for name in config["systems"] if config["longest"].get(name, 99) >= config["length"]]
        assert [point["system"] for point in record["points"]] == expected
        assert record["left_out"].keys() == config["systems"].keys() - set(expected)
        for point in record["points"]:
            assert (point["batch"], point["length"]) == (config["batch"], config["length"])
            for part in ("prefill", "step"):
                assert 0 < point[part]["q1"] <= point[part]["median"] <= point[part]["q3"]
                assert point[part]["count"] == config["rounds"]
                assert point[f"{part}_speedup_over"].keys() == set(SYSTEMS[point["system"]].over) & set(expected)
    assert {record["left_out"].get("attention") for _, record in measured} == {None, "measured up to length 4"}


def test_the_report_says_who_is_left_out_and_where():
    left_out = {"batch 8": [16, 32], "batch 64": [32]}
    found = [
        Found(cell, "done", {"points": [], "left_out": {"attention": "measured up to length 8"}})
        for batch, lengths in left_out.items()
        for length in lengths
        for cell in [dataclasses.replace(changed(TIMED[-1], length=length), system=batch)]
    ]
    gaps = report_timing.summarize("inference", EXPERIMENTS["inference"], found, {}).gaps
    assert gaps == [
        "attention: measured up to length 8 (batch 8, at length 16, 32).",
        "attention: measured up to length 8 (batch 64, at length 32).",
    ]


def test_what_is_timed_is_a_context_and_the_token_after_it(rounds):
    cell = find("inference", batch=2, length=4)
    record = measure_timing.inference(cell, QUIET)
    (prefill, prefills), (step, steps) = rounds
    assert prefill.keys() == step.keys() == cell.config["systems"].keys()
    mixers = set()
    for name in step:
        model, (context,), (token, state) = step[name].func, prefill[name].args, step[name].args
        assert isinstance(model, LanguageModel) and model is prefill[name].func and not model.training
        assert context.shape == (2, 4) and token.shape == (2, 1)
        mixers.add(model.config.backbone.mixer)
        with torch.inference_mode():
            whole, _ = model(torch.cat([context, token], 1))
            read, _ = prefill[name]()
            more, _ = step[name]()
            _, reached = model(context)
        torch.testing.assert_close(read, whole[:, :-1])
        torch.testing.assert_close(more, whole[:, -1:])
        torch.testing.assert_close(state, reached)
        point = at(record, name)
        for part, times in (("prefill", prefills), ("step", steps)):
            assert point[part] == dataclasses.asdict(measure.Summary.of(times[name]))
            for other, ratio in point[f"{part}_speedup_over"].items():
                assert ratio == dataclasses.asdict(measure.ratio(times, other, name))
    assert mixers == {"lstm_loop", "gru_loop", "lstm", "gru", "minlstm", "mingru", "mamba", "attention"}


def test_only_the_cache_of_attention_grows():
    def state_bytes(length):
        cell = changed(find("inference", batch=2, length=4), length=length, longest={})
        return {point["system"]: point["state_bytes"] for point in measure_timing.inference(cell, QUIET)["points"]}

    short, long = state_bytes(4), state_bytes(12)
    assert short["MinGRU"] == short["GRU-loop"] == short["nn.GRU"] == 4 * 2 * 8
    assert short["LSTM-loop"] == 2 * short["GRU-loop"]
    assert long["attention"] - short["attention"] == 4 * 2 * 2 * 8 * (12 - 4)  # keys and values
    assert {name for name in short if short[name] != long[name]} == {"attention"}


def test_who_cannot_read_a_context_is_left_out(monkeypatch):
    """As where memory does not suffice for one of them."""
    forward = LanguageModel.forward

    def failing(self, *args, **kwargs):
        if self.config.backbone.mixer == "mamba":
            raise torch.OutOfMemoryError("no memory\nat all")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "forward", failing)
    record = measure_timing.inference(find("inference", batch=2, length=4), QUIET)
    assert record["left_out"] == {"mamba": "no memory"}
    assert at(record, "MinGRU")["step_speedup_over"].keys() == {"nn.GRU", "GRU-loop"}


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_lengths_of_the_figures(scale):
    by_length = {
        name: {(each.config["batch"], each.config["length"]) for each in cells([name], scale)}
        for name in ("speed", "inference")
    }
    assert {length for _, length in by_length["speed"]} == {64 * 2**i for i in range(9)}
    assert {batch for batch, _ in by_length["speed"]} == {64}
    assert {(8, 65536), *((batch, 2048) for batch in (8, 16, 32, 64))} <= by_length["inference"]
    for each in cells(["speed", "inference"], scale):
        assert set(each.config["longest"]) <= set(each.config["systems"]) <= set(SYSTEMS)
