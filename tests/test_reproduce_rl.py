"""The experiment `rl`: what its cells measure, and what the report makes of it."""

import dataclasses
import json

import gymnasium
import numpy as np
import pytest

from conftest import QUIET
from minrnn.reproduce import measure_rl, report_rl
from minrnn.reproduce.cells import Results
from minrnn.reproduce.cells_rl import BEHAVIOUR
from minrnn.reproduce.experiments import EXPERIMENTS, cells
from minrnn.reproduce.page import APART, ONE_SEED, Found
from minrnn.reproduce.published import PUBLISHED
from minrnn.reproduce.runner import run
from minrnn.rl.collect import last_behaviour
from minrnn.rl.systems import SYSTEMS
from minrnn.train import RunConfig


def of(wanted, system, column):
    return next(cell for cell in wanted if (cell.system, cell.column) == (system, column))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two smoke cells, one of each layout, that have been measured."""
    results, wanted = Results(tmp_path_factory.mktemp("rl")), cells(["rl"], "smoke")
    for name in ("DminGRU", "Decision S4"):
        run([of(wanted, name, "Hopper medium")], results, console=QUIET)
    return results, wanted


def test_a_cell_trains_and_acts_in_both_modes(folder):
    results, wanted = folder
    for name in ("DminGRU", "Decision S4"):
        record = results.read(of(wanted, name, "Hopper medium"))
        assert "error" not in record, record
        assert record["result"]["step"] == 2 and record["parameters"] > 100
        assert [each["mode"] for each in record["outcomes"]] == ["window", "stream"]
        assert record["outcomes"][0]["mean"] == sum(record["outcomes"][0]["returns"])
        data = record["data"]
        assert data["steps"] >= 500 and data["highest"] >= data["mean"]
        assert record["outcomes"][0]["target"] == pytest.approx(data["highest"])
        assert record["references"].keys() == {"random", "behaviour"}
        assert record["references"]["behaviour"] > 10 * record["references"]["random"] > 0
    # Both have read the same episodes.
    assert (
        len({results.read(of(wanted, name, "Hopper medium"))["data"]["sha256"] for name in ("DminGRU", "Decision S4")})
        == 1
    )


def test_the_policy_behind_the_data_acts_without_noise_from_the_same_beginnings(folder):
    results, wanted = folder
    cell = of(wanted, BEHAVIOUR, "Hopper medium")
    run([cell], results, console=QUIET)
    record, model = results.read(cell), results.read(of(wanted, "DminGRU", "Hopper medium"))
    assert record["references"] == model["references"]
    assert record["data"]["mean"] == pytest.approx(model["data"]["mean"], rel=1e-6)
    window, stream = record["outcomes"]
    assert {**window, "mode": "stream"} == stream
    env, policy = gymnasium.make("Hopper-v5"), last_behaviour("Hopper-v5")
    observation, _ = env.reset(seed=int(np.random.SeedSequence(0).generate_state(1)[0]))
    total, ended = 0.0, False
    while not ended:
        action = np.clip(policy.act(observation, np.zeros(3)), -1, 1)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + reward, terminated or truncated
    assert window["returns"] == [pytest.approx(total)]


def test_a_checkpoint_is_of_these_data_and_no_others(tmp_path):
    work = tmp_path / "work" / "rl" / "x"
    cell = of(cells(["rl"], "smoke"), "DminGRU", "Hopper medium")
    record = measure_rl.act(cell, work, None, QUIET)
    begun = json.loads((work / "cell.json").read_text())
    assert begun["sha256"] == record["data"]["sha256"]
    (work / "cell.json").write_text(json.dumps({**begun, "sha256": "0"}))
    with pytest.raises(ValueError, match=f"cell.json must be of a cell with sha256 = '{begun['sha256']}', got '0'"):
        measure_rl.act(cell, work, None, QUIET)
    assert (work / "checkpoint.pt").exists()


def test_without_the_files_of_d4rl_a_cell_says_which(tmp_path):
    cell = of(cells(["rl"], "paper"), "DminGRU", "Hopper medium-expert")
    for data in (None, str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"a directory with D4RL's hopper_expert-v2.hdf5, hopper_medium-v2.hdf5"):
            measure_rl.act(cell, tmp_path / "work" / "rl" / "x", data, QUIET)
    with pytest.raises(ValueError, match=r"hopper_expert-v2.hdf5"):
        measure_rl.act(cell, tmp_path / "work" / "rl" / "x", str(tmp_path), QUIET)


def test_time_per_action_of_every_system_and_mode(monkeypatch):
    cell = of(cells(["rl"], "smoke"), "all", "time per action")
    tables = {mixer: cell.config["tables"][mixer] for mixer in ("attention", "mingru")}
    monkeypatch.setattr(
        measure_rl, "latency", lambda policy: policy.act([0.0] * 11, None) is None or {"early": 2.0, "late": 3.0}
    )
    record = measure_rl.latency_of_all(dataclasses.replace(cell, config={**cell.config, "tables": tables}), QUIET)
    places = [(point["system"], point["mode"], point["constant"]) for point in record["points"]]
    assert places == [
        ("Decision Transformer", "window", True),
        ("Decision Transformer", "stream", False),
        ("DminGRU", "window", True),
        ("DminGRU", "stream", True),
    ]
    assert record["points"][0]["speedup"]["median"] == 1 and record["points"][0]["speedup"]["q3"] == 1
    assert all(point["time"]["count"] == 2 for point in record["points"])


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_every_cell_is_a_run_of_its_own_mixer(scale):
    systems = {system.name: mixer for mixer, system in SYSTEMS.items()}
    for cell in cells(["rl"], scale):
        if cell.config["measure"] == "acting":
            config = RunConfig.from_dict({"task": "offline", "data": "x", **cell.config["table"], "seed": cell.seed})
            assert config.backbone.mixer == systems[cell.system]
            assert config.task.layout == ("concatenated" if cell.system == "Decision S4" else "interleaved")


def test_the_papers_table_is_whole():
    table = PUBLISHED["rl"]
    wanted = {(cell.system, cell.column) for cell in cells(["rl"], "paper") if cell.system != "all"}
    assert set(table) == wanted and len(wanted) == 54
    averages = {"Decision Transformer": 76.4, "Decision S4": 68.6, "DAaren": 75.0, "Decision Mamba": 78.8,
                "DminLSTM": 78.1, "DminGRU": 78.2}  # fmt: skip
    for system, average in averages.items():
        values = [number.value for (its, _), number in table.items() if its == system]
        assert sum(values) / 9 == pytest.approx(average, abs=0.06)


def test_numbers_are_those_worked_out_by_hand():
    wanted = cells(["rl"], "laptop")
    hopper = [cell for cell in wanted if cell.column == "Hopper medium" and cell.system in ("DminGRU", "DAaren")]

    def outcome(mode, mean, d4rl):
        return {"mode": mode, "target": 1.0, "mean": mean, "returns": [mean - 10, mean + 10], "d4rl": d4rl}

    def found(cell, outcomes, parameters):
        data = {"mean": 1080.4, "digest": "MISMATCH: it was 0 with mujoco 9" if cell.seed else "as it must be"}
        record = {"outcomes": outcomes, "data": data, "parameters": parameters, "references": {"random": 50.0}}
        return Found(cell, "done", record)

    cell = of(wanted, "all", "time per action")
    points = [
        {"system": system, "mode": mode, "compiled": False, "time": {"median": time},
         "speedup": {"median": 2000 / time}, "early": time, "late": late, "constant": time == late or late == 505.0}
        for system, mode, time, late in (
            ("Decision Transformer", "window", 2000.0, 2000.0),
            ("Decision Transformer", "stream", 800.0, 1600.0),
            ("DminGRU", "window", 2500.0, 2500.0),
            ("DminGRU", "stream", 500.0, 505.0),
        )
    ]  # fmt: skip
    missing = [Found(cell, "missing", {}) for cell in hopper if cell.system == "DAaren"]
    done = [
        found(
            cell, [outcome("window", 1000.0 + 100 * cell.seed, 30.0 + cell.seed), outcome("stream", 900.0, 28.0)], 12345
        )
        for cell in hopper
        if cell.system == "DminGRU"
    ]
    behind = of(wanted, BEHAVIOUR, "Hopper medium")

    def summary(mean, done=done):
        behaved = found(behind, [outcome("window", mean, 30.0), outcome("stream", mean, 30.0)], 100)
        every = [*done, behaved, *missing, Found(cell, "done", {"points": points})]
        return report_rl.summarize("rl", EXPERIMENTS["rl"], every, PUBLISHED["rl"])

    findings = summary(1050.0)
    table, not_measured = findings.tables
    assert not_measured.title.startswith("not measured") and not_measured.rows[-1][0] == "Walker2d medium-expert"
    assert table.title == "Hopper medium" and {len(row) for row in table.rows} == {len(table.head)}
    assert table.rows == [
        ("DminGRU", "12,345", "1,050 ± 71", "14", "1,080", "30.5 ± 0.7", "79.4 ± 8.2", "100.0 ± 7.1", "900 ± 0", "2"),
        (BEHAVIOUR, "100", "1,050", "14", "1,080", "30.0", "", "100.0", "1,050", "1"),
        ("DAaren", "", "missing", "", "", "", "80.9", "", "", ""),
    ]
    times, growth = findings.more
    assert times.rows == [
        ("Decision Transformer", "2,000", "800 to 1,600", "", ""),
        ("DminGRU", "2,500", "500", "", ""),
    ]
    assert growth.rows == [("Decision Transformer", "1.00", "2.00"), ("DminGRU", "1.00", "1.01")]
    assert findings.sentences == [
        "Data sets on which a system's return is above that of the policy behind them, acting without its noise / "
        "cannot be told from it / is below it: DminGRU 0 / 1 / 0.",
        APART,
        "Time per action of a Decision Transformer that reads its window again, over that of streaming: "
        "DminGRU 4.0 (eager).",
        "Learned from other episodes than the policies gave first: rl/dmingru-hopper-medium-1 "
        "(MISMATCH: it was 0 with mujoco 9).",
    ]
    # The standard error is 50.5 (71 over two seeds, 14 over four episodes), and 10 of the policy behind the data.
    told = {mean: summary(mean).sentences[0].partition("DminGRU ")[2] for mean in (946.0, 948.0, 1152.0, 1154.0)}
    assert told == {946.0: "1 / 0 / 0.", 948.0: "0 / 1 / 0.", 1152.0: "0 / 1 / 0.", 1154.0: "0 / 0 / 1."}
    # Of one seed 14: 10 over its two episodes, and 10 of the policy's.
    alone = {mean: summary(mean, done[:1]).sentences for mean in (971.0, 972.0)}
    assert alone[971.0][0].endswith("DminGRU 1 / 0 / 0.") and alone[972.0][0].endswith("DminGRU 0 / 1 / 0.")
    assert alone[971.0][1:3] == [APART, ONE_SEED]
