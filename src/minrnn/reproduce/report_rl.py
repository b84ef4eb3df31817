"""What offline reinforcement learning tells: returns and scores of each data set, and the time that an action takes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minrnn.reproduce.cells_rl import BEHAVIOUR
from minrnn.reproduce.estimates import Estimate, pooled
from minrnn.reproduce.experiments import Experiment
from minrnn.reproduce.page import (
    APART,
    ONE_SEED,
    Findings,
    Found,
    Table,
    by_place,
    placeholder,
    seed_count,
    shown,
    stdev,
)
from minrnn.reproduce.published import Key, Number

_MEASURED = (
    "Undiscounted returns, a mean over episodes in the environment, after the last training step, and their standard "
    "deviation over the episodes of one model; D4RL's score has 0 for its random policy and 100 for its expert, the "
    "other one 0 for the random policy and 100 for the policy behind the data (of medium-replay: the last of them, "
    "which is that of medium), acting without the noise by which it explored; a window of 20 steps, read again for "
    "each action, is the published way to act, streaming carries a state on, or, in the Decision Transformer, a cache "
    "that grows"
)
_HEAD = (
    "system",
    "weights",
    "return",
    "over episodes",
    "of the data",
    "D4RL's score",
    "paper",
    "behaviour = 100",
    "streaming",
    "seeds",
)
_TIMES = ("system", "window", "streaming", "window, compiled", "streaming, compiled")
_GROWTH = ("system", "window, late / early", "streaming, late / early")


def summarize(name: str, experiment: Experiment, found: Sequence[Found], published: Mapping[Key, Number]) -> Findings:
    """What the cells of an experiment whose models act show."""
    timed = [each for each in found if each.cell.config["measure"] == "latency"]
    places = by_place(each for each in found if each not in timed)
    columns = dict.fromkeys(column for _, column in places)
    tables = [
        Table(
            column,
            _HEAD,
            [(system, *_row(seeds, published.get((system, column)), _done(places.get((BEHAVIOUR, column), []))))
             for (system, its), seeds in places.items() if its == column],
        )
        for column in columns
    ]  # fmt: skip
    tables += _unmeasured({key: number for key, number in published.items() if key not in places})
    points = [point for each in timed for point in each.record.get("points", ())]
    times = [
        Table(
            "microseconds per action of one environment; with a cache that grows from early to late in an episode, "
            "measured alone, all others in turns",
            _TIMES,
            _times(points),
        ),
        Table(
            "growth within an episode of 1,000 steps, each system measured alone (a window costs the same at every "
            "step: its ratio is away from 1 by noise)",
            _GROWTH,
            _growth(points),
        ),
    ]
    sentences = [*_sentences(places), *_speed(points), *_other_data(found)]
    return Findings(_MEASURED, sentences, tables, times if points else [], [], [])


def _unmeasured(published: Mapping[Key, Number]) -> list[Table]:
    """The paper's numbers of the data sets that this scale does not have."""
    systems, columns = (dict.fromkeys(each) for each in zip(*published, strict=True)) if published else ((), ())
    rows = [(column, *(_paper(published.get((system, column))) for system in systems)) for column in columns]
    return [Table("not measured: the paper's numbers (D4RL's score)", ("data", *systems), rows)] if rows else []


def _paper(number: Number | None) -> str:
    return shown(number.value, number.deviation, 1) if number else ""


def _done(found: Sequence[Found]) -> list[Mapping[str, Any]]:
    return [each.record for each in found if each.state == "done"]


def _outcomes(records: Sequence[Mapping[str, Any]], mode: str, key: str) -> list[float]:
    """Of each seed, if it is known."""
    values = [_outcome(record, mode)[key] for record in records]
    return [value for value in values if value is not None]


def _outcome(record: Mapping[str, Any], mode: str) -> Mapping[str, Any]:
    return next(each for each in record["outcomes"] if each["mode"] == mode)


