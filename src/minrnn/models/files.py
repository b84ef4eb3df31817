"""A model on disk: config.json and model.safetensors in one directory, read without running code that they may hold."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch

from minrnn._files import replace_files
from minrnn.models.base import SequenceModel
from minrnn.models.language import LanguageModel

Kind = TypeVar("Kind", bound=SequenceModel)


def save(model: SequenceModel, run: str | os.PathLike[str]) -> None:
    """Save a model into the directory `run`, made if it is not there.

    A model in it is replaced as by `replace_files`: weights of the same config whole or not at all.

    Args:
        model: its config and weights are saved, as they are; of what `torch.compile` made of a model, the model's.
        run: the directory.

    Raises:
        ValueError: its weights are not those that its config makes, as under a parametrization, or share memory.
        OSError: it could not be written; on a full disk what was there before still is.
    """
    import safetensors.torch

    model = getattr(model, "_orig_mod", model)
    with torch.device("meta"):
        wanted = type(model)(model.config).state_dict().keys()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if odd := sorted(wanted ^ weights.keys()):
        raise ValueError(f"save: model must have the weights that its config makes, got others: {', '.join(odd)}")
    try:
        content = safetensors.torch.save(weights)
    except RuntimeError as error:
        if "share memory" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"save: model must have weights that share no memory, got: {reason}") from error
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    replace_files({folder / "config.json": config.encode(), folder / "model.safetensors": content})


def load(run: str | os.PathLike[str]) -> LanguageModel:
    """The language model that was saved into the directory `run`, on the CPU and in eval mode.

    Args:
        run: the directory; other files in it do not matter.

    Raises:
        ValueError: there is no model, or its files are torn, or do not belong together.
    """
    return load_model(run, LanguageModel)


def load_model(run: str | os.PathLike[str], kind: type[Kind]) -> Kind:
    """The model of any kind that was saved into the directory `run`; else as `load`.

    Args:
        run: the directory.
        kind: class of the model.
    """
    import safetensors
    import safetensors.torch

    config, weights = Path(run, "config.json"), Path(run, "model.safetensors")
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(f"load: run must be a directory that holds {path.name}, got {os.fspath(run)!r}")
    try:
        wanted: Any = kind.config_class.from_dict(json.loads(config.read_bytes()))
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
