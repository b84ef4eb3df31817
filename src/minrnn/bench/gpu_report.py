"""What benchmarks/gpu.py says of its result: a short text for the terminal, and Markdown."""

from collections.abc import Sequence
from typing import Any

from minrnn.bench import check
from minrnn.bench.report import columns

HEAD = (
    "(batch, length, input, hidden)",
    "dtype",
    "MinGRU ms",
    "forward",
    "x floor",
    "nn.GRU",
    "GRU-loop",
    "minGRU-pytorch",
    "memory",
    "MinLSTM ms",
    "nn.LSTM",
    "LSTM-loop",
    "mamba ms",
)
LEGEND = (
    "ms: of a training step; forward: ms of a forward pass alone; x floor: a step over its products and a copy of what "
    "its scan must move; systems: their step over that of MinGRU or MinLSTM; memory: peak of a step, MinGRU over nn.GRU"
)
MOST = 5  # lines of one kind on the terminal


def short(result: dict[str, Any]) -> list[str]:
    """The result in less than 100 lines."""
    lines = [*about(result), "", *check.summary(result["checks"])]
    wrong = [f"  {each['status']}: {each['case']}: {each['why']}" for each in result["checks"] if not _right(each)]
    lines += [*_some(wrong), "", *judged(result["lines"])]
    lines += _some([f"  NOT MET  {_line(line)}" for line in result["lines"] if not line["met"]])
    if result["points"]:
        lines += ["", LEGEND, *columns([HEAD, *shapes(result["points"])]).splitlines()]
    if result["scans"]:
        lines += ["", *columns(scans(result["scans"])).splitlines()]
    if result["errors"]:
        lines += ["", "ERRORS:", *_some([f"  {each}" for each in result["errors"]])]
    if result["left_out"]:
        lines += ["", f"left out ({len(result['left_out'])}):", *_some([f"  {each}" for each in result["left_out"]])]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    parts = [f"# {result['facts']['gpu']['name'] if result['facts']['gpu'] else result['facts']['machine']}", ""]
    parts += [f"- {line}" for line in about(result)]
    parts += ["", "## Right?", "", *(f"- {line}" for line in check.summary(result["checks"]))]
    parts += [f"- {each['status']}: {each['case']}: {each['why']}" for each in result["checks"] if not _right(each)]
    rows = [("measure", "target", "measured", "quartiles", "")]
    for line in result["lines"]:
        came = line["came"]
        wanted = f"{'≤' if line['sign'] == '<=' else '≥'} {line['bound']:g}"
        quartiles = f"{came['q1']:.3g}-{came['q3']:.3g} of {came['count']}"
        rows.append((line["measure"], wanted, f"{came['median']:.3g}", quartiles, "met" if line["met"] else "not met"))
    parts += ["", "## What is promised", "", *_table(rows)]
    parts += ["", "## Layers", "", f"{LEGEND}.", "", *_table([HEAD, *shapes(result["points"])])]
    parts += ["", "## Scans", "", *_table(scans(result["scans"]))]
    parts += ["", "## Left out", "", *(f"- {each}" for each in result["left_out"] or ["nothing"])]
    return "\n".join(parts) + "\n"


def about(result: dict[str, Any]) -> list[str]:
    """Where it ran, with what, and what it ran on."""
    known = result["facts"]
    gpu = known["gpu"] or {"name": known["cpu"], "tf32_in_matmul": None, "tf32_in_cudnn": None}
    versions = {"torch": known["torch"], **{name: gpu.get(name) for name in ("cuda", "cudnn", "triton", "driver")}}
    versions |= {"python": known["python"], "minrnn": known["minrnn"]}
    peers = ", ".join(f"{name} {version}" for name, version in known["peers"].items())
    on = {True: "on", False: "off", None: "not there"}
    lines = [
        f"{gpu['name']}: {', '.join(f'{name} {version}' for name, version in versions.items() if version)}",
        f"commit {known['commit'] or 'unknown'}, {known['date']}, {result['seconds']:.0f} s",
        f"ran on: {', '.join(f'{name} {backend}' for name, backend in result['backends'].items()) or 'nothing'}",
        f"float32 is torch's default: TF32 {on[gpu['tf32_in_matmul']]} in matrix products, "
        f"{on[gpu['tf32_in_cudnn']]} in cuDNN; bfloat16 is autocast with float32 weights",
        f"copy {result['copy_gb_per_s']:.0f} GB/s, read + written",
        f"peers: {peers or 'none'}; not installed: {', '.join(result['missing']) or 'none'}",
    ]
    others = {
        (p["system"], p["dtype"], p["gives"]) for p in result["points"] if p["gives"] not in (p["dtype"], "float32")
    }
    lines += [f"{name} under autocast to {dtype} gives {gives}" for name, dtype, gives in sorted(others)]
    if found := result.get("first_call"):
        first, again, new = (
            ", ".join(f"{1e3 * seconds:.3g} ms at {shape}" for shape, seconds in found[key].items())
            for key in ("first", "again", "new")
        )
        lines.append(
            f"first training steps, with {found['kernels']} kernels to compile: {first}; again {again}; then {new}, "
            f"{found['kernels_of_new']} kernels more"
        )
    if found := result.get("graph"):
        replay, eager = (1e3 * found["seconds"][name] for name in ("replay", "eager"))
        lines.append(f"training step at {found['where']}: {replay:.3f} ms as a CUDA graph, {eager:.3f} ms without")
    return lines


