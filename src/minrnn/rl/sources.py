"""Where episodes come from: D4RL's HDF5 files, Minari datasets, folders of .npz files.

What would take more than half of the memory that is free is kept in a temporary file and read slice by slice.
"""

import math
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minrnn.rl.episodes import Episodes, Joined, blocks, concatenate

CACHE = 64 << 20  # bytes of decompressed chunks that HDF5 keeps of a field: chunks and blocks of steps do not align
_DATASET_NAME = re.compile(r"([-\w]+/)*[-\w]+-v\d+")


def load_episodes(source: str | os.PathLike[str]) -> Episodes:
    """Read logged episodes.

    Args:
        source: one of these, or several joined with `+`, whose episodes then follow each other (D4RL's medium-expert is
            `medium.hdf5+expert.hdf5`):

            - a file `*.hdf5` or `*.h5` in the layout of D4RL's -v2 data: observations (S, O), actions (S, A), rewards,
              terminals and timeouts (S,). An episode ends where one of the last two is set. Steps after the last end
              are left out, because nobody knows what that episode would have returned.
            - a directory of Minari, or the name of a Minari dataset (`mujoco/hopper/medium-v0`), which is downloaded if
              it is not in Minari's own directory yet.
            - a directory of `.npz` files, one for each episode, in the order of their names: observations (T, O) or
              (T + 1, O), actions (T, A), rewards (T,), and terminated, one flag or (T,) flags of which the last counts.

    Returns:
        All episodes. Observations and actions are in memory, or, where they exceed half of what is free there, in a
        temporary file (in the directory that TMPDIR names, or /var/tmp), which goes away with them.

    Raises:
        ValueError: there is nothing by that name, a file is torn, or its contents are no episodes; the message names
            the file, the field and, where it can, the episode.
    """
    whole = os.fspath(source)
    parts = split(whole)
    if not all(parts):
        raise ValueError(f"load_episodes: source must name data, on both sides of a +, got {whole!r}")
    if len(set(map(os.path.realpath, parts))) < len(parts):  # what is held out would be among what is learned
        raise ValueError(f"load_episodes: {whole}: what is joined must be different data, got the same twice")
    read = [_load(part) for part in parts]
    try:
        return concatenate(read)
    except ValueError as error:
        raise ValueError(f"load_episodes: {whole}: {error}") from error


def split(source: str) -> list[str]:
    """The sources that are joined with `+`. A plus in the path of something that is there joins nothing."""
    parts, pieces = [], source.split("+")
    while pieces:
        count = next((n for n in range(len(pieces), 1, -1) if os.path.exists("+".join(pieces[:n]).strip())), 1)
        parts.append("+".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return parts


def available_memory() -> int:
    """Bytes that can be allocated without swapping, as far as the system tells; a huge number where it does not."""
    free = [1 << 62]
    with suppress(OSError, ValueError, IndexError):
        (line,) = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[:1]
        free.append(int(line) << 10)
    if len(free) == 1:
        with suppress(OSError, ValueError, AttributeError):
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            free += _left_in_groups(controllers, path, Path("/sys/fs/cgroup"))
    return min(free)


def _left_in_groups(controllers: str, path: str, mounted: Path) -> Iterator[int]:
    """Bytes left in a control group, as of a container or a batch job, and in those around it, where they have a limit.

    What files have left in memory, and nobody has used twice, counts as free.
    """
    if not controllers:  # version 2
        names = "memory.max", "memory.current", "inactive_file"
    elif "memory" in controllers.split(","):
        mounted, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    else:
        return
    group = mounted / path.lstrip("/")
    for each in (group, *group.parents):
        # It says "max" where there is no limit, and there are no files where there is no such group.
        with suppress(OSError, ValueError, KeyError):
            most, used = (int((each / name).read_text()) for name in names[:2])
            files = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())[names[2]]
            yield most - used + int(files)
        if each == mounted:
            return


