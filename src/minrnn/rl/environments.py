"""Environments of Gymnasium with observations and actions that are vectors of real numbers."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def make_env(env_id: str, **options: Any) -> Any:
    """The Gymnasium environment of this name.

    Args:
        env_id: such as `Hopper-v5`.
        **options: what `gymnasium.make` takes, such as `render_mode`.

    Raises:
        ValueError: it does not exist, what it needs is not installed, or its spaces are not vectors.
    """
    import gymnasium

    options = {"disable_env_checker": True, **options}  # its checks at every step cost as much as the simulator
    try:
        with _quiet_mujoco():
            env = gymnasium.make(env_id, **options)
    except (gymnasium.error.Error, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"env must be an environment that is installed, got {env_id!r}: {reason}") from error
    try:
        check_spaces(env, env_id)
    except ValueError:
        env.close()
        raise
    return env


def check_spaces(env: Any, env_id: str, observation_size: int | None = None, action_size: int | None = None) -> None:
    """Raise ValueError unless observations and actions are vectors of real numbers, of these sizes where given.

    Args:
        env: the environment, or anything with `observation_space` and `action_space`.
        env_id: its name, for the message.
        observation_size: numbers in an observation of the data (default: any).
        action_size: numbers in an action of the data (default: any).
    """
    from gymnasium.spaces import Box

    for name, space, size in (
        ("observation", env.observation_space, observation_size),
        ("action", env.action_space, action_size),
    ):
        if not isinstance(space, Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            raise ValueError(f"env: {name} space of {env_id} must be a Box of one dimension of floats, got {space}")
        if size is not None and space.shape[0] != size:
            raise ValueError(f"env: {name} space of {env_id} must have size {size}, as the data, got {space.shape[0]}")


def check_fits(env_id: str, observation_size: int, action_size: int) -> None:
    """Raise ValueError if an environment cannot be what data of these sizes are of.

    Where it cannot be made, nothing is known of it: to learn from data needs no simulator. Nor is a module imported for
    a name that asks for one (`module:Name-v0`).

    Args:
        env_id: its name.
        observation_size: numbers in an observation of the data.
        action_size: numbers in an action of the data.
    """
    if ":" in env_id:
        return
    try:
        env = make_env(env_id)
    except Exception as error:  # of any kind, by what is missing
        if isinstance(error, ValueError) and not error.__cause__:  # it was made, and has other spaces
            raise
        return
    with env:
        check_spaces(env, env_id, observation_size, action_size)


def check_limit(env: Any, env_id: str) -> None:
    """Raise ValueError unless a limit of steps ends every episode.

    Args:
        env: the environment.
        env_id: its name, for the message.
    """
    if env.spec is None or not env.spec.max_episode_steps:
        raise ValueError(f"env: {env_id} must have a limit of steps, got none: its episodes may never end")


@contextmanager
def _quiet_mujoco() -> Iterator[None]:
    """MuJoCo's warnings about Gymnasium's own files go to the log, not to the terminal and MUJOCO_LOG.TXT."""
    try:
        mujoco: Any = importlib.import_module("mujoco")
    except Exception:  # it is not there, or finds nothing to draw with: its own environments will tell
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: logging.getLogger(__name__).debug("%s", message))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
