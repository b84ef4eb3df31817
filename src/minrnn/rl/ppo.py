"""Behaviour policies trained with stable-baselines3's PPO, with a snapshot of each leg of the way.

PPO and not SAC, because it gets to a third of D4RL's expert return sooner in all three environments: see
docs/design.md. A leg begins with fresh environments and a seed of its own, so that training that was killed and goes on
from its last leg ends with the same numbers as training that was not.
"""

import hashlib
import importlib.metadata
import io
import json
import platform
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minrnn._files import replace_files
from minrnn.rl.behaviour import Behaviour, load_behaviour, roll
from minrnn.rl.environments import make_env
from minrnn.rl.scores import reference

ENVS, ROLLOUT = 8, 256  # 2,048 steps between two updates
LEG = 8 * ENVS * ROLLOUT  # steps between two snapshots: 16,384, some five seconds
EPISODES = 10  # that measure a snapshot
KEPT = 8  # snapshots
LONGEST = 3_000_000  # steps after which training gives up
INDEX, CHECKPOINT = "behaviours.json", "training.pt"


@dataclass(frozen=True)
class Settings:
    """PPO's, of which an environment may want its own. The rest is stable-baselines3's.

    Args:
        hidden: width of the two hidden layers
        activation: tanh or relu
        learning_rate: constant
        gamma: discount
        gae_lambda: of the advantages
        clip_range: of the ratio of probabilities
        log_std: of the actions at the beginning
        ent_coef: weight of the entropy
        max_grad_norm: where the gradient is clipped
    """

    hidden: int = 64
    activation: str = "tanh"
    learning_rate: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    log_std: float = 0.0
    ent_coef: float = 0.0
    max_grad_norm: float = 0.5


SETTINGS = {
    "hopper": Settings(),
    "walker2d": Settings(),
    "halfcheetah": Settings(
        hidden=128, activation="relu", learning_rate=1e-4, gamma=0.98, gae_lambda=0.92, clip_range=0.1, log_std=-1.0
    ),
}


class Leg(NamedTuple):
    """What one leg came to."""

    steps: int  # of training, all legs together
    mean_return: float  # of the policy as it acts in training, with noise


def versions() -> dict[str, str]:
    """What data and policies depend on: releases of the libraries, and the kind of machine (MuJoCo takes sines from the
    C library)."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}
    found["libc"] = " ".join(platform.libc_ver()).strip() or "unknown"
    for name in ("minrnn", "numpy", "torch", "gymnasium", "mujoco", "stable-baselines3"):
        found[name] = importlib.metadata.version(name)
    return found


def wanted_return(env_id: str) -> float:
    """A third of D4RL's expert return, which its medium policies have about."""
    return reference(env_id)[1] / 3


def snapshots(folder: Path) -> list[tuple[Path, Behaviour]]:
    """The policies of an environment, in the order of their training; none if `folder` has no finished training.

    Args:
        folder: such as `behaviours/Hopper-v5`.

    Raises:
        ValueError: a file is missing, torn, or not the one that the folder's index names.
    """
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        entries = [(str(entry["file"]), str(entry["sha256"])) for entry in json.loads(index.read_bytes())["snapshots"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"behaviours: {index} must list snapshots, got: {error!r}") from error
    found = []
    for name, wanted in entries:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"behaviours: {path} must be there, because {INDEX} names it: no such file")
        if (got := sha256(path)) != wanted:
            raise ValueError(f"behaviours: {path} must have SHA-256 {wanted}, as {INDEX} says, got {got}")
        found.append((path, load_behaviour(path)))
    return found


