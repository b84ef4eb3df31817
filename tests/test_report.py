"""The report: numbers worked out by hand, cells without a result, and pages that are whole, closed and escaped."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

import minrnn
from minrnn.bench.systems import SYSTEMS
from minrnn.reproduce import figures, report, report_timing
from minrnn.reproduce.cells import BEGUN, SCALES, Cell, Results
from minrnn.reproduce.experiments import EXPERIMENTS, Experiment, cells
from minrnn.reproduce.page import Found, signed
from minrnn.reproduce.published import NOTES, PUBLISHED, URL

FACTS = {
    "cpu": "CPU X", "cpu_capability": "AVX2", "bf16_instructions": False, "cores": 2, "threads": 2,
    "gpu": None, "system": "Linux 6",
    "python": "3.11.9", "torch": "2.13.0", "minrnn": "0.1.0", "commit": "0123456789abcdef" * 2 + "01234567",
    "date": "2025-01-02T03:04:05+00:00",
}  # fmt: skip
VOID = {"meta", "br", "link", "img", "hr", "input"}


def record(accuracy=0.5, held_out=2.0, *, best=1.5, step=100, seconds=90.0, **facts):
    """A cell whose lowest loss was at step 50, where its accuracy was another one."""
    earlier = {"step": step // 2, "loss": best, "held_out": best, "accuracy": accuracy / 2, "lr": 1e-3, "seconds": 1.0}
    last = {"step": step, "loss": held_out, "held_out": held_out, "accuracy": accuracy, "lr": 1e-3, "seconds": 2.0}
    return {
        "result": last, "best": earlier, "parameters": 1234567, "seconds": seconds, "metrics": [earlier, last],
        "facts": {**FACTS, **facts},
    }  # fmt: skip


def built(results, wanted, out, scale="laptop"):
    report.build(results, scale, wanted, out)
    return (out / "report.html").read_text(encoding="utf-8"), (out / "report.md").read_text(encoding="utf-8")


def rows(markdown):
    """The rows of all tables, as lists of cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def of(wanted, system, column=""):
    return [cell for cell in wanted if (cell.system, cell.column) == (system, column)]


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_committed_pages_are_of_the_committed_cells(scale, tmp_path):
    """`minrnn reproduce --report --scale SCALE` brings them up to date."""
    committed = Path(__file__).parent.parent / "results" / scale
    for cell in committed.glob("*/*.json"):
        (tmp_path / cell.parent.name).mkdir(exist_ok=True)
        shutil.copy(cell, tmp_path / cell.parent.name)
    pages = built(Results(tmp_path), cells(EXPERIMENTS, scale), tmp_path, scale)
    for page, name in zip(pages, ("report.html", "report.md"), strict=True):
        kept = (committed / name).read_text(encoding="utf-8")
        assert re.sub("<svg.*?</svg>", "", page, flags=re.S) == re.sub("<svg.*?</svg>", "", kept, flags=re.S)
    drawn = [{path.name for path in (place / "figures").iterdir()} for place in (tmp_path, committed)]
    assert drawn[0] == drawn[1]  # not what is drawn, whose bytes are matplotlib's too


@pytest.fixture
def layers(tmp_path):
    """Table 1, half finished: three seeds, two with one that failed, and one of each other kind."""
    results, wanted = Results(tmp_path / "results"), cells(["layers"], "laptop")
    for cell, accuracy in zip(of(wanted, "minGRU", "2 layers"), (0.95, 0.97, 0.99), strict=True):
        results.write(cell, record(accuracy, seconds=60.0))
    one, two, three = of(wanted, "minLSTM", "1 layer")
    results.write(one, record(0.30, seconds=120.0, commit="f" * 40 + "-changed", date="2025-01-05T00:00:00+00:00"))
    results.write(two, record(0.40, seconds=7200.0))
    results.write(three, {"error": "ValueError: <b>no | room</b>", "facts": FACTS})
    results.write(of(wanted, "minGRU", "3 layers")[0], record(0.123))
    for cell in of(wanted, "minLSTM", "3 layers"):
        results.write(cell, {"error": "MemoryError: none left", "facts": FACTS})
    begun, empty, *_ = of(wanted, "minLSTM unnormalized", "1 layer")
    for cell in (begun, empty):
        results.work(cell).mkdir(parents=True)
    (results.work(begun) / BEGUN).write_text(json.dumps({"minrnn": minrnn.__version__, **begun.config}))
    stale = of(wanted, "minLSTM unnormalized", "2 layers")[0]
    results.write(dataclasses.replace(stale, config={**stale.config, "train": {"steps": 1}}), record())
    return results, wanted


