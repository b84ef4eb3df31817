"""A film of a policy at work: `minrnn rl watch`."""

import argparse
import importlib
import os
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any, get_args

import numpy as np

from minrnn.rl.environments import check_spaces, make_env
from minrnn.rl.evaluate import environment
from minrnn.rl.policy import Mode, Policy

FASTEST = 50  # frames per second that a GIF can show
LIBRARIES = {"egl": ("EGL", "libegl1"), "osmesa": ("OSMesa", "libosmesa6")}  # and their packages in Debian


def watch(policy: Policy, env_id: str, out: Path, *, steps: int = 1000, seed: int = 0) -> float:
    """Film an episode.

    Args:
        policy: reset before.
        env_id: a Gymnasium environment with the policy's sizes.
        out: an .mp4 or .gif file, replaced if it is there.
        steps: where to stop if the episode does not end before.
        seed: of its beginning.

    Returns:
        The return up to there.

    Raises:
        ValueError: another kind of file, no such environment, or nothing can be drawn on this machine.
    """
    import imageio.v2 as imageio

    if out.suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"watch: out must be an .mp4 or .gif file, got {out}")
    if steps < 1:
        raise ValueError(f"watch: steps must be at least 1, got {steps}")
    if seed < 0:
        raise ValueError(f"watch: seed must be at least 0, got {seed}")
    part = out.with_name(f".part-{out.name}")
    _choose_backend()
    try:
        env = make_env(env_id, render_mode="rgb_array")
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as error:  # MuJoCo loads what it draws with when it is imported
        raise _cannot_draw(error) from error
    try:
        check_spaces(env, env_id, policy.model.config.observation_size, policy.model.config.action_size)
        observation, _ = env.reset(seed=seed)
        policy.reset()
        follow(env)
        frame = _first_frame(env)
        rate = int(env.metadata.get("render_fps", 30))
        every = -(-rate // FASTEST)
        out.parent.mkdir(parents=True, exist_ok=True)
        reward, action, total = None, None, 0.0
        options: dict[str, Any] = {"fps": rate / every, "macro_block_size": 2}
        if out.suffix.lower() == ".gif":
            options = {"duration": 1000 * every / rate, "loop": 0}
        with imageio.get_writer(part, **options) as film:
            for step in range(steps):
                if step % every == 0:
                    film.append_data(frame if step == 0 else env.render())  # pyright: ignore[reportAttributeAccessIssue]
                action = policy.act(observation, reward, action)
                action = np.clip(action, env.action_space.low, env.action_space.high)
                observation, reward, terminated, truncated, _ = env.step(action)
                total += float(reward)
                if terminated or truncated:
                    break
        os.replace(part, out)
        return total
    finally:
        part.unlink(missing_ok=True)
        env.close()


def _choose_backend() -> None:
    """How MuJoCo draws: as MUJOCO_GL says, or on Linux without a display by a library that is there, if one is."""
    if not os.environ.get("MUJOCO_GL") and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        for name, (library, _) in LIBRARIES.items():
            if find_library(library):
                os.environ["MUJOCO_GL"] = name
                return


def follow(env: Any) -> None:
    """Draw with MuJoCo's camera `track`, if there is one: Gymnasium's stands still, and what runs is soon out of sight.

    Args:
        env: any environment, made to be drawn.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        mujoco: Any = importlib.import_module("mujoco")
        camera = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if camera >= 0:
            renderer.camera_id = camera


def _first_frame(env: Any) -> np.ndarray:
    from gymnasium.error import DependencyNotInstalled

    try:
        return env.render()
    except DependencyNotInstalled as error:
        raise ValueError(f"watch: nothing can be drawn here: {error}") from error
    except Exception as error:
        raise _cannot_draw(error) from error


def _cannot_draw(error: Exception) -> ValueError:
    """Errors are of many kinds, by the libraries and drivers that are missing."""
    backend = os.environ.get("MUJOCO_GL") or "glfw"
    package = LIBRARIES[backend][1] if backend in LIBRARIES else "libegl1, with MUJOCO_GL=egl"
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return ValueError(
        f"watch: nothing can be drawn here with MUJOCO_GL={backend} ({reason}); on Debian, apt install {package}"
    )


def main(arguments: list[str]) -> int:
    """Film an episode of a trained policy."""
    parser = argparse.ArgumentParser("minrnn rl watch", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".mp4 or .gif file (default: RUN/episode.mp4)")
    parser.add_argument("--env", help="Gymnasium environment (default: the run's own)")
    parser.add_argument("--target", type=float, help="return to ask for (default: the run's first)")
    parser.add_argument("--mode", choices=get_args(Mode), default="window", help="how to act (default: window)")
    parser.add_argument("--steps", type=int, default=1000, help="at most (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the beginning (default: 0)")
    given = parser.parse_args(arguments)
    mode: Mode = given.mode
    policy = Policy.load(given.run, target=given.target, mode=mode)
    out = given.out or given.run / "episode.mp4"
    total = watch(policy, environment(given.env, policy), out, steps=given.steps, seed=given.seed)
    sys.stdout.write(f"a return of {total:,.0f}, in {out}\n")
    return 0