def judged(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each kind of measure: how many shapes meet the bound, and the worst of them."""
    kinds: dict[tuple, list[dict]] = {}
    for line in lines:
        kinds.setdefault((line["measure"].split(" at ")[0], line["sign"], line["bound"]), []).append(line)
    found = []
    for (kind, sign, bound), own in kinds.items():
        worst = (max if sign == "<=" else min)(own, key=lambda line: line["came"]["median"])
        met = sum(line["met"] for line in own)
        where = f" at {worst['measure'].split(' at ')[1]}" if " at " in worst["measure"] else ""
        verdict = "met" if met == len(own) else "NOT MET"
        count = f"{met} of {len(own)}"
        found.append(f"{verdict:<8}{kind:<62}{sign} {bound:<6g}{count:<9}worst {worst['came']['median']:.3g}{where}")
    return found


def shapes(points: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row under `HEAD` for each shape and dtype."""
    by_shape: dict[tuple, dict[str, dict]] = {}
    for point in points:
        shape = tuple(point[key] for key in ("batch", "length", "input_size", "hidden_size"))
        by_shape.setdefault((point["dtype"], *shape), {})[point["system"]] = point
    rows = []
    for (dtype, *shape), own in by_shape.items():

        def ms(name: str, key: str = "seconds", own: dict = own) -> str:
            return f"{1e3 * own[name][key]['median']:.3f}" if name in own and own[name][key] else "-"

        def over(other: str, name: str, own: dict = own) -> str:
            ratio = own[name]["speedup_over"].get(other) if name in own else None
            return f"{ratio['median']:.3g}" if ratio else "-"

        floor = own["MinGRU"]["over_floor"] if "MinGRU" in own else None
        peaks = [own[name]["peak_bytes"] for name in ("MinGRU", "nn.GRU") if name in own]
        memory = f"{peaks[0] / peaks[1]:.2f}" if len(peaks) == 2 and peaks[1] else "-"
        cells = [ms("MinGRU"), ms("MinGRU", "forward"), f"{floor:.2f}" if floor else "-"]
        cells += [over(other, "MinGRU") for other in ("nn.GRU", "GRU-loop", "minGRU-pytorch")]
        cells += [memory, ms("MinLSTM"), over("nn.LSTM", "MinLSTM"), over("LSTM-loop", "MinLSTM"), ms("mamba")]
        rows.append((f"({', '.join(map(str, shape))})", dtype, *cells))
    return rows


def scans(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each comparison of scans: ms of ours, and of the peer and how many times ours that is."""
    rows: list[tuple[str, ...]] = [("scan", "shape", "what", "ms", "peer", "ms", "x")]
    for each in found:
        (name, own), *others = ((name, 1e3 * seconds["median"]) for name, seconds in each["seconds"].items())
        for other, theirs in others or [("-", None)]:
            cells = ("-", "-") if theirs is None else (f"{theirs:.3f}", f"{theirs / own:.3g}")
            rows.append((name, each["where"], each["what"], f"{own:.3f}", other, *cells))
    return rows


def _right(each: dict[str, Any]) -> bool:
    return each["status"] == "right"


def _line(line: dict[str, Any]) -> str:
    return f"{line['measure']}: {line['came']['median']:.3g}, wanted {line['sign']} {line['bound']:g}"


def _some(lines: list[str]) -> list[str]:
    more = [f"  and {len(lines) - MOST} more, in the file"] if len(lines) > MOST else []
    return lines[:MOST] + more


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a table of Markdown, the first of them its head."""
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [texts[0], "|" + "---|" * len(rows[0]), *texts[1:]]