def test_numbers_are_those_worked_out_by_hand(layers, tmp_path):
    _, page = built(*layers, tmp_path)
    found = rows(page)
    assert ["minGRU", "1,234,567", "97.0 ± 2.0", "96.8 ± 3.2", "+0.2", "3"] in found
    assert ["minLSTM", "1,234,567", "35.0 ± 7.1", "37.6 ± 2.0", "−2.6", "2 of 3"] in found
    assert ["minGRU", "1,234,567", "12.3", "99.5 ± 0.2", "−87.2", "1 of 3"] in found  # no deviation of one
    assert "minGRU: 2 layers 97.0 ± 2.0, 3 layers 12.3." in page and "minLSTM: 1 layer 35.0 ± 7.1." in page
    assert (
        "2 h 6 min, all cells added up, of which several may have run at once; a cell took 1 min to 2 h 0 min" in page
    )
    assert ", half of them at most 1 min." in page


def test_the_cost_of_a_single_cell_is_told_once(tmp_path):
    results, wanted = Results(tmp_path / "results"), cells(["layers"], "laptop")
    results.write(wanted[0], record(seconds=6960.0))
    assert "- 1 h 56 min, of one cell. By the clock" in built(results, wanted, tmp_path)[1]


def test_cells_without_a_result_are_shown_as_what_they_are(layers, tmp_path):
    html, page = built(*layers, tmp_path)
    found = rows(page)
    assert ["minLSTM", "", "failed", "96.0 ± 2.8", "", ""] in found
    assert ["minLSTM unnormalized", "", "not finished", "37.6 ± 2.0", "", ""] in found
    assert ["minLSTM unnormalized", "", "refused", "85.7 ± 5.8", "", ""] in found
    assert ["minLSTM unnormalized", "", "missing", "96.0 ± 2.8", "", ""] in found
    assert found[2][2] == "6 done, 4 failed, 1 refused, 1 not finished, 15 missing"
    assert r"- layers/minlstm-1-layer-2 failed: ValueError: \<b\>no \| room\</b\>" in page
    assert "layers/minlstm-1-layer-2 failed: ValueError: &lt;b&gt;no | room&lt;/b&gt;" in html
    assert re.search(r"refused: .*2-layers-0.json must be of a cell with config.train.steps = 2000, got 1", html)


def test_machines_and_commits_that_differ_are_told_apart(layers, tmp_path):
    _, page = built(*layers, tmp_path)
    rest = "torch 2.13.0, Python 3.11.9; CPU X (AVX2), 2 cores, 32-true, 2 threads, Linux 6"
    five = f"minlstm-1-layer-1, {', '.join(f'mingru-2-layers-{seed}' for seed in range(3))}, mingru-3-layers-0"
    assert f"- minrnn 0.1.0 (commit 0123456789ab), {rest}; 5 cells ({five}), 2025-01-02\n" in page
    assert f"- minrnn 0.1.0 (commit ffffffffffff-changed), {rest}; 1 cell (minlstm-1-layer-0), 2025-01-05\n" in page
    cell = cells(["lm"], "paper")[0]
    found = [
        Found(cell, "done", {"facts": FACTS | {"gpu": {"name": "GPU Y"}, "commit": None}}),
        Found(cell, "done", {"facts": FACTS | {"commit": None}, "precision": "32-true"}),
    ]
    gpu, fallen_back = report._origins(found)
    assert "(an installed copy)" in gpu and "; GPU Y, bf16-mixed, 2 threads" in gpu
    assert "; CPU X (AVX2), 2 cores, 32-true, 2 threads" in fallen_back
    here = {"facts": FACTS, "precision": "32-true"}
    early = [FACTS | {"cpu_capability": "AVX512", "precision": "bf16-mixed"}, FACTS | {"precision": "32-true"}]
    (resumed,) = report._origins([Found(cell, "done", {**here, "earlier_sessions": early})])
    begun = "minrnn 0.1.0 (commit 0123456789ab), torch 2.13.0, Python 3.11.9; CPU X (AVX512), 2 cores, bf16-mixed"
    assert f"32-true, 2 threads, Linux 6; begun by {begun}, 2 threads, Linux 6; 1 cell" in resumed


