"""Files that are never torn, and locks between processes."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, then put them there, one after the other.

    No file is ever torn, and while there is no room for all, the old ones stay. A crash in the moment between two of
    the replacements leaves new ones beside old ones.

    Args:
        contents: what is to stand in each file.

    Raises:
        OSError: not all could be written: nothing has changed; or, rarely, not all could be put into their places.
    """
    aside = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, content in contents.items():
            with aside[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in aside.items():
            os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk names none
        for part in aside.values():
            part.unlink(missing_ok=True)
        raise


@contextmanager
def locked(lock: Path, say: Callable[[str], object]) -> Iterator[None]:
    """What the file `lock` stands for is this process's alone; waited for, while it is another's.

    The system lets go of it when the process ends, however it does. (Where Python has no fcntl, as on Windows, nobody
    waits.)

    Args:
        lock: made with its directory, and removed at the end.
        say: told when there is something to wait for.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another process is at work on it: waits")
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file.fileno(), lock):  # else it is the file of somebody who has ended and removed it
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