class _Log(NamedTuple):
    """What a reader found: steps in pieces that still lie on disk, and the rest in memory."""

    observations: Sequence[Any]
    actions: Sequence[Any]
    sizes: tuple[int, int]  # O, A
    steps: Sequence[int]  # rows of each piece
    rewards: np.ndarray
    lengths: Any  # (E,) whole numbers
    terminated: Any  # (E,) flags


def _load(part: str) -> Episodes:
    reader = _reader(part)
    try:
        with ExitStack() as files:
            log = reader(part, files)
            steps = [
                Joined(pieces, log.steps, size)
                for pieces, size in zip((log.observations, log.actions), log.sizes, strict=True)
            ]
            fits = sum(4 * math.prod(each.shape) for each in steps) <= available_memory() / 2
            keep = _in_memory if fits else _on_disk
            with np.errstate(over="ignore"):  # becomes infinite, and is refused as that
                rewards = log.rewards.astype(np.float32)
            return Episodes(
                _told_of("observations", keep, steps[0]),
                _told_of("actions", keep, steps[1]),
                rewards,
                np.asarray(log.lengths, np.int64),
                np.asarray(log.terminated, bool),
            )
    except (ValueError, TypeError, OSError, KeyError, RuntimeError) as error:  # h5py has all of them for torn files
        reason = str(error).removeprefix("Episodes: ")
        raise ValueError(f"load_episodes: {part}: {reason}") from error


def _told_of(name: str, read: Callable[[Any], Any], steps: Any) -> Any:
    """`read(steps)`; where it cannot, the field has its name in the error."""
    try:
        return read(steps)
    except OSError as error:
        raise OSError(f"{name}: {error}") from error


def _in_memory(steps: Joined) -> np.ndarray:
    result = np.empty(steps.shape, np.float32)
    for first, block in blocks(steps):
        result[first : first + len(block)] = block
    return result


def _on_disk(steps: Joined) -> np.memmap:
    """The steps in a temporary file without a name. Windows of a compressed file would cost a hundred times more."""
    # On many systems /tmp is memory.
    place = os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            for _, block in blocks(steps):  # written, not mapped: a full disk is then an error and not a signal
                file.write(block.data)
            file.flush()
            return np.memmap(file, np.float32, "r", shape=steps.shape)
    except OSError as error:
        size = math.prod(steps.shape) * 4
        raise OSError(
            f"{size} bytes must fit into {place} (TMPDIR may name another directory), got: {error}"
        ) from error


def _reader(part: str) -> Callable[[str, ExitStack], _Log]:
    """The reader for what lies at `part`, or is called so."""
    path = Path(part)
    if path.is_dir():
        return _read_minari if minari_file(path) else _read_folder
    if path.is_file():
        if path.suffix.lower() not in (".hdf5", ".h5"):
            raise ValueError(f"load_episodes: {part}: must be an .hdf5 file or a directory, got a {path.suffix} file")
        return _read_d4rl
    if _DATASET_NAME.fullmatch(part):
        return lambda name, files: _read_minari(_find_minari(name), files)
    wanted = "an existing .hdf5 file or directory, or the name of a Minari dataset such as mujoco/hopper/medium-v0"
    raise ValueError(f"load_episodes: source must be {wanted}, got {part!r}: no such file")


def _read_d4rl(part: str, files: ExitStack) -> _Log:
    file = _open(part, files)
    if "episode_0" in file:
        raise ValueError("must have D4RL's layout, got a file of Minari: give the directory that it lies in")
    observations, actions = (_field(file, name, 2) for name in ("observations", "actions"))
    rewards, *ends = (_whole_field(file, name) for name in ("rewards", "terminals", "timeouts"))
    for name, field in (("actions", actions), ("rewards", rewards)):
        if len(field) != len(observations):
            raise ValueError(f"{name} must have {len(observations)} rows, as observations have, got {len(field)}")
    terminals, timeouts = map(_flags, ("terminals", "timeouts"), ends, 2 * [(len(rewards),)])
    stops = np.flatnonzero(terminals | timeouts) + 1
    if not len(stops):
        raise ValueError(f"terminals or timeouts must end at least one episode, got none in {len(terminals)} steps")
    steps = int(stops[-1])
    sizes = observations.shape[1], actions.shape[1]
    lengths, terminated = np.diff(stops, prepend=0), terminals[stops - 1]
    return _Log([observations], [actions], sizes, [steps], rewards[:steps], lengths, terminated)


