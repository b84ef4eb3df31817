"""The command line. Each command imports what it needs, so that `info` and `bench` need no extra."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from minrnn._console import silence
from minrnn._extras import how_to_install

USAGE = """\
usage: minrnn COMMAND ...

  train      train a language model on a text, or a policy on logged episodes
  eval       measure a trained model on its held-out text, or on another
  generate   continue a prompt
  info       versions, backends, threads and memory settings
  bench      time and memory of the layers against nn.GRU, nn.LSTM and others
  reproduce  the experiments of the paper, with its numbers beside ours
  rl         offline reinforcement learning: data, evaluation, videos

`minrnn COMMAND --help` tells more about each.
"""
STOPPED = 130  # as shells report a process that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with these arguments (None: those of the process) and return its exit status.

    0: done; 1: not done, and a sentence on the standard error output says why; 2: bad arguments; 130: Ctrl-C; 128 + its
    number: another signal.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(USAGE if asked else f"{USAGE}\nminrnn: no command {name!r}\n")
        return 0 if asked else 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale without some character is no reason to stop
        sys.stdout.reconfigure(errors="replace")
    try:
        return COMMANDS[name](arguments)
    except ModuleNotFoundError as error:
        if (reason := how_to_install(error)) is None:
            raise
        return _fail(name, reason)
    except BrokenPipeError:  # whoever read the output has had enough
        silence(sys.stdout)
        return 0
    except (ValueError, OSError) as error:
        return _fail(name, str(error))
    except KeyboardInterrupt:
        _fail(name, "stopped")
        return STOPPED


def train(arguments: list[str]) -> int:
    """Train a language model, or, with --task offline, a policy from logged episodes. With no argument: a minGRU on
    Python's own manual, three minutes on two cores."""
    from minrnn._console import say
    from minrnn.bench.facts import HUGE_PAGES, use_huge_pages

    huge_pages = use_huge_pages()  # before lightning is imported, which makes tensors

    import jsonargparse
    import yaml

    from minrnn.mixers import mixer_config
    from minrnn.train.config import TASKS, RunConfig, parts_of
    from minrnn.train.module import Interrupted
    from minrnn.train.progress import make_console
    from minrnn.train.run import train as train_run

    presets = _presets()

    class Preset(jsonargparse.ActionConfigFile):  # pyright: ignore[reportPrivateImportUsage]
        """A file, or the name of one that comes with the package."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            try:
                super().__call__(parser, cfg, str(presets.get(values, values)), option_string)
            except UnicodeDecodeError as error:
                raise ValueError(f"--config: must be a file of UTF-8, got {values!r}: {error}") from error

    parser = jsonargparse.ArgumentParser(
        prog="minrnn train",
        usage="minrnn train [--config PRESET] [--data DATA] [--out DIRECTORY] [--resume] [--KEY VALUE ...]",
        description=train.__doc__,
        formatter_class=jsonargparse.DefaultHelpFormatter,
        allow_abbrev=False,
        print_config=None,  # it would print what was given, without the defaults
    )
    parser.add_argument(
        "--config", action=Preset, help=f"a YAML file that sets any of these keys, or a preset: {', '.join(presets)}"
    )
    parser.add_argument("--out", type=str, help="directory of the run; runs/DATA-MIXER if not given")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in that directory")
    parser.add_argument(
        "--print_config", action="store_true", help="print all keys of the run, as --config reads them, and do no more"
    )
    parser.add_argument("--task", type=str, help=f"what is learned: {' or '.join(TASKS)}; it decides which keys follow")
    for part in parts_of(_task_of(arguments, presets)).values():
        parser.add_class_arguments(part)
    keys = [re.sub(r"^--[\w-]+", lambda key: "--" + key[0][2:].replace("-", "_"), each) for each in arguments]
    given = dict(parser.parse_args(_config_first(keys), defaults=False).items())
    given.pop("config", None)
    out, resume, print_config = given.pop("out", None), given.pop("resume", False), given.pop("print_config", False)
    try:
        config = None if resume and out else RunConfig.from_dict(given)
    except TypeError as error:  # of a mixer's option: the parser knows no types of those
        raise ValueError(error) from error
    run = Path(out) if config is None else Path(out or f"runs/{config.task.name}-{config.backbone.mixer}")
    if config is None or resume:
        config = RunConfig.of_run(run)
        data = given.pop("data", config.task.data)  # it may have moved: its checksum says that it is the same
        for key, value in given.items():
            kept = config.to_dict()[key]
            if isinstance(value, dict):  # options of the mixer, the rest of which are kept
                options = mixer_config(config.backbone.mixer, kept)
                kept = {name: getattr(options, name, None) for name in value}
            if value != kept:
                raise ValueError(f"--{key} must be {kept!r} to resume the run in {run}, got {value!r}")
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, data=data))
    if print_config:
        sys.stdout.write(yaml.safe_dump(config.to_dict(), sort_keys=False))
        return 0
    console = make_console()
    if huge_pages:
        console.print(f"[dim]{HUGE_PAGES}=1: torch's CPU allocator uses huge pages[/]", highlight=False)
    without = sorted(given.keys() & {"dropout", "mlp_kind"})
    if without and not config.backbone.mlp:
        what = f"without effect: {', '.join(without)}; {config.backbone.mixer} has no MLP here, --mlp gives it one"
        say(console, what)
    if config.train.warmup >= config.train.steps:
        steps = f"--warmup {config.train.warmup} is not below --steps {config.train.steps}"
        say(console, f"the learning rate only rises: {steps}")
    try:
        train_run(config, run, resume=resume, console=console)
    except Interrupted as stop:
        how = f"{stop}; to go on: minrnn train --out {shlex.quote(str(run))} --resume"
        say(console, how)
        return 128 + stop.signal
    return 0


def _presets() -> dict[str, Path]:
    """The presets that come with the package, by their names."""
    folder = Path(str(resources.files("minrnn") / "configs"))
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def _config_first(arguments: list[str]) -> list[str]:
    """Files first, whose keys the others, wherever they stand, override."""
    parser = argparse.ArgumentParser("minrnn train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    given, others = parser.parse_known_args(arguments)
    return [*(f"--config={each}" for each in given.config), *others]


def _task_of(arguments: list[str], presets: Mapping[str, Path]) -> str:
    """What is learned, by which the other keys are known: as --task, --config or the resumed run say."""
    import yaml

    from minrnn.train.config import RunConfig

    parser = argparse.ArgumentParser("minrnn train", add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    given, _ = parser.parse_known_args(arguments)
    if given.task:
        return given.task
    for config in reversed(given.config):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # of which the parser of all keys will tell
            table = yaml.safe_load(Path(presets.get(config, config)).read_text(encoding="utf-8"))
            if isinstance(table, dict) and "task" in table:
                return str(table["task"])
    return RunConfig.of_run(given.out).kind if given.resume and given.out else "text"


def evaluate(arguments: list[str]) -> int:
    """Measure a trained model: on the text that was held out from it, or on all of another one."""
    parser = argparse.ArgumentParser("minrnn eval", description=evaluate.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--data", metavar="TEXT", help="pydoc, shakespeare, or a UTF-8 file (default: the run's own)")
    given = parser.parse_args(arguments)

    import torch

    from minrnn.models import load
    from minrnn.tasks import TextConfig, TextTask
    from minrnn.tasks.corpus import read_corpus
    from minrnn.tasks.text import checksum, score
    from minrnn.tasks.vocabulary import encode, load_tokenizer
    from minrnn.train import RunConfig

    config = RunConfig.of_run(given.run).task
    if not isinstance(config, TextConfig):
        raise ValueError(f"run must have learned a text, got {given.run}, where train.json has another task")
    model = load(given.run)
    tokenizer = load_tokenizer(given.run / "tokenizer.json")
    text = None if given.data is None else read_corpus(given.data)
    if text is None or checksum(text) == config.sha256:
        config = dataclasses.replace(config, data=given.data or config.data)
        part, tokens = "what was held out of", TextTask(config, tokenizer).held_out
    else:
        part, tokens = "all of", torch.from_numpy(encode(tokenizer, text))
    if len(tokens) < 2:
        raise ValueError(f"--data must have at least 2 {config.unit}s, got {len(tokens)} in {given.data}")
    loss = score(model, tokens, config)
    sys.stdout.write(
        f"{len(tokens) - 1:,} {config.unit}s, {part} {given.data or config.data}\n"
        f"{loss:.4f} nats per {config.unit} in windows of {config.length} from zero state\n"
    )
    if model.constant_state:
        loss = score(model, tokens, config, carried=True)
        sys.stdout.write(f"{loss:.4f} nats per {config.unit} as one sequence with its state carried on\n")
    return 0


def generate(arguments: list[str]) -> int:
    """Continue a prompt with a trained model, and print the text as it is made."""
    parser = argparse.ArgumentParser("minrnn generate", description=generate.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--prompt", help="text to continue (default: a line break, if the model knows it)")
    parser.add_argument("--length", type=int, help="new tokens (default: 500; for a model whose state grows with "
                        "the text, at most what its training windows had)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy decoding (default: 0.8)")
    parser.add_argument("--top-k", "--top_k", type=int, help="sample from the K most likely tokens")
    text = "nucleus sampling: from the most likely tokens whose probabilities add up to P"
    parser.add_argument("--top-p", "--top_p", type=float, help=text)
    parser.add_argument("--seed", type=int, help="the same seed makes the same text")
    given = parser.parse_args(arguments)
    if given.seed is not None and not 0 <= given.seed < 2**64:
        parser.error(f"argument --seed: must be in [0, 2**64), got {given.seed}")
    if given.length is not None and given.length < 0:
        parser.error(f"argument --length: must be at least 0, got {given.length}")
    if given.prompt == "":
        parser.error("argument --prompt: must have at least one character, got none")

    import torch

    from minrnn import models
    from minrnn.tasks import TextConfig
    from minrnn.tasks.vocabulary import decode_stream, default_prompt, encode, load_tokenizer
    from minrnn.train import RunConfig

    model, tokenizer = models.load(given.run), load_tokenizer(given.run / "tokenizer.json")
    generator = torch.Generator()
    generator.seed() if given.seed is None else generator.manual_seed(given.seed)
    prompt = default_prompt(tokenizer) if given.prompt is None else encode(tokenizer, given.prompt).tolist()
    length = given.length
    if length is None:
        length = 500
        if not model.constant_state:  # it may know no longer text than those that it was trained on
            config = RunConfig.of_run(given.run).task
            assert isinstance(config, TextConfig), "what has a tokenizer has learned a text"
            room = config.length - len(prompt)
            length = max(1, min(length, room))
            if room < 1:
                what = f"the prompt of {len(prompt)} tokens fills the model's training windows of {config.length}"
                sys.stderr.write(f"minrnn generate: one token more, for {what}; --length asks for others\n")
    ids = models.generate(
        model,
        prompt,
        max_new_tokens=length,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        generator=generator,
    )
    pieces = decode_stream(tokenizer, ids, prompt)
    first = next(pieces, "")  # before the prompt is shown: it may be too long for the model
    sys.stdout.write(tokenizer.decode(prompt, skip_special_tokens=False) if given.prompt is None else given.prompt)
    try:
        for piece in itertools.chain([first], pieces):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
    return 0


def info(arguments: list[str]) -> int:
    """Say what runs here, and why: versions, backends, threads, instruction set, memory settings."""
    parser = argparse.ArgumentParser("minrnn info", description=info.__doc__)
    parser.add_argument("--mixers", action="store_true", help="list the mixers instead: every system of the comparison")
    given = parser.parse_args(arguments)
    from minrnn.bench.report import columns
    from minrnn.info import describe, mixers

    sys.stdout.write((columns(mixers()) if given.mixers else describe()) + "\n")
    return 0


def bench(arguments: list[str]) -> int:
    """`minrnn bench`, which reads its own arguments."""
    from minrnn.bench import main as run_bench
    from minrnn.bench.facts import use_huge_pages

    use_huge_pages()

    return run_bench(arguments)


def reproduce(arguments: list[str]) -> int:
    """`minrnn reproduce`, which reads its own arguments."""
    from minrnn.bench.facts import use_huge_pages

    use_huge_pages()  # for its worker processes, which inherit it

    from minrnn.reproduce.cli import main as run_reproduce

    return run_reproduce(arguments)


def rl(arguments: list[str]) -> int:
    """`minrnn rl`, which reads its own arguments."""
    from minrnn.rl.cli import main as run_rl

    return run_rl(arguments)


COMMANDS = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "info": info,
    "bench": bench,
    "reproduce": reproduce,
    "rl": rl,
}


def _fail(command: str, reason: str) -> int:
    sys.stderr.write(f"minrnn {command}: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
