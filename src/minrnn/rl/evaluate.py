"""How good a policy is, in the environment itself, and how long it takes to act: `minrnn rl evaluate`."""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from minrnn._files import replace_files
from minrnn.rl.behaviour import MeanAction
from minrnn.rl.decision import DecisionModel
from minrnn.rl.environments import check_limit, check_spaces, make_env
from minrnn.rl.policy import Mode, Policy
from minrnn.rl.scores import family, reference

MOST = 16  # environments at once
EARLY, LATE, WARM_UP = 100, 900, 50  # steps of an episode of 1,000 that are timed, and those before


def evaluate(
    policy: Policy | MeanAction, env_id: str, *, episodes: int = 10, seed: int = 0, most: int = MOST
) -> tuple[np.ndarray, np.ndarray]:
    """Let a policy act in a vector of environments, deterministically.

    Each episode is begun by its own seed, so that it does not matter which of the environments plays it, and the first
    of more episodes begin as those of fewer do. Their beginnings are the same, but their returns not bit for bit, where
    another number of environments plays at once: matrix products then round otherwise, and MuJoCo lets that grow. An
    environment that has no episode left plays on uncounted.

    Args:
        policy: reset before, and left in the middle of something.
        env_id: a Gymnasium environment with the policy's sizes of observations and actions.
        episodes: how many are played to their ends.
        seed: of the episodes' beginnings.
        most: environments at once.

    Returns:
        Undiscounted returns, (episodes,) float64, and lengths, (episodes,) int64.

    Raises:
        ValueError: there is no such environment, its spaces are others than the policy's, no limit of steps ends its
            episodes, or it runs into numbers that are not finite.
    """
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    for name, got in (("episodes", episodes), ("most", most)):
        if got < 1:
            raise ValueError(f"evaluate: {name} must be at least 1, got {got}")
    seeds: list[int | None] = [int(each) for each in np.random.SeedSequence(seed).generate_state(episodes)]
    playing = np.arange(min(episodes, most))  # which episode each environment plays; `episodes` for none that counts
    returns, lengths = np.zeros(episodes + 1), np.zeros(episodes + 1, np.int64)
    begun = len(playing)
    first = make_env(env_id)
    try:
        check_spaces(first, env_id, policy.observation_size, policy.action_size)
        check_limit(first, env_id)
    except ValueError:
        first.close()
        raise
    space = first.action_space
    made = [lambda: first, *(lambda: make_env(env_id) for _ in playing[1:])]
    # Not autoreset: its episodes cannot be given their seeds.
    envs = SyncVectorEnv(made, autoreset_mode=AutoresetMode.DISABLED)
    try:
        policy.reset()
        observation, _ = envs.reset(seed=seeds[:begun])
        reward = action = None
        while True:
            # (The bounds are those of the data; the environment's may be narrower.)
            action = np.clip(policy.act(observation, reward, action), space.low, space.high)
            observation, reward, terminated, truncated, _ = envs.step(action)
            np.add.at(returns, playing, reward)
            np.add.at(lengths, playing, 1)
            ended = terminated | truncated
            if ended.any():
                for row in np.flatnonzero(ended):
                    playing[row], begun = min(begun, episodes), min(begun + 1, episodes)
                if (playing == episodes).all():
                    if len(bad := np.flatnonzero(~np.isfinite(returns[:-1]))):
                        raise ValueError(
                            f"evaluate: {env_id} must give finite rewards, got a return of {returns[bad[0]]} in "
                            f"episode {bad[0]}"
                        )
                    return returns[:-1], lengths[:-1]
                again = [seeds[each % episodes] for each in playing]
                observation, _ = envs.reset(seed=again, options={"reset_mask": ended})
                policy.reset(ended)
    finally:
        envs.close()


def scores(env_id: str, returns: np.ndarray, references: Mapping[str, float]) -> dict[str, float | None]:
    """Mean and standard deviation of returns, and what they are worth.

    Args:
        env_id: where they were earned.
        returns: one or more.
        references: returns that were measured there; `random` and `behaviour` are used.

    Returns:
        `mean` and `std` in the environment's units; `d4rl` and `d4rl_std`, where 0 is D4RL's random policy and 100 its
        expert, None for an environment that D4RL has not; `measured` and `measured_std`, where 0 is the random policy
        and 100 the behaviour policy as measured in this environment, None where nobody has.
    """
    mean, std = float(returns.mean()), float(returns.std())
    found: dict[str, float | None] = {"mean": mean, "std": std}
    bounds: dict[str, tuple[float, float] | None] = {"d4rl": None, "measured": None}
    if family(env_id):
        bounds["d4rl"] = reference(env_id)
    if {"random", "behaviour"} <= references.keys():
        bounds["measured"] = references["random"], references["behaviour"]
    for name, bound in bounds.items():
        unit = None if bound is None or bound[0] == bound[1] else 100 / (bound[1] - bound[0])
        found[name] = None if bound is None or unit is None else unit * (mean - bound[0])
        found[f"{name}_std"] = None if unit is None else abs(unit) * std
    return found