def _read_minari(part: str, files: ExitStack) -> _Log:
    path = minari_file(Path(part))
    assert path is not None, "only called for a directory of Minari"
    file = _open(path, files)
    names = sorted((name for name in file if re.fullmatch(r"episode_\d+", name)), key=lambda name: int(name[8:]))
    if not names:
        raise ValueError(f"{path.name} must have groups episode_0, episode_1, ..., got none")
    episodes = []
    for name in names:
        try:
            group = file[name]
            observations, actions = (_Field(group, field) for field in ("observations", "actions"))
            rewards, ends = (_whole_field(group, field) for field in ("rewards", "terminations"))
            # The last observation is what the last action led to: no action was taken there.
            _check_rows(observations, actions, rewards, (1,))
            flags = _flags("terminations", ends, (len(rewards),))
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error
        episodes.append((observations, actions, rewards, bool(flags[-1])))
    return _log(episodes, names)


def _read_folder(part: str, files: ExitStack) -> _Log:
    paths = sorted(Path(part).glob("*.npz"))
    if not paths:
        raise ValueError("must be a directory of Minari (with data/main_data.hdf5) or hold .npz files, got neither")
    episodes = []
    for path in paths:
        try:
            observations, actions = _Member(path, "observations"), _Member(path, "actions")
            rewards, ends = (_member(path, name) for name in ("rewards", "terminated"))
            _check_field("rewards", rewards.shape, rewards.dtype, 1)
            _check_field("terminated", ends.reshape(-1).shape, ends.dtype, 1)
            _check_rows(observations, actions, rewards, (0, 1))
            flags = _flags("terminated", ends.reshape(-1), (1, len(rewards)))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        episodes.append((observations, actions, rewards, bool(flags[-1])))
    return _log(episodes, [path.name for path in paths])


def _log(episodes: Sequence[tuple[Any, Any, np.ndarray, bool]], names: Sequence[str]) -> _Log:
    """Joins episodes that lie in pieces of their own."""
    sizes = episodes[0][0].shape[1], episodes[0][1].shape[1]
    for name, (observations, actions, *_) in zip(names, episodes, strict=True):
        if (got := (observations.shape[1], actions.shape[1])) != sizes:
            wanted = f"observations of size {sizes[0]} and actions of size {sizes[1]}, as {names[0]} has"
            raise ValueError(f"{name}: must have {wanted}, got {got[0]} and {got[1]}")
    observations, actions, rewards, terminated = zip(*episodes, strict=True)
    lengths = [len(each) for each in rewards]
    return _Log(observations, actions, sizes, lengths, np.concatenate(rewards), lengths, terminated)


def _check_rows(observations: Any, actions: Any, rewards: np.ndarray, more: tuple[int, ...]) -> None:
    """Raise ValueError unless an episode has steps, one action for each, and so many more observations than steps."""
    steps = len(rewards)
    if not steps:
        raise ValueError("rewards must have at least one step, got an episode of length 0")
    if actions.shape[0] != steps:
        raise ValueError(f"actions must have {steps} rows, as rewards have, got {actions.shape[0]}")
    if observations.shape[0] - steps not in more:
        wanted = " or ".join(str(steps + each) for each in more)
        raise ValueError(f"observations must have {wanted} rows for {steps} rewards, got {observations.shape[0]}")


