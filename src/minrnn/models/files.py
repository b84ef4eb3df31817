"""A model on disk: config.json and model.safetensors in one directory, read without running code that they may hold."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from minrnn.models.config import LanguageModelConfig
from minrnn.models.language import LanguageModel


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, then put all into them: while there is no room for all, the old ones stay.

    Args:
        contents: what is to stand in each file.

    Raises:
        OSError: not all could be written; nothing has changed.
    """
    aside = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, content in contents.items():
            with aside[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        for part in aside.values():
            part.unlink(missing_ok=True)
        raise
    for path, part in aside.items():
        os.replace(part, path)


def save(model: LanguageModel, run: str | os.PathLike[str]) -> None:
    """Save a model into the directory `run`, made if it is not there. A model in it is replaced whole or not at all.

    Args:
        model: its config and weights are saved, as they are.
        run: the directory.

    Raises:
        OSError: it could not be written; what was there before still is.
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
    """The model that was saved into the directory `run`, on the CPU and in eval mode.

    Args:
        run: the directory; other files in it do not matter.

    Raises:
        ValueError: there is no model, or its files are torn, or do not belong together.
    """
    import safetensors
    import safetensors.torch

    config, weights = Path(run, "config.json"), Path(run, "model.safetensors")
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(f"load: run must be a directory that holds {path.name}, got {os.fspath(run)!r}")
    try:
        with torch.device("meta"):
            model = LanguageModel(LanguageModelConfig.from_dict(json.loads(config.read_bytes())))
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: sizes beyond any tensor
        raise ValueError(f"load: {config} must be the config of a model, got: {error}") from error
    try:
        model.load_state_dict(safetensors.torch.load(weights.read_bytes()), assign=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"load: {weights} must be the weights of {config.name}, got: {error}") from error
    return model.eval()