def _row(found: Sequence[Found], number: Number | None, behind: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    records, paper = _done(found), _paper(number)
    if not records:
        return "", placeholder(found), "", "", "", paper, "", "", ""
    return (
        f"{records[0]['parameters']:,}",
        _mean(_outcomes(records, "window", "mean"), 0),
        f"{_over_episodes(records):,.0f}",
        f"{records[0]['data']['mean']:,.0f}",
        _mean(_outcomes(records, "window", "d4rl"), 1),
        paper,
        _mean(_against(records, behind), 1),
        _mean(_outcomes(records, "stream", "mean"), 0),
        seed_count(len(records), found),
    )


def _over_episodes(records: Sequence[Mapping[str, Any]]) -> float:
    """The standard deviation over the episodes of one model."""
    return pooled(_outcome(record, "window")["returns"] for record in records)


def _against(records: Sequence[Mapping[str, Any]], behind: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each seed: 0 as good as the random policy, 100 as the one behind the data."""
    random = records[0]["references"].get("random")
    if random is None or not behind:
        return []
    (best,) = _outcomes(behind, "window", "mean")
    return [100 * (value - random) / (best - random) for value in _outcomes(records, "window", "mean")]


def _mean(values: Sequence[float], digits: int) -> str:
    return shown(statistics.mean(values), stdev(values), digits) if values else ""


def _times(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: dict[str, dict[tuple[str, bool], str]] = {}
    for point in points:
        ends = [point["time"]["median"]] if point["constant"] else [point["early"], point["late"]]
        rows.setdefault(point["system"], {})[point["mode"], point["compiled"]] = " to ".join(f"{x:,.0f}" for x in ends)
    columns = [(mode, compiled) for compiled in (False, True) for mode in ("window", "stream")]
    return [(system, *(times.get(column, "") for column in columns)) for system, times in rows.items()]


def _growth(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: dict[str, list[str]] = {}
    for point in points:
        if not point["compiled"]:
            rows.setdefault(point["system"], []).append(f"{point['late'] / point['early']:.2f}")
    return [(system, *growth) for system, growth in rows.items()]


def _sentences(places: Mapping[Key, Sequence[Found]]) -> list[str]:
    """Each system against the policies behind the data, which act without their noise as it does."""
    signs: dict[str, list[int]] = {}
    for column in dict.fromkeys(column for _, column in places):
        records = {system: done for (system, its), found in places.items() if its == column and (done := _done(found))}
        estimates = _estimates(records)
        if behind := estimates.pop(BEHAVIOUR, None):
            for system, each in estimates.items():
                sign = (-1 if each.mean < behind.mean else 1) if each.apart(behind, 0) else 0
                signs.setdefault(system, []).append(sign)
    told = [f"{system} {its.count(1)} / {its.count(0)} / {its.count(-1)}" for system, its in signs.items()]
    if not told:
        return []
    of_one = any(len(_done(found)) == 1 for (system, _), found in places.items() if system != BEHAVIOUR)
    return [
        "Data sets on which a system's return is above that of the policy behind them, acting without its noise / "
        f"cannot be told from it / is below it: {', '.join(told)}.",
        APART,
        *([ONE_SEED] if of_one else []),
    ]


def _estimates(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Estimate]:
    """The mean return of each system on one data set."""
    means = {system: _outcomes(its, "window", "mean") for system, its in records.items()}
    deviation, found = pooled(means.values()), {}
    for system, its in records.items():
        episodes = sum(len(_outcome(record, "window")["returns"]) for record in its)
        of_seeds = 0.0 if system == BEHAVIOUR else deviation  # it is one policy, and was not trained here
        found[system] = Estimate.of(means[system], of_seeds, _over_episodes(its) / episodes**0.5)
    return found


def _speed(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The streaming minimal RNNs against the Decision Transformer's window."""
    told = []
    for compiled, how in ((False, "eager"), (True, "both compiled")):
        ratios = [
            f"{point['system']} {point['speedup']['median']:.1f}"
            for point in points
            if point["system"].startswith("Dmin") and point["mode"] == "stream" and point["compiled"] == compiled
        ]
        told += [f"{', '.join(ratios)} ({how})"] if ratios else []
    what = "Time per action of a Decision Transformer that reads its window again, over that of streaming"
    return [f"{what}: {'; '.join(told)}."] if told else []


def _other_data(found: Sequence[Found]) -> list[str]:
    """Cells whose episodes are not those that the same policies gave first."""
    told: dict[str, list[str]] = {}
    for each in found:
        if "MISMATCH" in (digest := each.record.get("data", {}).get("digest", "")):
            told.setdefault(digest, []).append(each.cell.name)
    return [f"Learned from other episodes than the policies gave first: {', '.join(names)} ({digest})."
            for digest, names in told.items()]  # fmt: skip
