"""D4RL's scores against their definition."""

import numpy as np
import pytest

from minrnn.rl import normalized, reference
from minrnn.rl.scores import family


def test_the_reference_returns_are_d4rls():
    assert reference("Hopper-v5") == (-20.272305, 3234.3)
    assert reference("HalfCheetah-v4") == (-280.178953, 12135.0)
    assert reference("walker2d-medium-replay-v2") == (1.629008, 4592.3)
    assert reference("mujoco/hopper/medium-v0") == reference("hopper")


def test_a_family_is_known_by_its_name_in_any_version_and_namespace():
    names = (
        "Hopper-v5",
        "mine/Hopper-v0",
        "hopper-medium-v2",
        "minrnn/Hopper-v5/medium-v0",
        "HOPPER",
        "hopper_medium-v2.hdf5",
    )
    assert {family(name) for name in names} == {"hopper"}
    assert family("mujoco/walker2d/medium-v0") == family("Walker2d-v4") == "walker2d"
    assert {family(name) for name in ("HopperLike-v0", "hopperish/up-v0", "Ant-v5", "")} == {None}


def test_random_is_0_and_expert_is_100():
    for env in ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"):
        low, high = reference(env)
        assert list(normalized(env, np.array([low, high, (low + high) / 2]))) == pytest.approx([0, 100, 50])
        assert normalized(env, low) == 0


@pytest.mark.parametrize("env", ["Ant-v5", "", "hopperish-v2", "CartPole-v1"])
def test_other_environments_have_none(env):
    with pytest.raises(ValueError, match="reference: env_id must be one of halfcheetah, hopper, walker2d"):
        reference(env)
