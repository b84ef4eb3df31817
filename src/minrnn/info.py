"""`minrnn info`: what runs here and why, and which mixers there are. Needs no extra."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from minrnn.bench import facts
from minrnn.mixers import MIXERS, make_mixer

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe() -> str:
    """Versions, backends, threads, instruction set and the allocator's huge pages, as lines to print."""
    known: dict[str, Any] = facts.gather()
    rows = {
        "minrnn": f"{known['minrnn']} (commit {known['commit'] or 'unknown'})",
        "python": known["python"],
        "torch": known["torch"],
        "machine": f"{known['cpu']}, {known['cores']} cores, {known['memory_gb']} GB, {known['system']}",
        "threads": f"{known['threads']} (torch.set_num_threads or OMP_NUM_THREADS changes it)",
        "instruction set": f"{known['cpu_capability']} in torch, "
        f"{'with' if known['bf16_instructions'] else 'without'} bfloat16 instructions",
        "huge pages": _huge_pages(known["huge_pages"]),
        **{f"backend {name}": text for name, text in known["backends"].items()},
        **{f"extra {name}": text for name, text in _extras().items()},
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def mixers(width: int = 64) -> list[tuple[str, ...]]:
    """A row for each mixer: name, equation, numbers in the state of a sequence at this width, parallel form, cost with
    the length T."""
    rows = [("mixer", "equation", f"state at D = {width}", "a whole sequence by", "cost")]
    for name, entry in MIXERS.items():
        size = make_mixer(name, width, {}).state_size
        rows.append((name, entry.equation, "grows" if size is None else f"{size:,}", entry.parallel, entry.cost))
    return rows


def _huge_pages(on: bool) -> str:
    kernel = _THP.read_text() if _THP.exists() else ""
    allowed = found[1] if (found := re.search(r"\[(\w+)\]", kernel)) else "unknown"
    state = "on" if on else f"off ({facts.HUGE_PAGES}=1 turns them on, `minrnn train` and `bench` do so themselves)"
    return f"{state} in torch's CPU allocator; the system's own setting is {allowed}"


def _extras() -> dict[str, str]:
    """Of each extra that users install: which of its packages are here."""
    found: dict[str, str] = {}
    for requirement in importlib.metadata.requires("minrnn") or []:
        match = re.match(r"([\w.-]+).*extra\s*==\s*['\"](train|rl|peers)['\"]", requirement)
        if match and match[1] != "minrnn":
            name, extra = match[1], match[2]
            try:
                text = f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                text = f"{name} missing (pip install minrnn[{extra}])"
            found[extra] = f"{found[extra]}, {text}" if extra in found else text
    return found