def test_a_loss_is_the_best_and_an_accuracy_the_last(tmp_path):
    results, wanted = Results(tmp_path), cells(["lm", "copying"], "paper")
    results.write(of(wanted, "minGRU")[0], record(held_out=1.7, best=1.5391, step=1000))
    results.write(of(wanted, "Transformer")[0], record(held_out=1.6, best=1.5468, step=1050))
    results.write(of(wanted, "GRU", "minRNN's convention")[0], record(0.8))
    _, page = built(results, wanted, tmp_path, "paper")
    assert ["minGRU", "1,234,567", "1.539 at step 500", "1.548 at step 575", "−0.009", "1"] in rows(page)
    assert ["Transformer", "1,234,567", "1.547 at step 525", "1.547", "0.000", "1"] in rows(page)
    assert ["GRU", "1,234,567", "80.0", "", "", "1 of 3"] in rows(page)
    assert "Lowest first (2 of 5 systems so far): minGRU 1.539 (the paper's 1.548), Transformer 1.547 (the" in page
    assert "minRNN's convention (1 of 13 systems so far): GRU (80.0)." in page


def test_an_ablation_is_told_against_its_baseline(tmp_path):
    results, wanted = Results(tmp_path), cells(["best"], "laptop")
    for cell, loss in zip(of(wanted, "short cosine"), (1.50, 1.52, 1.54), strict=True):
        results.write(cell, record(best=loss))
    results.write(of(wanted, "RMSNorm")[0], record(best=1.521))
    _, page = built(results, wanted, tmp_path)
    assert ["short cosine", "1,234,567", "1.520 ± 0.020 at step 50", "", "", "0.000", "3"] in rows(page)
    assert ["RMSNorm", "1,234,567", "1.521 at step 50", "", "", "+0.001", "1"] in rows(page)
    assert ["GEGLU", "", "missing", "", "", "", ""] in rows(page)


def test_systems_that_cannot_be_told_apart_are_named_together(tmp_path):
    results, wanted = Results(tmp_path), cells(["copying"], "laptop")
    accuracies = {"S4": 0.3, "H3 with S4": 0.32, "minGRU": 0.99999, "minLSTM": 1.0, "GRU": 0.9992, "LSTM": 0.98951}
    for system, accuracy in accuracies.items():
        results.write(of(wanted, system, "minRNN's convention")[0], record(accuracy))
    for system in ("minGRU", "minLSTM"):
        results.write(of(wanted, system, "S4's convention")[0], record(0.75))
    _, page = built(results, wanted, tmp_path)
    ends = "highest minLSTM, minGRU (100.0), GRU (99.9); lowest S4 (30.0), H3 with S4 (32.0)"
    assert f"minRNN's convention (6 of 13 systems so far): {ends}; 99 % or more: minLSTM, minGRU, GRU, LSTM." in page
    assert "S4's convention (2 of 4 systems so far): no significant difference (75.0)." in page
    assert "Told apart is what differs by more than twice the standard error" in page
    assert "Where a system has one seed, its spread over seeds is unknown." in page


def test_seeds_that_scatter_are_not_told_apart(tmp_path):
    """97 and 99.9 are, by 10,240 answers, but not where seeds of a system lie 6 points apart."""
    results, wanted = Results(tmp_path), cells(["copying"], "laptop")
    # Two degrees of freedom of three are without spread: 2.45 is the deviation of a seed, 1.73 the error of a mean.
    for system, accuracies in {"GRU": (0.999, 0.999), "LSTM": (0.94, 1.0), "S4": (0.91, 0.91)}.items():
        for cell, accuracy in zip(of(wanted, system, "minRNN's convention"), accuracies, strict=True):
            results.write(cell, record(accuracy))
    _, page = built(results, wanted, tmp_path)
    assert "systems so far): highest GRU (99.9), LSTM (97.0); lowest S4 (91.0); 99 % or more: GRU." in page
    assert "what chance does" not in page
    drawn = (tmp_path / "figures" / "copying.svg").read_text(encoding="utf-8")
    assert "minRNN's convention" in drawn and "S4's convention" not in drawn  # no axes without a line


