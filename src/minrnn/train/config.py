"""What a run is made from: its data, its model, and how it trains. Imports nothing that only training needs."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from minrnn._config import check_at_least, check_choice, check_fraction, check_positive, check_types
from minrnn.models import BackboneConfig
from minrnn.rl.systems import usual
from minrnn.rl.task import OfflineConfig
from minrnn.tasks import TextConfig

Precision = Literal["32-true", "bf16-mixed", "64-true"]
Decay = Literal["cosine", "constant"]
Keep = Literal["last", "best"]


@dataclass(frozen=True)
class TrainConfig:
    """AdamW, a warm-up, then a cosine down to zero or a constant learning rate.

    Args:
        steps: training steps
        lr: highest learning rate
        warmup: steps in which the learning rate rises to it
        decay: of the learning rate after that: cosine or constant
        beta2: AdamW's decay rate of the second moment
        weight_decay: AdamW's decay of the matrices (nothing else decays)
        clip: gradients are clipped to this norm
        eval_every: steps between two measurements of the held-out loss
        save_every: steps between two checkpoints
        patience: end after so many steps in which the held-out loss found no new minimum; 0 for never
        keep: which model is saved: that of the last step, or the best, by held-out loss
        seed: of the weights, the batches and dropout
        precision: bf16-mixed is bfloat16 autocast of float32 weights, and float32 on a processor without kernels for it
        devices: processes that share a batch, one device each; offline, each averages over the steps of its own windows
    """

    steps: int = 2700
    lr: float = 8e-3
    warmup: int = 100
    decay: Decay = "cosine"
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 250
    save_every: int = 50
    patience: int = 0
    keep: Keep = "last"
    seed: int = 0
    precision: Precision = "32-true"
    devices: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "steps", "eval_every", "save_every", "devices")
        check_at_least(self, 0, "warmup", "weight_decay", "patience", "seed")
        if self.seed >= 2**32:  # larger ones share random numbers with what is held out (`AnswerTask`)
            raise ValueError(f"TrainConfig: seed must be below 2**32, got {self.seed}")
        check_positive(self, "lr")
        check_positive(self, "clip", finite=False)
        check_fraction(self, "beta2")
        for name, kinds in (("decay", Decay), ("keep", Keep), ("precision", Precision)):
            check_choice(self, name, get_args(kinds))

    def schedule(self, step: int) -> float:
        """The learning rate of step `step` (from 0) as a fraction of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / max(self.steps - self.warmup, 1))


TASKS = {"text": TextConfig, "offline": OfflineConfig}


def parts_of(task: str) -> dict[str, type]:
    """The classes that a run's table is made from.

    Args:
        task: what is learned, a key of `TASKS`.

    Raises:
        ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"RunConfig: task must be one of {', '.join(TASKS)}, got {task!r}")
    return {"task": TASKS[task], "backbone": BackboneConfig, "train": TrainConfig}


@dataclass(frozen=True)
class RunConfig:
    """All that a run is made from: the data, the blocks of the model, the training.

    As plain values it is one flat table, in train.json and in presets, whose line `task` says what is learned: `text`,
    if it is not there, or `offline`, to act from logged episodes.
    """

    task: TextConfig | OfflineConfig = field(default_factory=TextConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        size, devices = self.task.batch_size, self.train.devices
        if size % devices:
            raise ValueError(f"RunConfig: batch_size must be a multiple of devices = {devices}, got {size}")

    @property
    def kind(self) -> str:
        """What is learned, a key of `TASKS`."""
        return next(name for name, config in TASKS.items() if type(self.task) is config)

    def to_dict(self) -> dict[str, Any]:
        """The task's name and the fields of all parts, in one table."""
        parts = [asdict(each) for each in (self.task, self.backbone, self.train)]
        return {"task": self.kind, **{name: value for part in parts for name, value in part.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The config of a table: what is not there has its default, what is unknown is a ValueError.

        Defaults are those of the classes; where a run learns to act, what surrounds its mixer, how it trains, and what
        the mixer's options leave open, is as in `minrnn.rl.systems`.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"RunConfig: fields must be a mapping, got {type(values).__name__}")
        values = dict(values)
        kind = values.pop("task", "text")
        classes = parts_of(kind)
        known = {part: [each.name for each in fields(config)] for part, config in classes.items()}
        every = {name for names in known.values() for name in names}
        if unknown := values.keys() - every:
            raise ValueError(f"RunConfig: fields must be known, got {', '.join(sorted(unknown))}")
        if kind == "offline" and every - values.keys():  # a whole table, as `to_dict` gives it, means what it says
            shell = usual(values.get("mixer", "mingru"))
            options = {**shell.get("mixer_options", {}), **values.get("mixer_options", {})}
            values = {**shell, **values, "mixer_options": options}
        given = {part: {name: values[name] for name in names if name in values} for part, names in known.items()}
        return cls(**{part: config(**given[part]) for part, config in classes.items()})

    @classmethod
    def of_run(cls, run: Path) -> "RunConfig":
        """The config that the run in the directory `run` has; ValueError if there is none."""
        try:
            return cls.from_dict(json.loads((run / "train.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"run: {run} must be the directory of a run, got no train.json there") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"run: {run / 'train.json'} is damaged: {error}") from None
