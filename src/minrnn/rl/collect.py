"""Makes data where the originals cannot be had: `minrnn rl collect`.

Behaviour policies that come with minrnn, or that are trained here, are rolled; the episodes become a Minari dataset
that says where it comes from.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from minrnn._console import say
from minrnn._files import locked
from minrnn.rl import digests, ppo
from minrnn.rl.behaviour import Behaviour, Digest
from minrnn.rl.environments import check_limit, check_spaces, make_env
from minrnn.rl.progress import Bar
from minrnn.rl.rolling import Part, RolloutStore, read, roll_parts
from minrnn.rl.scores import family, normalized
from minrnn.rl.sources import minari_file, split

SHIPPED = Path(__file__).parent / "behaviours"
STEPS = {"medium": 200_000, "medium-replay": 100_000}
RANDOM_EPISODES = 100
RANDOM_STREAM = 2**31  # beyond every policy's, which is its number of training steps
KEY = "minrnn"  # of our part of Minari's metadata


@dataclass(frozen=True)
class CollectConfig:
    """What is to be collected.

    Args:
        env: of Gymnasium, such as Hopper-v5
        quality: medium, the last of the snapshots, or medium-replay, all of them in equal parts from the first to the
            last, as a replay buffer holds them
        steps: at least so many; the last episode is whole (default: 200,000 of medium, 100,000 of medium-replay)
        seed: of the rolling, and of the training where there are no snapshots
    """

    env: str
    quality: str = "medium"
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.quality not in STEPS:
            raise ValueError(f"collect: quality must be one of {', '.join(STEPS)}, got {self.quality!r}")
        if self.steps is None:
            object.__setattr__(self, "steps", STEPS[self.quality])
        for name, low, high in (("steps", 1, 2**40), ("seed", 0, 2**31)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value < high:
                raise ValueError(f"collect: {name} must be a whole number in [{low}, {high}), got {value!r}")

    @property
    def name(self) -> str:
        """Of the Minari dataset."""
        return f"minrnn/{self.env}/{self.quality}-v0"


def collect(
    config: CollectConfig,
    *,
    out: Path | None = None,
    behaviours: Path | None = None,
    processes: int = 1,
    console: Console,
) -> dict[str, Any]:
    """Collect a Minari dataset, and say what became of it.

    What was killed goes on from where it was: training from its last snapshot, rolling from its last episodes. What
    another process is making is waited for.

    Args:
        config: what is wanted.
        out: the dataset's directory (default: where Minari finds it by its name).
        behaviours: a folder that has, or gets, one folder of snapshots for each environment (default: those that come
            with minrnn; `behaviours` in the working directory for other environments).
        processes: how many roll at once. They do not change the data.
        console: where progress is shown.

    Returns:
        The provenance, as it stands in the dataset: settings, policies, returns, SHA-256, versions, and under `digest`
        whether these policies gave the same before.

    Raises:
        ValueError: the environment, the policies or what is in `out` already do not fit.
        OSError: something cannot be written.
    """
    out = (out or minari_root() / config.name).absolute()  # Minari wants it so
    folder = behaviours / config.env if behaviours else _default_folder(config.env)
    if existing := _existing(config, folder, out, console):
        return existing
    with make_env(config.env) as env:
        check_limit(env, config.env)
        if not env.action_space.is_bounded():
            raise ValueError(f"collect: env must have bounded actions, got {config.env} with {env.action_space}")
        found = _snapshots(config, folder, console)
        _check_policies(found, env, config.env)
    chosen = _choose(config, found)
    policies = [{"file": path.name, "sha256": ppo.sha256(path)} for path, _ in chosen]
    settings: dict[str, Any] = {**asdict(config), "behaviours": policies}
    with _lock(out, console):
        if existing := _existing(config, folder, out, console):  # by another process, for which this one has waited
            return existing
        share = -(-settings["steps"] // len(chosen))
        parts = [Part(path, policy.facts["steps"], share, 1) for path, policy in chosen]
        parts.append(Part(None, RANDOM_STREAM, 0, RANDOM_EPISODES))
        store = RolloutStore(config.env, config.seed, _store_folder(out, settings))
        with Bar(console, f"rolling {config.name}", settings["steps"]) as bar:
            have = [0] * len(parts)

            def told(number: int, steps: int) -> None:
                have[number] = steps
                bar.tell(min(sum(have[:-1]), settings["steps"]), f"{sum(have[:-1]):,} steps")

            *files, random = roll_parts(store, parts, processes=processes, told=told)
        record = _record(settings, files, random)
        record["digest"] = digests.compare(record, folder)
        if not record["digest"] and (behaviours is not None or folder.parent != SHIPPED):
            with _lock(folder, console):
                record["digest"] = digests.note(record, folder)
        _write(config, record, files, out, env.observation_space, env.action_space)
        _clear(out)
        say(console, describe(record, out))
        return record


def provenance(dataset: str | os.PathLike[str]) -> dict[str, Any]:
    """What `collect` wrote into a Minari dataset about its making; empty for any other data.

    Args:
        dataset: its directory or, if there is none, its name. Several joined with `+`: the first one's.
    """
    return _metadata(dataset).get(KEY, {})


def named_env(dataset: str | os.PathLike[str]) -> str | None:
    """The environment that a Minari dataset says it is of; None where it does not.

    Args:
        dataset: as `provenance` takes it.
    """
    with suppress(ValueError, KeyError, TypeError):
        return json.loads(_metadata(dataset)["env_spec"])["id"]
    return None


def _metadata(dataset: str | os.PathLike[str]) -> dict[str, Any]:
    first = split(os.fspath(dataset))[0]
    for root in (Path(first), minari_root() / first):
        file = minari_file(root)
        if file and (path := file.with_name("metadata.json")).is_file():
            try:
                return dict(json.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"provenance: {path} must be the metadata of Minari, got: {error}") from error
    return {}


def references(dataset: str | os.PathLike[str]) -> dict[str, float]:
    """The measured returns of the random policy and of the behaviour policy (of medium-replay: the last one), as
    `random` and `behaviour`; empty for data that `collect` did not make, and for several that are joined.

    Args:
        dataset: as `provenance` takes it.
    """
    record = provenance(dataset) if len(split(os.fspath(dataset))) == 1 else {}
    return {"random": record["random"]["mean"], "behaviour": record["behaviours"][-1]["mean"]} if record else {}


def last_behaviour(env_id: str) -> Behaviour:
    """The policy behind the medium data of an environment, which is the last of those behind medium-replay.

    Raises:
        ValueError: there is none, or it is torn.
    """
    folder = _default_folder(env_id)
    if not (found := ppo.snapshots(folder)):
        raise ValueError(f"behaviours: {folder} must have a policy, got none: minrnn rl collect trains it")
    return found[-1][1]


def minari_root() -> Path:
    """Where Minari keeps datasets by name."""
    given = os.environ.get("MINARI_DATASETS_PATH")
    return Path(given) if given else Path.home() / ".minari" / "datasets"


def describe(record: dict[str, Any], out: Path) -> str:
    """Two or three sentences on a dataset."""
    low, made = record["random"]["mean"], record["returns"]
    score = ""
    if family(record["env"]):
        score = f", D4RL's score {normalized(record['env'], made['mean']):.1f}"
    returns = f"return {made['mean']:,.0f} ± {made['std']:,.0f}{score} (actions at random: {low:,.0f})"
    digest = ", ".join(filter(None, (f"SHA-256 {record['sha256']}", record["digest"])))
    return f"{out}: {made['episodes']:,} episodes, {made['steps']:,} steps, {returns}\n{digest}"


def _existing(config: CollectConfig, folder: Path, out: Path, console: Console) -> dict[str, Any]:
    """The provenance of what is in `out` already, which must be what is wanted; empty where nothing is.

    Its digest is compared anew, and what a process that was killed has left beside it is removed.
    """
    if not out.exists():
        return {}
    if existing := provenance(out):
        _check_same(existing, config, ppo.snapshots(folder), out)
        existing["digest"] = digests.compare(existing, folder)
        _clear(out)
        say(console, describe(existing, out))
    elif not out.is_dir() or any(out.iterdir()):
        raise ValueError(f"collect: out must be a new directory, got {out}, where something else is")
    return existing


def _check_same(
    existing: dict[str, Any], config: CollectConfig, found: Sequence[tuple[Path, Behaviour]], out: Path
) -> None:
    """Raise ValueError unless a dataset that is there is the one that is wanted."""
    wanted = asdict(config)
    differ = [f"{name} {existing.get(name)!r}" for name in wanted if existing.get(name) != wanted[name]]
    hashes = [ppo.sha256(path) for path, _ in _choose(config, found)]
    if found and hashes != [each["sha256"] for each in existing["behaviours"]]:
        differ.append("other behaviour policies")
    if differ:
        raise ValueError(f"collect: out must be new or have this very data, got {out}, which has {', '.join(differ)}")


def _choose(config: CollectConfig, found: Sequence[tuple[Path, Behaviour]]) -> Sequence[tuple[Path, Behaviour]]:
    """The policies that the data is of."""
    return found if config.quality == "medium-replay" else found[-1:]


def _default_folder(env_id: str) -> Path:
    shipped = SHIPPED / env_id
    return shipped if (shipped / ppo.INDEX).is_file() else Path("behaviours") / env_id


def _snapshots(config: CollectConfig, folder: Path, console: Console) -> list[tuple[Path, Behaviour]]:
    """The policies in `folder`, trained first if there are none."""
    if found := ppo.snapshots(folder):
        return found
    target, name = ppo.wanted_return(config.env), family(config.env)
    assert name, "there is a return for it"
    say(console, f"no behaviour policies in {folder}: training them")
    with _lock(folder, console):
        if found := ppo.snapshots(folder):  # by another process, for which this one has waited
            return found
        with Bar(console, f"training {config.env}", target) as bar:
            ppo.train(
                config.env,
                folder,
                target=target,
                settings=ppo.SETTINGS[name],
                seed=config.seed,
                told=lambda leg: bar.tell(
                    min(max(leg.mean_return, 0), target),
                    f"return {leg.mean_return:,.0f} of {target:,.0f} after {leg.steps:,} steps",
                ),
            )
    return ppo.snapshots(folder)


def _lock(folder: Path, console: Console) -> AbstractContextManager[None]:
    """A folder for this process alone."""
    return locked(folder.with_name(f".{folder.name}.lock"), partial(say, console))


def _check_policies(found: Sequence[tuple[Path, Behaviour]], env: Any, env_id: str) -> None:
    for path, policy in found:
        if (got := policy.facts.get("env")) != env_id:
            raise ValueError(f"behaviours: {path} must be a policy for {env_id}, got one for {got}")
        check_spaces(env, env_id, len(policy.mean), len(policy.log_std))


def _store_folder(out: Path, settings: dict[str, Any]) -> Path:
    """Beside `out`, and another one for other policies or another seed: episodes are never mixed. More steps are not
    other episodes."""
    decides = {name: value for name, value in settings.items() if name not in ("steps", "quality")}
    digest = hashlib.sha256(json.dumps([decides, ppo.versions()], sort_keys=True).encode()).hexdigest()
    return out.with_name(f".{out.name}-{digest[:12]}")


def _clear(out: Path) -> None:
    """Remove rolled episodes that nobody needs any more, because the dataset is whole."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}-{'[0-9a-f]' * 12}"):
        shutil.rmtree(folder, ignore_errors=True)  # another process may be at it, too


