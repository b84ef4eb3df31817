"""The one form of episodes: sums, statistics, pieces, and what it refuses."""

import numpy as np
import pytest
import torch

from conftest import assert_close
from minrnn.rl import Episodes, concatenate
from minrnn.rl import episodes as module
from minrnn.rl.episodes import Joined

LENGTHS = (5, 1, 17, 2)


def make(lengths=LENGTHS, size=3, actions=2, seed=0) -> Episodes:
    draw = np.random.default_rng(seed)
    steps = sum(lengths)
    return Episodes(
        draw.normal(2, 3, (steps, size)).astype(np.float32),
        draw.normal(size=(steps, actions)).astype(np.float32),
        draw.normal(size=steps).astype(np.float32),
        np.array(lengths, np.int64),
        draw.random(len(lengths)) < 0.5,
    )


def test_returns_and_returns_to_go_are_the_sums_of_a_loop():
    episodes = make()
    step = 0
    for length, start, whole in zip(LENGTHS, episodes.starts, episodes.returns, strict=True):
        assert start == step
        rewards = [float(each) for each in episodes.rewards[step : step + length]]
        assert whole == pytest.approx(sum(rewards), rel=1e-12)
        for t in range(length):
            assert episodes.returns_to_go[step + t] == pytest.approx(sum(rewards[t:]), rel=1e-6)
        step += length
    assert episodes.returns.dtype == np.float64
    assert episodes.returns_to_go.dtype == np.float32


def test_returns_to_go_lose_nothing_over_a_long_episode():
    """A million rewards of 0.1: summed in float32 the first would be off by about 1%."""
    length = 1_000_000
    steps = np.zeros((length, 1), np.float32)
    rewards = np.full(length, 0.1, np.float32)
    episodes = Episodes(steps, steps, rewards, np.array([length]), np.array([False]))
    exact = float(np.float32(0.1)) * length
    assert episodes.returns_to_go[0] == np.float32(exact)
    assert episodes.returns[0] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("block", [1, 4, 7, 1 << 16])
def test_statistics_are_those_of_torch_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    episodes = make()
    mean, std = episodes.statistics()
    exact = torch.from_numpy(np.asarray(episodes.observations)).double()
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_array_equal(mean, exact.mean(0).float().numpy())
    assert_close(torch.from_numpy(std), exact.std(0, correction=0), torch.float32)


def test_statistics_of_a_constant_far_from_zero():
    """E[s²] − E[s]² would give noise, or the root of a negative number."""
    steps = np.full((100_000, 1), 1e4, np.float32)
    steps[::2] += np.float32(2**-6)
    episodes = Episodes(steps, steps, steps[:, 0], np.array([100_000]), np.array([False]))
    assert episodes.statistics()[1][0] == pytest.approx(2**-7, rel=1e-6)


def test_joined_gives_every_slice_that_the_whole_gives():
    whole = np.random.default_rng(0).normal(size=(25, 2))
    pieces = [np.concatenate([whole[a:b], whole[:1]]) for a, b in ((0, 5), (5, 6), (6, 23), (23, 25))]  # a row too many
    joined = Joined(pieces, LENGTHS, 2)
    assert joined.shape == (25, 2)
    assert len(joined) == 25
    for first in range(25):
        for stop in range(first, 26):
            got = joined[first:stop]
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, whole[first:stop].astype(np.float32))
    np.testing.assert_array_equal(joined[-3:], whole[-3:].astype(np.float32))
    with pytest.raises(ValueError, match="step 1, got step 2"):
        joined[::2]


def test_concatenated_episodes_follow_each_other():
    first, second = make(), make((4, 9), seed=1)
    both = concatenate([first, second])
    assert list(both.lengths) == [*LENGTHS, 4, 9]
    np.testing.assert_array_equal(both.observations[:25], first.observations)
    np.testing.assert_array_equal(both.actions[25:], second.actions)
    np.testing.assert_array_equal(both.returns, [*first.returns, *second.returns])
    np.testing.assert_array_equal(both.terminated, [*first.terminated, *second.terminated])


def test_concatenating_copies_no_steps(tmp_path):
    """Neither those on disk, nor those in memory: there may be no room for them twice."""
    first = make()
    mapped = np.memmap(tmp_path / "steps", np.float32, "w+", shape=(25, 3))
    mapped[:] = first.observations[:]
    on_disk = Episodes(mapped, first.actions, first.rewards, first.lengths, first.terminated)
    both = concatenate([on_disk, make((4, 9), seed=1)])
    assert isinstance(both.observations, Joined)
    assert isinstance(both.actions, Joined)
    np.testing.assert_array_equal(both.observations[20:30][:5], first.observations[20:25])
    np.testing.assert_array_equal(on_disk.statistics()[0], first.statistics()[0])


def test_what_does_not_fit_together_cannot_be_concatenated():
    with pytest.raises(ValueError, match=r"concatenate: parts must have one action size, got \[1, 2\]"):
        concatenate([make(), make(actions=1)])
    with pytest.raises(ValueError, match="at least one, got none"):
        concatenate([])


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        ("observations", np.zeros((25, 3)), TypeError, "observations must be float32, got float64"),
        ("observations", np.zeros(25, np.float32), ValueError, r"observations must be \(S, O\), .* got shape \(25,\)"),
        ("actions", np.zeros((24, 2), np.float32), ValueError, "actions must have 25 rows, .* got 24"),
        ("rewards", np.zeros((25, 1), np.float32), ValueError, r"rewards must be \(S,\), .* got shape \(25, 1\)"),
        ("lengths", np.array([5, 0, 18, 2]), ValueError, "lengths must be at least 1, got 0 for episode 1"),
        ("lengths", np.array([], np.int64), ValueError, "lengths must have at least one episode, got none"),
        ("lengths", np.array([25], np.int32), TypeError, "lengths must be int64, got int32"),
        ("terminated", np.zeros(3, bool), ValueError, "terminated must have 4 flags, .* got 3"),
    ],
)
def test_bad_fields_are_named(field, value, error, words):
    good = vars(make())
    with pytest.raises(error, match=words):
        Episodes(**{name: value if name == field else good[name] for name in LAYOUT})


LAYOUT = ("observations", "actions", "rewards", "lengths", "terminated")


@pytest.mark.parametrize("block", [4, 1 << 16])
@pytest.mark.parametrize(("field", "value"), [("observations", np.nan), ("actions", np.inf), ("rewards", -np.inf)])
def test_numbers_that_are_not_finite_are_found_with_episode_and_step(field, value, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    good = vars(make())
    bad = good[field].copy()
    bad[(9, 1) if bad.ndim == 2 else 9] = value
    with pytest.raises(ValueError, match=rf"{field} must be finite, got {value} at step 3 of episode 2"):
        Episodes(**{**{name: good[name] for name in LAYOUT}, field: bad})