def play(
    model: DecisionModel,
    env_id: str,
    modes: Sequence[Mode],
    targets: Sequence[float],
    references: Mapping[str, float],
    *,
    episodes: int,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Let a model act in every mode, asked for every return.

    Args:
        model: put into eval mode.
        env_id, episodes, seed: as for `evaluate`.
        modes: of acting.
        targets: returns to ask for.
        references: as for `scores`.

    Yields:
        For each mode and target, those two, what `scores` has, all `returns` and `lengths`.
    """
    for mode, target in product(modes, targets):
        returns, lengths = evaluate(Policy(model, target=target, mode=mode), env_id, episodes=episodes, seed=seed)
        outcome = {"mode": mode, "target": target, **scores(env_id, returns, references)}
        yield {**outcome, "returns": returns.tolist(), "lengths": lengths.tolist()}


def latency(policy: Policy, *, seed: int = 0) -> dict[str, float]:
    """Time of a call of `act` for one environment, over an episode of 1,000 steps of random numbers.

    Args:
        policy: reset before and after.
        seed: of the observations.

    Returns:
        Medians in microseconds: of all steps after the first K (`median`), of the first 100 of them (`early`) and of
        the last 100 (`late`).
    """
    config, random = policy.model.config, np.random.default_rng(seed)
    observations = random.normal(size=(LATE + EARLY, config.observation_size))
    begin = min(config.context, LATE)
    taken = []
    for count in (begin + WARM_UP, len(observations)):  # first to warm up
        policy.reset()
        taken = []
        for observation in observations[:count]:
            started = time.perf_counter()
            policy.act(observation, 1.0)
            taken.append(1e6 * (time.perf_counter() - started))
    policy.reset()
    parts = {"median": taken[begin:], "early": taken[begin : begin + EARLY], "late": taken[LATE:]}
    return {name: round(statistics.median(part), 1) for name, part in parts.items()}


def main(arguments: list[str]) -> int:
    """Let a trained policy act in its environment: returns, scores, and the time that an action takes."""
    parser = argparse.ArgumentParser("minrnn rl evaluate", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--env", help="Gymnasium environment (default: the run's own)")
    parser.add_argument("--episodes", type=int, default=10, help="for each target return (default: 10)")
    parser.add_argument("--targets", type=float, nargs="+", help="returns to ask for (default: the run's own)")
    parser.add_argument(
        "--mode",
        choices=(*get_args(Mode), "both"),
        default="window",
        help="read the last steps again for each action, as published, or carry a state on (default: window)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the episodes' beginnings (default: 0)")
    parser.add_argument("--compile", action="store_true", help="time the compiled model, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all of it there, as JSON")
    given = parser.parse_args(arguments)
    if given.seed < 0:
        parser.error(f"argument --seed: must be at least 0, got {given.seed}")
    if not all(map(math.isfinite, given.targets or ())):
        parser.error(f"argument --targets: must be finite, got {' '.join(map(str, given.targets))}")
    if given.out and given.out.is_dir():
        parser.error(f"argument --out: must be a file, got {str(given.out)!r}, a directory")

    policy = Policy.load(given.run, target=given.targets[0] if given.targets else None)
    env_id = environment(given.env, policy)
    if (given.run / "train.json").is_file() and not (given.run / "result.json").is_file():
        _say(f"not finished: {given.run} has no result.json; its model is the one that it saved last")
    known = policy.facts.references if env_id == policy.facts.env else {}
    outcomes: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    record = {
        "env": env_id,
        "episodes": given.episodes,
        "seed": given.seed,
        "threads": torch.get_num_threads(),
        "outcomes": outcomes,
        "microseconds": times,
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    modes = get_args(Mode) if given.mode == "both" else (given.mode,)
    targets = given.targets or policy.facts.targets
    for outcome in play(policy.model, env_id, modes, targets, known, episodes=given.episodes, seed=given.seed):
        outcomes.append(outcome)
        _say(_told(outcome, env_id, given.episodes))
        _write(record, given.out)
    for compiled in (False, True) if given.compile else (False,):
        for mode in modes:
            times.append(_timed(Policy(policy.model, target=outcomes[0]["target"], mode=mode), compiled))
        _write(record, given.out)  # what is compiled may fail
    return 0


def _timed(policy: Policy, compiled: bool) -> dict[str, Any]:
    """How long an action takes; said, too."""
    try:
        if compiled:
            policy.compile()
        took = latency(policy)  # at whose first call torch compiles
    except RuntimeError as error:
        if not compiled:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--compile: torch must be able to compile the model here, got: {reason}") from error
    how, grows = "compiled" if compiled else "eager", "" if policy.constant_state else ", with a cache that grows"
    _say(
        f"{policy.mode}, {how}: {took['median']:,.0f} µs per action, {took['early']:,.0f} early in an episode, "
        f"{took['late']:,.0f} at its end{grows}"
    )
    return {"mode": policy.mode, "compiled": compiled, "constant": policy.constant_state, **took}


def _write(record: Mapping[str, Any], out: Path | None) -> None:
    if out:
        replace_files({out: (json.dumps(record, indent=2) + "\n").encode()})


def environment(asked: str | None, policy: Policy) -> str:
    """The environment to act in: the one asked for, or the policy's own.

    Raises:
        ValueError: there is neither, or it is the policy's own and Gymnasium would import a module for it: no file is
            to decide which code runs.
    """
    if not (env_id := asked or policy.facts.env):
        raise ValueError("env must be given: the run does not know for which environment it is: --env ID")
    if not asked and ":" in env_id:
        raise ValueError(f"env must be given where a module is imported for it, as the run's own: --env {env_id}")
    return env_id


def _told(outcome: Mapping[str, Any], env_id: str, episodes: int) -> str:
    line = f"{outcome['mode']}, asked for {outcome['target']:,.0f}: {outcome['mean']:,.0f} ± {outcome['std']:,.0f}"
    line += f" in {episodes} episodes of {env_id}"
    if outcome["d4rl"] is not None:
        line += f" · {outcome['d4rl']:.1f} ± {outcome['d4rl_std']:.1f} where D4RL's expert has 100"
    if outcome["measured"] is not None:
        line += f" · {outcome['measured']:.1f} ± {outcome['measured_std']:.1f} where the behaviour policy has 100"
    return line


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
