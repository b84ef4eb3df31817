"""The scores of D4RL: 0 is a random policy, 100 an expert (Fu et al. 2020; the constants are those of its -v2 data)."""

import re
from typing import TypeVar

import numpy as np

# The returns of D4RL's random and expert policies, in MuJoCo environments of version 2 of Gym.
REFERENCES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
}

Returns = TypeVar("Returns", float, np.ndarray)


def family(env_id: str) -> str | None:
    """Which of halfcheetah, hopper and walker2d a name is of, in any version and namespace; None where it is of none.

    Args:
        env_id: an environment, a data set or its file: `Hopper-v5`, `mine/Hopper-v0`, `hopper-medium-v2`,
            `mujoco/hopper/medium-v0`, `hopper_medium-v2.hdf5`.
    """
    names = (re.split("[-_.]", part)[0] for part in env_id.lower().split("/"))
    return next((name for name in names if name in REFERENCES), None)


def reference(env_id: str) -> tuple[float, float]:
    """The returns that D4RL's score calls 0 and 100.

    Args:
        env_id: of a `family`. They serve for all its versions, although rewards differ a little between them.

    Raises:
        ValueError: another environment.
    """
    if (name := family(env_id)) is None:
        raise ValueError(f"reference: env_id must be one of {', '.join(REFERENCES)}, of any version, got {env_id!r}")
    return REFERENCES[name]


def normalized(env_id: str, returns: Returns) -> Returns:
    """100 · (return − random) / (expert − random).

    Args:
        env_id: as `reference` takes it.
        returns: undiscounted returns of whole episodes, a number or an array.

    Raises:
        ValueError: an environment without reference returns.
    """
    low, high = reference(env_id)
    return 100 * (returns - low) / (high - low)
