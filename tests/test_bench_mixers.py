"""`minrnn bench --mixers`: its systems, its limits, its promises and its figure."""

import json

import pytest
import torch

from minrnn.bench import cli, facts, measure, mixers, products, sweep, systems
from minrnn.bench.measure import Summary
from minrnn.bench.systems import Workload
from minrnn.mixers import MIXERS, make_mixer

SMALL = Workload(2, 16, 32, 32)


@pytest.mark.parametrize("name", systems.installed(mixes=True))
def test_every_system_keeps_the_width_and_has_all_gradients(name):
    module, x = systems.build([name], SMALL)[name], SMALL.input()
    (result,) = measure.outputs(module, x, SMALL)
    assert result.shape == x.shape
    measure.training_step(module, x, measure.Gradients(), SMALL)()
    assert x.grad is not None and (name == "rwkv4" or x.grad.abs().sum() > 0)  # RWKV begins with nothing to say
    # xlstm's mLSTM has gates that see nothing of their biases' gradient at so short a length; ours have all.
    if name in MIXERS:
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_products_of_a_step_are_its_products():
    mixer, x = make_mixer("mingru", 8, {}), torch.randn(2, 5, 8, requires_grad=True)

    def step():
        mixer(x)[0].sum().backward()

    with products._Recorder() as recorder:
        step()
    shapes = sorted(
        (func._schema.name, *(arg[0] for arg in args if isinstance(arg, tuple))) for func, args, _ in recorder.calls
    )
    forward = [call for call in shapes if call[0] == "aten::addmm"]
    # Two linear maps, 8 to 16 and 8 to 8: a product each forward, two each backward.
    assert forward == [("aten::addmm", (8,), (10, 8), (8, 8)), ("aten::addmm", (16,), (10, 8), (8, 16))]
    assert len(shapes) == 6
    with products._Recorder() as again:
        products.alone(step)()
    assert [(f, a) for f, a, _ in again.calls[len(recorder.calls) :]] == [(f, a) for f, a, _ in recorder.calls]
    assert products.alone(lambda: torch.ones(3) + 1) is None


def point(system, length=2048, seconds=1.0, peak=1e6, over=None, speedups=None):
    return {
        "length": length,
        "system": system,
        "parameters": 3,
        "state_size": 4,
        "seconds": vars(Summary.of([seconds])),
        "over_limit": vars(Summary.of([over])) if over else None,
        "speedup_over": {name: vars(Summary.of([ratio])) for name, ratio in (speedups or {}).items()},
        "peak_bytes": peak,
    }


def test_promises_are_judged_by_what_came():
    result = {
        "settings": {"lengths": [512, 2048]},
        "points": [
            point("mamba", over=2.0, peak=2e6, speedups={"mambapy": 4.0, "transformers-mamba": 9.0}),
            point("mambapy", peak=1e7),
            point("transformers-mamba"),
            point("mingru", over=1.1, speedups={"aaren": 2.5}),
            point("aaren", over=3.5),
            point("gru", over=9.0),
            point("mamba", length=512, over=9.0),
            point("slstm", length=512, speedups={"xlstm-slstm": 7.0}),
            point("slstm", over=99.0),
            point("xlstm-slstm", length=512),
        ],
    }
    lines = {line.measure: line.met for line in mixers.promises(result)}
    assert lines == {
        "mambapy / mamba at (8, 2048, 256)": True,
        "transformers-mamba / mamba at (8, 2048, 256)": False,
        "xlstm-slstm / slstm at (8, 512, 256)": True,
        "aaren / mingru at (8, 2048, 256)": False,
        "peak memory, mamba / mambapy at (8, 2048, 256)": True,
        "mingru / its own products": True,
        "mamba / its own products": True,
        "aaren / its own products": False,
    }


def test_a_system_ends_where_a_step_would_take_too_long_or_too_much(capsys):
    plan = sweep.Sweep(SMALL, (512, 1024, 2048), ("attention",))
    grown = [point("a", 512, 10.0), point("a", 1024, 30.0), point("b", 512, 1.0, 1e9), point("b", 1024, 1.0, 1e10)]
    assert sweep._affords(plan, "a", 1024, grown[:1])
    assert not sweep._affords(plan, "a", 2048, grown)
    assert "a ends before length 2048: a step would take about 90 s" in capsys.readouterr().out
    assert not sweep._affords(plan, "b", 2048, grown)
    assert sweep._affords(plan, "b", 1100, [point("b", 512), point("b", 1024)])


def test_the_command_measures_mixers_and_draws_their_growth(tmp_path, capsys):
    arguments = [
        "--mixers",
        "--systems",
        "mingru",
        "minlstm",
        "--batch",
        "1",
        "--hidden-size",
        "16",
        "--input-size",
        "16",
    ]
    assert cli.main([*arguments, "--lengths", "32", "64", "--repeats", "2", "--out", str(tmp_path)]) == 0
    stem = tmp_path / f"{facts.machine()}-mixers-lengths"
    result = json.loads(stem.with_suffix(".json").read_text())
    assert {(each["system"], each["length"]) for each in result["points"]} == {
        (name, length) for name in ("mingru", "minlstm") for length in (32, 64)
    }
    for each in result["points"]:
        assert each["over_limit"]["median"] > 0 and each["state_size"] == 16 and each["peak_bytes"] >= 0
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for each in result["points"]:
        each["peak_bytes"] = None  # where a system gives no account of memory
    mixers.draw(tmp_path / "no-memory.png", result)
    assert (tmp_path / "no-memory.png").stat().st_size > 0


def test_the_command_judges_what_is_promised(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mixers, "WORKLOAD", Workload(1, 24, 16, 16))
    monkeypatch.setattr(mixers, "LENGTHS", (8, 16, 24))
    code = cli.main(["--mixers", "--systems", "mingru", "aaren", "--repeats", "2", "--out", str(tmp_path)])
    result = json.loads((tmp_path / f"{facts.machine()}-mixers.json").read_text())
    met = [line["came"]["median"] <= line["bound"] for line in result["lines"]]
    assert [line["measure"] for line in result["lines"]] == [
        "aaren / mingru at (1, 24, 16)",
        "mingru / its own products",
        "aaren / its own products",
    ]
    assert code == (0 if all(met) else 1)
    assert capsys.readouterr().out.count("NOT MET") == met.count(False)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--systems", "mingru"], "mingru is compared with --mixers"),
        (["--mixers", "--systems", "nn.GRU"], "nn.GRU is compared without --mixers"),
        (["--mixers", "--layers", "2"], "a mixer has one layer"),
        (["--mixers", "--hidden-size", "64"], "a mixer has one layer, and --hidden-size is its --input-size"),
        (["--table", "--mixers"], "--mixers has no meaning with --table"),
    ],
)
def test_bad_arguments_are_named(arguments, match, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert match in capsys.readouterr().err


def test_every_mixer_has_a_colour():
    assert {entry.cost for entry in MIXERS.values()} <= set(mixers.FAMILIES)
