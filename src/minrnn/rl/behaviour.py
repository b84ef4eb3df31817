"""Behaviour policies that act the same on every machine: a small MLP in NumPy, its files, and the episodes it rolls.

A snapshot is a safetensors file. What a policy does follows from its numbers alone: the MLP runs in float64, and
actions are multiples of 2⁻¹², so that the last bits of a matrix product, which differ between builds of BLAS, do not
reach the simulator. Noise comes from PCG64, seeded by (seed, snapshot, episode), so that episodes can be rolled in any
order. What remains is the simulator's own arithmetic: MuJoCo's release, and the sines of the C library.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minrnn._files import replace_files

GRID = 4096  # actions are multiples of 1 / GRID
LARGEST = 1 << 20  # bytes of a snapshot
_ACTIVATIONS = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}


@dataclass(frozen=True)
class Behaviour:
    """A Gaussian policy: a = W_n φ(… φ(W_1 clip((s − mean) / scale) + b_1) …) + b_n + exp(log_std) · noise.

    Args:
        mean: (O,), of the observations that the policy was trained on.
        scale: (O,), their standard deviation.
        clip: bound on a normalised observation.
        layers: weights (out, in) and biases (out,).
        activation: φ, tanh or relu.
        log_std: (A,), of the actions' noise.
        facts: what is known of it: env, algorithm, steps of training, the return that was measured then, versions.
    """

    mean: np.ndarray
    scale: np.ndarray
    clip: float
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    activation: str
    log_std: np.ndarray
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"Behaviour: activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}")
        if not self.layers:
            raise ValueError("Behaviour: layers must have at least one, got none")
        width = len(self.mean)
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {"scale": (self.scale, (width,))}
        for number, (weight, bias) in enumerate(self.layers):
            shapes[f"weight {number}"] = weight, (len(bias), width)
            shapes[f"bias {number}"] = bias, (width := len(bias),)
        shapes["log_std"] = self.log_std, (width,)
        for name, (array, wanted) in shapes.items():
            if array.shape != wanted:
                raise ValueError(f"Behaviour: {name} must have shape {wanted}, got {array.shape}")
        for name, array in (("mean", self.mean), *((name, array) for name, (array, _) in shapes.items())):
            if not np.isfinite(array).all():
                raise ValueError(f"Behaviour: {name} must be finite, got NaN or infinity")
        double = [(weight.astype(np.float64), bias.astype(np.float64)) for weight, bias in self.layers]
        object.__setattr__(self, "_double", double)
        object.__setattr__(self, "_std", np.exp(self.log_std.astype(np.float64)))

    def mean_action(self, observation: np.ndarray) -> np.ndarray:
        """(A,) float64: the action without noise, not clipped, for an observation (O,)."""
        x = np.clip((observation - self.mean) / self.scale, -self.clip, self.clip)
        activate = _ACTIVATIONS[self.activation]
        *hidden, (weight, bias) = self._double  # pyright: ignore[reportAttributeAccessIssue]
        for inner_weight, inner_bias in hidden:
            x = activate(inner_weight @ x + inner_bias)
        return weight @ x + bias

    def act(self, observation: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """(A,) float64: the action with this noise, standard normal (A,); not clipped."""
        return self.mean_action(observation) + self._std * noise  # pyright: ignore[reportAttributeAccessIssue]

    def save(self, path: Path) -> None:
        """Write the snapshot, whole or not at all; ValueError if it is larger than 1 MiB."""
        import safetensors.numpy

        tensors = {"mean": self.mean, "scale": self.scale, "log_std": self.log_std}
        for number, (weight, bias) in enumerate(self.layers):
            tensors |= {f"layers.{number}.weight": np.ascontiguousarray(weight), f"layers.{number}.bias": bias}
        # One entry: safetensors writes several in no fixed order, and the same policy should be the same file.
        rest = {"clip": self.clip, "activation": self.activation, "facts": dict(self.facts)}
        content = safetensors.numpy.save(tensors, {"behaviour": json.dumps(rest)})
        if len(content) > LARGEST:
            raise ValueError(f"Behaviour: a snapshot must have at most {LARGEST} bytes, got {len(content)}")
        replace_files({path: content})


class MeanAction:
    """A behaviour policy without its noise, as `evaluate` lets policies act.

    Args:
        behaviour: whose mean actions are taken.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.observation_size, self.action_size = len(behaviour.mean), len(behaviour.log_std)

    def reset(self, mask: np.ndarray | None = None) -> None:
        """Nothing: it remembers nothing."""

    def act(self, observation: np.ndarray, *_: np.ndarray | None) -> np.ndarray:
        """(N, A) for observations (N, O), whatever came before."""
        return np.stack([self.behaviour.mean_action(each) for each in observation])


def load_behaviour(path: Path) -> Behaviour:
    """The policy of a snapshot; ValueError, with the file's name, where it is torn or something else."""
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            rest = json.loads((file.metadata() or {})["behaviour"])
        numbers = range(sum(name.startswith("layers.") for name in tensors) // 2)
        layers = tuple((tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in numbers)
        return Behaviour(
            tensors["mean"],
            tensors["scale"],
            float(rest["clip"]),
            layers,
            rest["activation"],
            tensors["log_std"],
            rest["facts"],
        )
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"behaviours: {path} must be a snapshot of a behaviour policy, got: {error}") from error


class Rolled(NamedTuple):
    """An episode of T steps as it happened."""

    observations: np.ndarray  # (T + 1, O) float64
    actions: np.ndarray  # (T, A) float32
    rewards: np.ndarray  # (T,) float64
    terminated: np.ndarray  # () bool
    seed: np.ndarray  # () int64, that the environment was reset with


def roll(env: Any, behaviour: Behaviour | None, seed: int, stream: int, episode: int) -> Rolled:
    """One episode, a function of the policy and of three numbers.

    Args:
        env: a Gymnasium environment that ends its episodes.
        behaviour: who acts; None draws uniformly from the action space.
        seed: of the collection.
        stream: of the policy, so that two of them do not get the same noise.
        episode: its number.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, episode))))
    low, high = env.action_space.low.astype(np.float64), env.action_space.high.astype(np.float64)
    env_seed = int(generator.integers(2**31))
    observation, _ = env.reset(seed=env_seed)
    observations, actions, rewards = [np.array(observation, np.float64)], [], []
    while True:
        if behaviour is None:
            action = generator.uniform(low, high)
        else:
            action = behaviour.act(observation, generator.standard_normal(len(low)))
        action = np.clip(np.rint(action * GRID) / GRID, low, high).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(np.array(observation, np.float64))
        actions.append(action)
        rewards.append(float(reward))
        if terminated or truncated:
            break
    return Rolled(
        np.array(observations),
        np.array(actions),
        np.array(rewards, np.float64),
        np.array(bool(terminated)),
        np.array(env_seed),
    )


class Digest:
    """The SHA-256 of episodes in their order: the same numbers give the same digest, however they are stored."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, episode: Rolled) -> None:
        """Take in the next episode."""
        self._hash.update(np.array(episode.actions.shape, "<i8").tobytes())
        for array, dtype in zip(episode, ("<f8", "<f4", "<f8", "?", "<i8"), strict=True):
            self._hash.update(np.ascontiguousarray(array, dtype).tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()
