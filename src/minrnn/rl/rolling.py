"""Rolls episodes in several processes. Which process rolls an episode never shows in it; what is finished is kept."""

import io
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from minrnn._files import replace_files
from minrnn.rl.behaviour import Rolled, load_behaviour, roll
from minrnn.rl.environments import make_env


class Part(NamedTuple):
    """What one policy contributes: its first episodes, until both numbers are reached.

    Args:
        snapshot: its file; None draws actions uniformly.
        stream: its number, of which its noise is a function.
        steps: at least so many in all.
        episodes: at least so many.
    """

    snapshot: Path | None
    stream: int
    steps: int
    episodes: int


@dataclass(frozen=True)
class RolloutStore:
    """Where episodes are rolled, and where they are kept.

    Args:
        env_id: of the environment.
        seed: of all noise.
        folder: of the episodes' files.
    """

    env_id: str
    seed: int
    folder: Path

    def path(self, part: Part, episode: int) -> Path:
        """The file of an episode."""
        return self.folder / f"{part.stream:08}-{episode:06}.npz"

    def lengths(self, part: Part) -> dict[int, int]:
        """Steps of each of the part's episodes that is finished."""
        paths = self.folder.glob(f"{part.stream:08}-*.npz")
        return {int(path.stem.rpartition("-")[2]): len(read(path).rewards) for path in paths}


def read(path: Path) -> Rolled:
    """An episode that was kept."""
    with np.load(path) as file:
        return Rolled(*(file[name] for name in Rolled._fields))


def roll_parts(
    store: RolloutStore, parts: Sequence[Part], *, processes: int, told: Callable[[int, int], None]
) -> list[list[Path]]:
    """The files of each part's episodes, in their order. Those that are there already are not rolled again.

    Args:
        store: where.
        parts: what is wanted.
        processes: how many roll at once. One rolls in this process; several are started anew, as Python's "spawn" does,
            so that a script that calls this needs `if __name__ == "__main__"`.
        told: called with (part, steps that it has) whenever an episode counts.

    Raises:
        OSError: a process died, or a file cannot be written.
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    workers = _Workers(store, parts, processes)
    try:
        return [workers.roll(number, lambda steps, number=number: told(number, steps)) for number in range(len(parts))]
    finally:
        workers.close()


class _Workers:
    """Processes that take episodes' numbers and give their lengths.

    (A `ProcessPoolExecutor` of Python 3.11 was seen to wait for ever at its end after Ctrl-C.)
    """

    def __init__(self, store: RolloutStore, parts: Sequence[Part], processes: int) -> None:
        self.store, self.parts = store, parts
        self.alone = _Roller(store, parts) if processes == 1 else None
        self.workers: list[tuple[Any, Connection]] = []
        context = multiprocessing.get_context("spawn")
        for _ in range(0 if self.alone else processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, store, parts), daemon=True)
            worker.start()
            theirs.close()  # now the worker alone has that end, and sees ours close, however this process ends
            self.workers.append((worker, ours))

    def roll(self, number: int, told: Callable[[int], None]) -> list[Path]:
        part = self.parts[number]
        lengths = self.store.lengths(part)
        missing = (episode for episode in count() if episode not in lengths)
        idle, busy = [ours for _, ours in self.workers], dict[Connection, int]()
        steps = episodes = 0
        while True:
            while episodes in lengths:
                steps, episodes = steps + lengths[episodes], episodes + 1
                told(steps)
                if steps >= part.steps and episodes >= part.episodes:
                    self._finish(busy)
                    return [self.store.path(part, episode) for episode in range(episodes)]
            if self.alone:
                episode = next(missing)
                lengths[episode] = self.alone.roll(number, episode)
                continue
            for ours in idle:
                busy[ours] = next(missing)
                self._send(ours, (number, busy[ours]))
            idle = cast(list[Connection], wait(list(busy)))
            for ours in idle:
                lengths[busy.pop(ours)] = self._receive(ours)

    def _finish(self, busy: dict[Connection, int]) -> None:
        """Wait for what is still being rolled: at most one episode each, which nobody needs."""
        for ours in busy:
            self._receive(ours)

    def _send(self, ours: Connection, task: tuple[int, int]) -> None:
        try:
            ours.send(task)
        except BrokenPipeError:
            self._receive(ours)

    def _receive(self, ours: Connection) -> int:
        try:
            answer = ours.recv()
        except EOFError:
            (worker,) = (worker for worker, theirs in self.workers if theirs is ours)
            worker.join()
            raise OSError(f"a process that rolled episodes ended with status {worker.exitcode}") from None
        if isinstance(answer, OSError):
            raise answer
        return answer

    def close(self) -> None:
        """Let the processes end with the episode that they are at."""
        if self.alone:
            self.alone.env.close()
        for _, ours in self.workers:
            ours.close()
        for worker, _ in self.workers:
            worker.join()


class _Roller:
    """Rolls one episode after the other."""

    def __init__(self, store: RolloutStore, parts: Sequence[Part]) -> None:
        self.store, self.parts = store, parts
        self.policies = [None if part.snapshot is None else load_behaviour(part.snapshot) for part in parts]
        self.env = make_env(store.env_id)

    def roll(self, number: int, episode: int) -> int:
        part = self.parts[number]
        rolled = roll(self.env, self.policies[number], self.store.seed, part.stream, episode)
        content = io.BytesIO()
        np.savez(content, **rolled._asdict())
        replace_files({self.store.path(part, episode): content.getvalue()})
        return len(rolled.rewards)


def _answer(roller: _Roller, number: int, episode: int) -> int | OSError:
    """What came of an episode: its length, or why it could not be kept, as on a full disk."""
    try:
        return roller.roll(number, episode)
    except OSError as error:
        return error


def _serve(theirs: Connection, store: RolloutStore, parts: Sequence[Part]) -> None:
    """What a process does until the other end of its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the first one decides
    roller = _Roller(store, parts)
    try:
        while True:
            theirs.send(_answer(roller, *theirs.recv()))
    except (EOFError, BrokenPipeError):
        roller.env.close()
