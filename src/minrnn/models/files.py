"""A model on disk: config.json and model.safetensors in one directory, read without running code that they may hold."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from minrnn.models.base import SequenceModel
from minrnn.models.config import LanguageModelConfig
from minrnn.models.language import LanguageModel

Kind = TypeVar("Kind", bound=SequenceModel)


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
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk names none
        for part in aside.values():
            part.unlink(missing_ok=True)
        raise
    for path, part in aside.items():
        os.replace(part, path)


@contextmanager
def locked(lock: Path, say: Callable[[str], object]) -> Iterator[None]:
    """What the file `lock` stands for is this process's alone; waited for, while it is another's.

    The system lets go of it when the process ends, however it does.

    Args:
        lock: made with its directory, and removed at the end.
        say: told when there is something to wait for.
    """
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
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


def save(model: SequenceModel, run: str | os.PathLike[str]) -> None:
    """Save a model into the directory `run`, made if it is not there.

    A model in it is replaced as by `replace_files`: weights of the same config whole or not at all.

    Args:
        model: its config and weights are saved, as they are.
        run: the directory.

    Raises:
        OSError: it could not be written; on a full disk what was there before still is.
    """
    import safetensors.torch

    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    replace_files(
        {
            folder / "config.json": config.encode(),
            folder / "model.safetensors": safetensors.torch.save(weights),
        }
    )


def load(run: str | os.PathLike[str]) -> LanguageModel:
    """The language model that was saved into the directory `run`, on the CPU and in eval mode.

    Args:
        run: the directory; other files in it do not matter.

    Raises:
        ValueError: there is no model, or its files are torn, or do not belong together.
    """
    return load_model(run, LanguageModelConfig, LanguageModel)


def load_model(run: str | os.PathLike[str], config_kind: Any, kind: type[Kind]) -> Kind:
    """The model of any kind that was saved into the directory `run`; else as `load`.

    Args:
        run: the directory.
        config_kind: class of its config, which has `from_dict`.
        kind: class of the model.
    """
    import safetensors
    import safetensors.torch

    config, weights = Path(run, "config.json"), Path(run, "model.safetensors")
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(f"load: run must be a directory that holds {path.name}, got {os.fspath(run)!r}")
    try:
        wanted = config_kind.from_dict(json.loads(config.read_bytes()))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # the last two: nested or large beyond sense
        raise ValueError(f"load: {config} must be the config of a {kind.__name__}, got: {error}") from error
    try:
        tensors = safetensors.torch.load(weights.read_bytes())
        if wanted.backbone.layers > len(tensors):  # before they are made, which could take for ever
            raise ValueError(f"{len(tensors)} tensors for {wanted.backbone.layers} layers")
        with torch.device("meta"):
            model = kind(wanted)
        model.load_state_dict(tensors, assign=True)
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"load: {weights} must be the weights of {config.name}, got: {error}") from error
    return model.eval()