def test_beside_scaled_accuracies_ours_are_scaled_too(tmp_path):
    results, wanted = Results(tmp_path), cells(["formal"], "laptop")
    for system in ("Mamba", "minLSTM"):
        results.write(of(wanted, system, "majority")[0], record(0.5))
    results.write(of(wanted, "Mamba", "even_pairs")[0], record(0.4999))
    _, page = built(results, wanted, tmp_path)
    assert ["Mamba", "1,234,567", "50.0; 0.0 scaled", "100.0 scaled", "−100.0", "1"] in rows(page)
    scaled = 100 * (50 - 100 / 63) / (100 - 100 / 63)
    assert ["Mamba", "1,234,567", f"50.0; {scaled:.1f} scaled", "69.0 scaled", f"−{69 - scaled:.1f}", "1"] in rows(page)
    assert ["minLSTM", "1,234,567", "50.0", "93.0", "−43.0", "1"] in rows(page)
    assert "scaled accuracies" in page


def test_accuracies_are_told_apart_as_far_as_the_questions_allow(tmp_path):
    """1,280 questions: a standard error of 1.4 points at one half."""
    results, wanted = Results(tmp_path), cells(["formal"], "laptop")
    for language, mamba, gru in (("parity", 0.535, 0.48), ("majority", 0.36, 0.33), ("bucket_sort", 0.36, 0.30)):
        results.write(of(wanted, "Mamba", language)[0], record(mamba))
        results.write(of(wanted, "minGRU", language)[0], record(gru))
    _, page = built(results, wanted, tmp_path)
    assert re.search(
        r"parity \(2 of 8 systems so far\): no system beats the best constant answer \(48.0 to 53.5; 5[01].\d\)\.", page
    )
    assert "majority (2 of 8 systems so far): no significant difference (33.0 to 36.0)." in page
    assert r"bucket\_sort (2 of 8 systems so far): highest Mamba (36.0); lowest minGRU (30.0)." in page
    assert re.search(r"\*\*bucket\\_sort \(best constant answer: 1\d\.\d\)\*\*", page)
    assert "**even\\_pairs**" in page  # nothing is measured there
    assert "Dotted: the best constant answer." in page