def _flags(name: str, values: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Flags as bool; ValueError if there are not so many, or one of them is no number."""
    if len(values) not in lengths:
        wanted = " or ".join(map(str, sorted(set(lengths))))
        raise ValueError(f"{name} must have {wanted} flags for {lengths[-1]} rewards, got {len(values)}")
    if len(bad := np.flatnonzero(np.isnan(values))):
        raise ValueError(f"{name} must be flags, got nan at step {bad[0]}")
    return values.astype(bool)


def _open(path: str | Path, files: ExitStack) -> Any:
    """An HDF5 file, which `files` closes."""
    import h5py

    try:
        return files.enter_context(h5py.File(path, "r", rdcc_nbytes=CACHE))
    except OSError as error:
        raise ValueError(f"must be a whole HDF5 file, got one that is torn or none at all: {error}") from error


def _field(group: Any, name: str, rank: int) -> Any:
    """A dataset of real numbers in an HDF5 file, not read yet."""
    import h5py

    field = group.get(name)
    if field is None:
        raise ValueError(f"{name} must be there, got only {', '.join(group) or 'an empty file'}")
    if not isinstance(field, h5py.Dataset):
        raise ValueError(f"{name} must be one array, as of a Box space, got a group of {', '.join(field)}")
    _check_field(name, field.shape, field.dtype, rank)
    return field


class _Field:
    """A field of an HDF5 file, opened anew for every slice: as long as it is open, it keeps up to CACHE bytes."""

    def __init__(self, group: Any, name: str) -> None:
        self._group, self._name = group, name
        self.shape = _field(group, name, 2).shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._group[self._name][rows]


def _whole_field(group: Any, name: str) -> np.ndarray:
    """A field with one number for each step, read."""
    return _told_of(name, lambda field: field[:], _field(group, name, 1))


def _check_field(name: str, shape: tuple[int, ...], dtype: np.dtype, rank: int) -> None:
    vector = rank == 2
    if len(shape) != rank or dtype.kind not in ("f" if vector else "fiub"):
        wanted = "(steps, size) of floats, as of a Box space" if vector else "(steps,) of numbers"
        raise ValueError(f"{name} must be {wanted}, got {dtype} of shape {shape}")


class _Member:
    """One array of an .npz file, read anew for every slice: an episode is small."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        field = _member(path, name)
        _check_field(name, field.shape, field.dtype, 2)
        self.shape = field.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        return _member(self._path, self._name)[rows]


def _member(path: Path, name: str) -> np.ndarray:
    if not zipfile.is_zipfile(path):  # of anything else, NumPy says that it may be pickled
        raise ValueError("must be a whole .npz file, got one that is torn or none at all")
    try:
        with np.load(path) as file:
            if name in file:
                return file[name]
            names = ", ".join(file)
    except ValueError:  # says itself what is wrong, such as objects, which could run code
        raise
    except Exception as error:  # a torn file fails in many ways: of zlib, of zipfile, of the parser of its header
        raise ValueError(f"must be a whole .npz file, got one that is torn: {error}") from error
    raise ValueError(f"{name} must be there, got only {names}")


def minari_file(directory: Path) -> Path | None:
    """The HDF5 file of a Minari dataset, whose directory or `data` directory this is; None if it is neither."""
    for path in (directory / "data" / "main_data.hdf5", directory / "main_data.hdf5"):
        if path.is_file():
            return path
    return None


def _find_minari(name: str) -> str:
    """The directory of the Minari dataset of this name, downloaded if it must be."""
    import minari
    from minari.storage import get_dataset_path

    ours = re.fullmatch(r"minrnn/([-\w]+)/([-\w]+)-v0", name)  # made by users, for themselves
    try:
        storage = minari.load_dataset(name, download=ours is None).storage
    except Exception as error:  # the stores that it downloads from raise errors of their own libraries
        reason = str(error).strip().partition("\n")[0]
        if ours:
            wanted = f"must have been made by `minrnn rl collect --env {ours[1]} --quality {ours[2]}`"
            raise ValueError(f"{wanted}, got none: {reason}") from error
        if ((here := get_dataset_path(name)) / "data").exists():
            cut = "if a download of it was cut off, removing that directory lets it begin anew"
            raise ValueError(f"must be a whole Minari dataset, got {str(here)!r}: {reason} ({cut})") from error
        wanted = "must be a file, a directory, or a Minari dataset that is here or can be downloaded"
        raise ValueError(f"{wanted}, got an error: {type(error).__name__}: {reason}") from error
    if storage.FORMAT != "hdf5":
        raise ValueError(f"must be stored as HDF5, got {storage.FORMAT}")
    return str(storage.data_path)