def _summary(files: Sequence[Path]) -> dict[str, Any]:
    rewards = [read(path).rewards for path in files]
    returns = [float(each.sum()) for each in rewards]
    return {
        "episodes": len(files),
        "steps": sum(map(len, rewards)),
        "mean": float(np.mean(returns)),
        "std": float(np.std(returns)),
    }


def _record(settings: dict[str, Any], files: Sequence[Sequence[Path]], random: Sequence[Path]) -> dict[str, Any]:
    """The provenance of what has been rolled."""
    digest = Digest()
    for path in chain(*files):
        digest.add(read(path))
    return {
        **settings,
        "behaviours": [each | _summary(part) for each, part in zip(settings["behaviours"], files, strict=True)],
        "returns": _summary([*chain(*files)]),
        "random": _summary(random),
        "sha256": str(digest),
        "versions": ppo.versions(),
    }


def _write(
    config: CollectConfig,
    record: dict[str, Any],
    files: Sequence[Sequence[Path]],
    out: Path,
    observation_space: Any,
    action_space: Any,
) -> None:
    """Make the dataset, and put it into its place when it is whole."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    def episodes() -> Any:
        for path in chain(*files):
            rolled = read(path)
            last = np.arange(len(rolled.rewards)) == len(rolled.rewards) - 1
            yield EpisodeBuffer(
                seed=int(rolled.seed),
                observations=rolled.observations,  # pyright: ignore[reportArgumentType]
                actions=rolled.actions,  # pyright: ignore[reportArgumentType]
                rewards=rolled.rewards,  # pyright: ignore[reportArgumentType]
                terminations=last & rolled.terminated,  # pyright: ignore[reportArgumentType]
                truncations=last & ~rolled.terminated,  # pyright: ignore[reportArgumentType]
                infos={},
            )

    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "data").mkdir(parents=True)
    spec = gymnasium.spec(config.env)
    storage = MinariStorage.new(aside / "data", observation_space, action_space, spec)
    storage.update_episodes(episodes())
    storage.update_metadata(
        {
            "dataset_id": config.name,
            "minari_version": minari.__version__,
            "algorithm_name": "PPO",
            "description": f"{config.quality} data of {config.env}, rolled by `minrnn rl collect`",
            "requirements": [
                f"gymnasium=={record['versions']['gymnasium']}",
                f"mujoco=={record['versions']['mujoco']}",
            ],
            KEY: record,
        }
    )
    if out.exists():
        out.rmdir()
    os.replace(aside, out)