class Page(HTMLParser):
    """Fails on a tag that is not closed; collects links and ids."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            assert name not in ("src", "srcset", "data", "action") and not name.startswith("on")
            if name.endswith("href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert tag not in VOID and self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(layers, tmp_path):
    results, wanted = layers
    more = cells(["lm"], "laptop")
    for cell in more:
        results.write(cell, record())
    html, markdown = built(results, [*wanted, *more], tmp_path)
    page = Page(html)
    assert {link for link in page.links if not link.startswith("#")} == {URL}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags & {"script", "link", "img", "iframe", "object"} == set() and html.count("<svg") == 2
    assert set(re.findall(r"https?://[^\"'<>\s]+", html)) == {
        URL, "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
    }  # fmt: skip
    assert "@import" not in html and set(re.findall(r"url\((.)", html)) == {"#"}
    assert re.findall(r"!\[.*\]\((.*)\)", markdown) == ["figures/layers.svg", "figures/lm.svg"]
    for name in ("layers", "lm"):
        drawn = ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot()
        assert drawn.tag.endswith("svg") and "background:#fff" in drawn.attrib["style"]
        assert "currentColor" in ElementTree.tostring(drawn, "unicode")


def test_markdown_tables_have_equal_rows(layers, tmp_path):
    _, page = built(*layers, tmp_path)
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        widths = {len(row) for row in rows(block)}
        assert len(widths) == 1 and widths.pop() > 1
        assert set("".join(rows(block)[1])) <= set("-:")
    assert len(re.findall(r"(?:^\|.*\n)+", page, re.M)) == 4


def test_names_are_text_whatever_they_hold(tmp_path):
    evil = '</svg><script>alert("$x$")</script>|`*_&\n# x'
    config = cells(["layers"], "laptop")[0].config
    cell = Cell("layers", evil, evil, 0, config)
    results = Results(tmp_path)
    results.write(cell, record())
    html, markdown = built(results, [cell], tmp_path)
    assert "script" not in Page(html).tags and "alert" in html
    assert not re.search(r"(?<!\\)<script", markdown) and "\n# x" not in markdown
    ElementTree.parse(tmp_path / "figures" / "layers.svg")
    assert {len(row) for row in rows(markdown)[2:]} <= {4, 6}


def test_two_builds_are_the_same_bytes(layers, tmp_path):
    for name in ("one", "two"):
        built(*layers, tmp_path / name)
    one, two = ({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
                for name in ("one", "two"))  # fmt: skip
    assert one == two and len(one) == 3


def test_an_empty_folder_has_a_report(tmp_path):
    html, markdown = built(Results(tmp_path / "nothing"), cells(EXPERIMENTS, "smoke"), tmp_path, "smoke")
    assert html.count("Nothing measured yet.") == markdown.count("Nothing measured yet.") == len(EXPERIMENTS)
    assert rows(markdown).count(["mamba, time in ms at batch 64, length 512", "missing", "2.71", "", ""]) == 1
    assert "<svg" not in html and not list((tmp_path / "figures").iterdir())
    assert "minrnn reproduce layers --scale smoke" in markdown
    Page(html)


def timed(cell):
    """The places that a cell with points may fill."""
    config = cell.config
    lines = [*config["systems"], *(f"{one} over {two}" for one in config["systems"] for two in config["systems"])]
    names = [quantity.name for quantity in report_timing.QUANTITIES[config["measure"]]]
    where = f"at batch {config['batch']}, length {config['length']}"
    return {(cell.experiment, line, f"{name} {where}") for line in lines for name in names}


def test_the_papers_numbers_of_other_scales_are_shown(tmp_path):
    """At laptop scale no data are of medium-expert policies."""
    _, page = built(Results(tmp_path), cells(["rl"], "laptop"), tmp_path)
    assert ["data", *dict.fromkeys(system for system, _ in PUBLISHED["rl"])] in rows(page)
    expert = ["Hopper medium-expert", "109.6", "110.8", "103.9", "111.1", "110.3 ± 1.6", "109.7 ± 2.7"]
    assert expert in rows(page) and len([row for row in rows(page) if row[0] == "Hopper medium"]) == 0


def test_the_papers_numbers_belong_to_cells():
    places = set()
    for cell in cells(EXPERIMENTS, "paper"):
        compared = cell.config["measure"] in report_timing.QUANTITIES
        places |= timed(cell) if compared else {(cell.experiment, cell.system, cell.column)}
    published = {(name, *place) for name, numbers in PUBLISHED.items() for place in numbers}
    assert published - places == set()
    assert set(NOTES) <= set(EXPERIMENTS)
    assert all(number.source and number.sure for numbers in PUBLISHED.values() for number in numbers.values())


def summary(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "count": 15}


@pytest.fixture
def speed(monkeypatch):
    """Training steps at two lengths, the second without the loop; a third length is missing."""
    systems = {"MinGRU": 0.1, "GRU-loop": 2.5}

    def cell(length):
        config = {"measure": "speed", "batch": 64, "width": 128, "length": length, "systems": list(systems)}
        return Cell("speed", "width 64", f"length {length}", 0, config)

    def measured(length):
        points = [
            {
                "system": system, "length": length, "batch": 64, "width": 128, "parameters": 1000,
                "seconds": summary(seconds * length / 512),
                "speedup_over": {"GRU-loop": summary(25.2)} if system == "MinGRU" and length == 512 else {},
                "peak_bytes": 1234567.0 * length / (2 if system == "GRU-loop" else 1),
            }
            for system, seconds in systems.items() if length == 512 or system == "MinGRU"
        ]  # fmt: skip
        left_out = {} if length == 512 else {"GRU-loop": "measured up to length 512"}
        return {"points": points, "left_out": left_out, "device": "cpu", "seconds": 3.0, "facts": FACTS}

    experiment = Experiment("Time", "Figure 1", "How long?", "seconds", dict.fromkeys(SCALES, ()), lambda scale: ())
    monkeypatch.setitem(EXPERIMENTS, "speed", experiment)
    return [cell(length) for length in (512, 4096, 8192)], measured


def test_times_stand_beside_the_papers(speed, tmp_path):
    wanted, measured = speed
    results = Results(tmp_path)
    for cell in wanted[:2]:
        results.write(cell, measured(cell.config["length"]))
    html, markdown = built(results, wanted, tmp_path)
    Page(html)
    found = rows(markdown)
    assert "not measured" not in markdown
    assert ["MinGRU, time in ms at batch 64, length 512", "100 (90–110)", "2.72", "+97.3", "15"] in found
    assert ["MinGRU, time in ms at batch 64, length 4096", "800 (720–880)", "3.25", "+797", "15"] in found
    assert [
        "MinGRU over GRU-loop, speed-up at batch 64, length 512",
        "25.2 (22.7–27.7)",
        "175",
        "−150",
        "15",
    ] in found
    assert ["MinGRU over GRU-loop, speed-up at batch 64, length 4096", "missing", "1,324", "", ""] in found
    assert ["length", "512", "4,096"] in found and ["GRU-loop", "2,500 (2,250–2,750)", ""] in found
    assert ["MinGRU", "632", "5,057"] in found and ["GRU-loop", "316", ""] in found  # memory
    assert ["MinGRU over GRU-loop", "2"] in found
    assert "Speed-up, lowest to highest: MinGRU over GRU-loop 25.2." in markdown
    assert "Peak memory as a multiple, lowest to highest: MinGRU over GRU-loop 2." in markdown
    assert "Weights at width 128: " in markdown and "MinGRU 1,000" in markdown
    assert "- GRU-loop: measured up to length 512 (width 64, at length 4,096)." in markdown
    assert found[2][2] == "2 done, 1 missing"
    drawn = (tmp_path / "figures" / "speed-0.svg").read_text(encoding="utf-8")
    assert "time of a training step, ms" in drawn and "MinGRU over GRU-loop" in drawn


@pytest.mark.parametrize("width", [3.3, 6.6, 9.9])
def test_the_legend_is_no_wider_than_the_figure(width):
    wanted = cells(["copying"], "laptop")
    figure = Figure(figsize=(width, 3.5), layout="constrained")
    systems = dict.fromkeys(cell.system for cell in wanted)
    figures._add_legend(figure, figures._styles(systems))
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width and len(legend.get_texts()) == len(systems)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_no_two_lines_of_an_experiment_look_the_same(name):
    systems = dict.fromkeys(cell.system for cell in cells([name], "laptop"))
    if timed := next(iter(cells([name], "laptop"))).config.get("systems"):
        systems = [*timed, *(f"{one} over {two}" for one in timed for two in SYSTEMS[one].over if two in timed)]
    looks = [tuple(style.values()) for style in figures._styles(systems).values()]
    assert len(set(looks)) == len(looks)


def test_memory_that_was_not_measured_is_no_multiple():
    others = [
        {"system": "a", "peak_bytes": 6.0},
        {"system": "b", "peak_bytes": 2.0},
        {"system": "c", "peak_bytes": None},
    ]
    over = {"speedup_over": dict.fromkeys("bcd")}
    assert report_timing._multiples({**others[0], **over}, others) == {"b": 3.0}
    assert report_timing._multiples({**others[2], **over}, others) == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0004, "0.0"), (-0.04, "0.0"), (0.05, "+0.1"), (-12.34, "−12.3")],
)
def test_a_difference_has_a_sign_unless_it_rounds_to_nothing(value, words):
    assert signed(value, 1) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "0.5 s"), (59.4, "59.4 s"), (90, "2 min"), (3570, "1 h 0 min"), (7260, "2 h 1 min")],
)
def test_durations_are_as_people_say_them(seconds, words):
    assert report.duration(seconds) == words
