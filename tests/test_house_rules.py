"""The rules of the house, as far as a test can read them.

Imports point one way, public names are documented, files stay short, the README's snippets run, links lead somewhere.
"""

import ast
import importlib
import inspect
import json
import re
import statistics
import string
import subprocess
import sys
from pathlib import Path

import pytest

from minrnn.models import BackboneConfig, LanguageModel, LanguageModelConfig, save
from minrnn.tasks.vocabulary import make_tokenizer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "minrnn"
# The one way down. A module imports what stands to its left, or its own folder.
ORDER = ("_shapes", "ops", "layers", "mixers", "models", "tasks", "rl", "train", "bench", "reproduce", "cli")
# Files that belong to a level but are not it.
LEVEL = {
    "_config": "_shapes",
    "_files": "_shapes",
    "_extras": "_shapes",
    "_console": "_shapes",
    "_gated": "layers",
    "_stack": "layers",
    "replace": "layers",
    "convert": "layers",
    "_warmup": "mixers",
    "info": "cli",
}
HEAVY = (
    "lightning",
    "matplotlib",
    "tokenizers",
    "rich",
    "jsonargparse",
    "pooch",
    "safetensors",
    "triton",
    "pydoc_data",
    "gymnasium",
    "minari",
    "h5py",
    "stable_baselines3",
    "imageio",
)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def level(module: str) -> int | None:
    """Where `minrnn.<name>...` stands in the order; None for the package itself."""
    parts = module.split(".")
    if len(parts) < 2 or parts[0] != "minrnn":
        return None
    name = LEVEL.get(parts[1], parts[1])
    return ORDER.index(name) if name in ORDER else None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = "minrnn." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    here = level(own)
    if own == "minrnn.__init__":
        return
    assert here is not None, f"{own} has no place in the order"
    for name in imports(path):
        there = level(name)
        if there is not None:
            assert there <= here, f"{own} imports {name}, which stands to its right"


def test_import_is_light():
    """`import minrnn`, and that of `minrnn.rl`, loads no extra, compiles nothing, loads no C library."""
    script = f"""
import sys, minrnn
assert not {{"minrnn.mixers", "minrnn.models"}} & sys.modules.keys()
import minrnn.rl
heavy = [m for m in {HEAVY!r} if m in sys.modules and m not in before]
assert not heavy, heavy
from minrnn.ops import native
assert native._load.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", "import sys, torch; before = set(sys.modules)" + script], check=True)


def test_what_is_imported_late_is_there_when_asked_for():
    script = """
import minrnn
assert {*minrnn.__all__, "__version__"} <= set(dir(minrnn))
assert minrnn.models.load is minrnn.load and minrnn.mixers.detach_state is minrnn.detach_state
from minrnn import *
assert callable(warmup) and warmup is minrnn.warmup and MinGRU is minrnn.MinGRU
assert not hasattr(minrnn, "no_such_name")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def public_objects() -> list[tuple[str, object]]:
    import minrnn

    found = []
    folders = ("ops", "mixers", "models", "tasks", "rl")
    for module in (minrnn, *(importlib.import_module(f"minrnn.{m}") for m in folders)):
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    return [(name, thing) for name, thing in found if inspect.isclass(thing) or inspect.isfunction(thing)]


@pytest.mark.parametrize("name", [name for name, _ in public_objects()])
def test_public_names_are_documented(name):
    thing = dict(public_objects())[name]
    doc = inspect.getdoc(thing) or ""
    assert doc, f"{name} has no docstring"
    if inspect.isfunction(thing):
        for parameter in inspect.signature(thing).parameters:
            assert re.search(rf"\b{parameter}\b", doc), f"{name}: {parameter} is not in the docstring"