def sha256(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train(
    env_id: str, folder: Path, *, target: float, settings: Settings, seed: int, told: Callable[[Leg], None]
) -> None:
    """Train until the measured return reaches `target`, and leave up to eight snapshots, spread over the way.

    Args:
        env_id: of the environment.
        folder: where they go. Training that was interrupted there goes on.
        target: mean return of the policy as it acts in training, with noise.
        settings: of PPO.
        seed: of everything random.
        told: called after each leg.

    Raises:
        ValueError: the target is not reached, or the folder has training of another kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _one_thread(), make_env(env_id) as env:
        trainer = _Trainer(env_id, env, settings, seed)
        if (folder / CHECKPOINT).is_file():
            trainer.restore(folder / CHECKPOINT)
        while not trainer.legs or trainer.legs[-1].mean_return < target:
            if trainer.legs and trainer.legs[-1].steps >= LONGEST:
                best = max(leg.mean_return for leg in trainer.legs)
                raise ValueError(
                    f"collect: PPO must reach a return of {target:.0f} in {env_id} within {LONGEST} steps, "
                    f"got {best:.0f} at best; try another --seed"
                )
            if trainer.legs:
                trainer.learn()
            trainer.measure(folder)
            told(trainer.legs[-1])
    _keep(env_id, folder, trainer)


def _keep(env_id: str, folder: Path, trainer: "_Trainer") -> None:
    """Write the index of the snapshots that stay, and remove the others."""
    last = len(trainer.legs) - 1
    kept = sorted({round(last * each / (KEPT - 1)) for each in range(KEPT)})
    paths = [_snapshot(folder, leg.steps) for leg in trainer.legs]
    entries = [
        {"file": paths[each].name, "sha256": sha256(paths[each]), **trainer.legs[each]._asdict()} for each in kept
    ]
    index = {"env": env_id, "algorithm": "PPO", "seed": trainer.seed, "settings": asdict(trainer.settings)}
    index |= {"versions": versions(), "snapshots": entries}
    replace_files({folder / INDEX: (json.dumps(index, indent=2) + "\n").encode()})
    for number, path in enumerate(paths):
        if number not in kept:
            path.unlink(missing_ok=True)
    (folder / CHECKPOINT).unlink()


def _snapshot(folder: Path, steps: int) -> Path:
    return folder / f"{steps:08}.safetensors"


@contextmanager
def _one_thread() -> Any:
    """These networks are too small to share; and torch's random state stays what it was."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    numpy_state = np.random.get_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)


class _Trainer:
    """PPO and its environments, between two legs."""

    def __init__(self, env_id: str, env: Any, settings: Settings, seed: int) -> None:
        from stable_baselines3 import PPO
        from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

        self.env_id, self.env, self.settings, self.seed = env_id, env, settings, seed
        self.legs: list[Leg] = []
        self.envs = VecNormalize(DummyVecEnv([lambda: make_env(env_id)] * ENVS), gamma=settings.gamma)
        activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[settings.activation]
        self.model = PPO(
            "MlpPolicy",
            self.envs,
            n_steps=ROLLOUT,
            seed=seed,
            device="cpu",
            gamma=settings.gamma,
            learning_rate=settings.learning_rate,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip_range,
            ent_coef=settings.ent_coef,
            max_grad_norm=settings.max_grad_norm,
            policy_kwargs={
                "net_arch": [settings.hidden] * 2,
                "activation_fn": activation,
                "log_std_init": settings.log_std,
            },
        )

    def learn(self) -> None:
        """One leg, from fresh environments and a seed that follows from its number."""
        from stable_baselines3.common.utils import set_random_seed

        seed = int(np.random.SeedSequence((self.seed, len(self.legs))).generate_state(1)[0])
        set_random_seed(seed)
        self.envs.seed(seed)
        self.model._last_obs = None  # makes PPO reset them
        self.model.learn(LEG, reset_num_timesteps=False)

    def measure(self, folder: Path) -> None:
        """Save a snapshot with its return, then what it takes to go on from here."""
        steps = self.model.num_timesteps
        known = {"env": self.env_id, "algorithm": "PPO", "steps": steps, "versions": versions()}
        policy = behaviour_of(self.model, self.envs, self.settings.activation, known)
        returns = [
            float(roll(self.env, policy, self.seed, steps, each).rewards.sum()) for each in range(EPISODES)
        ]  # fmt: skip
        self.legs.append(Leg(steps, float(np.mean(returns))))
        known |= {"return": self.legs[-1].mean_return, "episodes": EPISODES}
        behaviour_of(self.model, self.envs, self.settings.activation, known).save(_snapshot(folder, steps))
        content = io.BytesIO()
        torch.save(self._state(), content)
        replace_files({folder / CHECKPOINT: content.getvalue()})

    def _state(self) -> dict[str, Any]:
        return {
            "settings": {"env": self.env_id, "seed": self.seed, **asdict(self.settings)},
            "policy": self.model.policy.state_dict(),
            "optimizer": self.model.policy.optimizer.state_dict(),
            "statistics": {
                name: [torch.as_tensor(getattr(each, part), dtype=torch.float64) for part in ("mean", "var", "count")]
                for name, each in (("obs", self.envs.obs_rms), ("ret", self.envs.ret_rms))
            },
            "legs": [tuple(leg) for leg in self.legs],
            "updates": self.model._n_updates,
        }

    def restore(self, path: Path) -> None:
        """Go on from what `measure` saved."""
        try:
            state = torch.load(path, weights_only=True)
            got, wanted = state["settings"], self._state()["settings"]
        except Exception as error:  # torn files and refused code come in many classes
            raise ValueError(f"behaviours: {path} must be a checkpoint of training, got: {error}") from error
        if got != wanted:
            differ = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            raise ValueError(
                f"behaviours: {path} must be of training with the same {', '.join(differ)}, got "
                f"{', '.join(f'{name} {got.get(name)}' for name in differ)}; remove it to begin anew"
            )
        self.model.policy.load_state_dict(state["policy"])
        self.model.policy.optimizer.load_state_dict(state["optimizer"])
        statistics: Any
        for name, statistics in (("obs", self.envs.obs_rms), ("ret", self.envs.ret_rms)):
            statistics.mean, statistics.var, count = (part.numpy() for part in state["statistics"][name])
            statistics.count = float(count)
        self.legs = [Leg(*leg) for leg in state["legs"]]
        self.model._n_updates, self.model.num_timesteps = state["updates"], self.legs[-1].steps


def behaviour_of(model: Any, envs: Any, activation: str, facts: dict[str, Any]) -> Behaviour:
    """The policy of a PPO model behind a VecNormalize, by itself.

    Args:
        model: with an `MlpPolicy` of that activation, without a shared extractor.
        envs: the VecNormalize; it divides by sqrt(var + epsilon).
        activation: of the hidden layers, tanh or relu.
        facts: what is to be known of it.
    """
    linear = [each for each in model.policy.mlp_extractor.policy_net if isinstance(each, torch.nn.Linear)]
    layers = [(each.weight, each.bias) for each in (*linear, model.policy.action_net)]
    return Behaviour(
        envs.obs_rms.mean.copy(),
        np.sqrt(envs.obs_rms.var + envs.epsilon),
        float(envs.clip_obs),
        tuple((weight.detach().numpy().copy(), bias.detach().numpy().copy()) for weight, bias in layers),
        activation,
        model.policy.log_std.detach().numpy().copy(),
        facts,
    )
