"""The first digests that behaviour policies gave, in a file beside them: what later ones are compared with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minrnn._files import replace_files

FILE = "digests.json"


def compare(record: Mapping[str, Any], folder: Path) -> str:
    """How a digest relates to the first one that was noted for the same policies and settings, in a few words.

    Args:
        record: the provenance of a dataset.
        folder: of the policies that it is of.

    Returns:
        Empty where there is none.
    """
    if not (first := _noted(folder).get(_asked(record))):
        return ""
    if first["sha256"] == record["sha256"]:
        return "as it must be"
    theirs, ours = first["versions"], record["versions"]
    differ = [f"{each} {theirs.get(each)} (here {ours[each]})" for each in ours if ours[each] != theirs.get(each)]
    return f"MISMATCH: it was {first['sha256']} with {', '.join(differ) or 'the same versions'}"


def note(record: Mapping[str, Any], folder: Path) -> str:
    """Note a digest if it is the first one. The folder must be locked: datasets in many places share its file.

    Returns:
        As `compare`, before.
    """
    if not (compared := compare(record, folder)):
        first = {"sha256": record["sha256"], "versions": record["versions"]}
        content = json.dumps({**_noted(folder), _asked(record): first}, indent=2, sort_keys=True)
        replace_files({folder / FILE: f"{content}\n".encode()})
    return compared


def _noted(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _asked(record: Mapping[str, Any]) -> str:
    return f"{record['quality']}, {record['steps']} steps, seed {record['seed']}"