def test_files_stay_short():
    for path in [*sources(), *(PACKAGE / "ops" / "native").iterdir()]:
        if path.suffix in (".py", ".c", ".h"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_no_open_ends():
    for path in sources():
        text = path.read_text()
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path
        for node in ast.walk(ast.parse(text)):
            wordless = isinstance(node, ast.Assert) and node.msg is None
            assert not wordless, f"{path}:{node.lineno}: an assert without words"


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_snippets_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer("chars", string.printable)  # of the run that one of them loads
    save(LanguageModel(LanguageModelConfig(tokenizer.get_vocab_size(), BackboneConfig(8, 1))), "runs/mine")
    tokenizer.save("runs/mine/tokenizer.json")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_readmes_figures_are_those_of_the_committed_runs():
    results = ROOT / "benchmarks" / "results"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = (
        {
            line["measure"]: line
            for lines in json.loads((results / f"{name}.json").read_text())["rows"].values()
            for line in lines
        }
        for name in ("amd-epyc-2-cores", "amd-epyc-2-cores-2")
    )
    assert len(first) == 20 and first.keys() == second.keys()
    for measure, line in first.items():
        bound = f"{line['sign'].replace('<=', '≤').replace('>=', '≥')} {line['bound']:g}"
        cells = (
            f"{each['came']['median']:.3g}" if each["met"] else f"**{each['came']['median']:.3g}**"
            for each in (line, second[measure])
        )
        assert f"| {measure} | {bound} | {' | '.join(cells)} |" in readme
    for name, keys in (("text", ("minrnn", "recipe")), ("pydoc", ("pydoc",))):
        runs = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["runs"]
        for run in (runs[key] for key in keys):
            assert f"{run['held_out']:.3f}" in readme
            assert f"{run['seconds']:.0f} s" in readme


def test_the_readmes_copying_is_that_of_the_committed_cells():
    from minrnn.reproduce.page import shown, stdev
    from minrnn.reproduce.published import PUBLISHED

    readme, found = (ROOT / "README.md").read_text(encoding="utf-8"), {}
    for path in (ROOT / "results" / "laptop" / "copying").glob("*.json"):
        cell = json.loads(path.read_text(encoding="utf-8"))
        _, columns = found.setdefault(cell["system"], (cell["parameters"], {}))
        columns.setdefault(cell["column"], []).append(100 * cell["result"]["accuracy"])
    plain = "minRNN's convention"
    order = [f"{plain}{more}" for more in ("", ", learning rate 0.01", ", 256 positions, learning rate 0.01")]
    for system, (weights, columns) in found.items():
        values = [columns.get(column, []) for column in (f"{plain}, learning rate 0.001", *order)]
        cells = [shown(statistics.mean(each), stdev(each), 1) if each else "" for each in values]
        paper = PUBLISHED["copying"].get((system, plain))
        cells.append(str(paper.value) if paper and system != "minLSTM unnormalized" else "")
        assert f"| {system} | {weights:,} | {' | '.join(cells)} |" in readme
    assert len(found) == 13


def test_the_readmes_mixers_are_those_of_the_table_and_of_the_committed_run():
    from minrnn.info import mixers

    (path,) = (ROOT / "benchmarks" / "results").glob("*-mixers.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    points = {point["system"]: point for point in result["points"]}
    rows = mixers()[1:]
    assert len(rows) == 17
    for name, *cells in rows:
        point = points[name]
        over = f"{point['over_limit']['median']:.2f}" if point["over_limit"] else "-"
        measured = (f"{1e3 * point['seconds']['median']:.0f}", over, f"{point['peak_bytes'] / 1e6:.0f}")
        cells = [cell.replace("|", "\\|") for cell in cells]
        assert f"| `{name}` | {' | '.join((*cells, *measured))} | {point['parameters']:,} |" in readme
    assert all(line["came"]["median"] <= 3 for line in result["lines"] if line["measure"].endswith("products"))
    for line in result["lines"][:5]:  # against other systems; the others stand in the table above
        sign = line["sign"].replace("<=", "≤").replace(">=", "≥")
        assert f"| {line['measure']} | {sign} {line['bound']:g} | {line['came']['median']:.3g} |" in readme
