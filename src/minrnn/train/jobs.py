"""What runs of different tasks have of their own: which model, which files beside it, and what is said at the end."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from minrnn._console import say
from minrnn.models import BackboneConfig, LanguageModel, LanguageModelConfig, SequenceModel, generate
from minrnn.rl.collect import named_env, references
from minrnn.rl.decision import DecisionModel
from minrnn.rl.environments import check_fits
from minrnn.rl.policy import FILE, PolicyFacts
from minrnn.rl.scores import family
from minrnn.rl.sources import split
from minrnn.rl.systems import SYSTEMS
from minrnn.rl.task import OfflineConfig, OfflineTask
from minrnn.rl.task import locate as locate_episodes
from minrnn.tasks import Task, TextConfig, TextTask
from minrnn.tasks.corpus import locate
from minrnn.tasks.text import score
from minrnn.tasks.vocabulary import decode_stream, load_tokenizer


class Job(Protocol):
    """A task in a run."""

    task: Task

    def noted(self) -> Any:
        """The task's config as the run notes it: with a name of the data that holds anywhere, and their checksum."""
        ...

    def make_model(self, backbone: BackboneConfig) -> SequenceModel:
        """The model to train."""
        ...

    def files(self) -> dict[str, str]:
        """What lies beside the model, by the names of files."""
        ...

    def about(self) -> str:
        """The data in a line."""
        ...

    def labels(self, model: Any) -> tuple[str, str]:
        """The title and the unit of the learning curve."""
        ...

    def measure(self, model: Any) -> dict[str, float | None]:
        """What result.json holds beside the held-out loss."""
        ...

    def show(self, model: Any, result: dict[str, Any], console: Console) -> None:
        """Say what has come out."""
        ...


class TextJob:
    """A language model on a text.

    Args:
        config: which text.
        run: the directory of a run to resume; its tokenizer is used.
    """

    def __init__(self, config: TextConfig, run: Path | None) -> None:
        self.task = TextTask(config, load_tokenizer(run / "tokenizer.json") if run else None)

    def noted(self) -> TextConfig:
        config = self.task.config
        return dataclasses.replace(config, data=locate(config.data), sha256=self.task.sha256)

    def make_model(self, backbone: BackboneConfig) -> LanguageModel:
        return LanguageModel(LanguageModelConfig(self.task.vocabulary, backbone))

    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.task.tokenizer.to_str()}

    def about(self) -> str:
        task = self.task
        unit, train, held_out = task.config.unit, len(task.train), len(task.held_out) - 1
        return f"{task.config.data}: {train:,} {unit}s to train on, {held_out:,} held out"

    def labels(self, model: LanguageModel) -> tuple[str, str]:
        config = self.task.config
        return f"{Path(config.data).name}, {model.config.backbone.mixer}", f"nats per {config.unit}"

    def measure(self, model: LanguageModel) -> dict[str, float | None]:
        task = self.task
        carried = score(model, task.held_out, task.config, carried=True) if model.constant_state else None
        return {"held_out_carried": carried}

    def show(self, model: LanguageModel, result: dict[str, Any], console: Console) -> None:
        task, length, unit = self.task, self.task.config.length, f"nats per {self.task.config.unit}"
        # A model without a constant state may know no longer text than those that it was trained on.
        read, make = (length, 300) if model.constant_state else (length // 2 + 1, length // 2)
        prompt = task.held_out[:read].tolist()
        ids = generate(model, prompt, max_new_tokens=make, temperature=0.8, generator=torch.Generator().manual_seed(0))
        console.rule("a sample", align="left")
        say(console, "".join(decode_stream(task.tokenizer, ids, prompt)))
        console.rule("the end", align="left")
        say(console, f"held out: {result['held_out']:.4f} {unit} in windows of {length} from zero state")
        if model.constant_state:
            say(console, f"held out: {result['held_out_carried']:.4f} {unit} with the state carried on")


class OfflineJob:
    """A decision model on logged episodes.

    Args:
        config: which episodes.
        run: of no importance here: the scales of the data follow from the data.

    Raises:
        ValueError: the config's environment is another one than that of the data: more than its version differs, or
            its spaces have other sizes.
    """

    def __init__(self, config: OfflineConfig, run: Path | None) -> None:
        self.task = OfflineTask(config)  # first: what is downloaded now tells its environment then
        asked, named = config.env, named_env(config.data)
        parts = [(part, of) for part in split(config.data) if (of := named_env(part) or family(Path(part).name))]
        for part, of in parts:
            if asked and _differ(asked, of):
                raise ValueError(f"env must be a version of {of}, of which {part} is, got {asked}")
            if _differ(parts[0][1], of):
                raise ValueError(f"data must be of one environment, got {' of '.join(parts[0])} and {part} of {of}")
        if asked:
            check_fits(asked, self.task.episodes.observation_size, self.task.episodes.action_size)
        # Returns that were measured in another version are no references in this one.
        known = references(config.data) if asked in (None, named) else {}
        self.facts = PolicyFacts(asked or named, self.task.targets, known)

    def noted(self) -> OfflineConfig:
        config = self.task.config
        return dataclasses.replace(config, data=locate_episodes(config.data), sha256=self.task.sha256)

    def make_model(self, backbone: BackboneConfig) -> DecisionModel:
        return self.task.make_model(backbone)

    def files(self) -> dict[str, str]:
        return {FILE: self.facts.to_json()}

    def about(self) -> str:
        task, data = self.task, self.task.episodes
        episodes = f"{len(task.train):,} episodes to train on, {len(task.held_out):,} held out"
        returns = f"returns {data.returns.mean():,.0f} ± {data.returns.std():,.0f}, at most {data.returns.max():,.0f}"
        return f"{task.config.data}: {episodes}, {len(data.rewards):,} steps, {returns}"

    def labels(self, model: DecisionModel) -> tuple[str, str]:
        mixer = model.config.backbone.mixer
        name = SYSTEMS[mixer].name if mixer in SYSTEMS else mixer
        return f"{self.task.config.name}, {name}", "squared error of an action"

    def measure(self, model: DecisionModel) -> dict[str, float | None]:
        return {}

    def show(self, model: DecisionModel, result: dict[str, Any], console: Console) -> None:
        say(console, f"held out: a mean squared error of {result['held_out']:.4f} per number of an action")


def _differ(one: str, other: str) -> bool:
    """Whether two names are known to be of different environments, by more than a version."""
    return len({family(one), family(other)} - {None}) > 1


JOBS = {TextConfig: TextJob, OfflineConfig: OfflineJob}
