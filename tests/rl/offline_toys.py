"""A small environment, logged episodes of it, and small models, for tests."""

import dataclasses

import gymnasium
import numpy as np
import torch

from minrnn.models import BackboneConfig
from minrnn.rl import DecisionConfig, DecisionModel, Episodes, Scales
from minrnn.rl.systems import usual

SIZE, ACTIONS = 4, 2
TOY, ENDLESS = "minrnn-tests/Toy-v0", "minrnn-tests/Endless-v0"


class Toy(gymnasium.Env):
    """The state drifts with the actions and at random; an episode ends at a moment that its seed decides, by itself or
    by a time limit of 30 steps."""

    def __init__(self):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (SIZE,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.1, 1.1, (ACTIONS,), np.float32)  # narrower than the models'

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=SIZE)
        self.left = int(self.np_random.integers(1, 45))
        return self.state.copy(), {}

    def step(self, action):
        self.state = 0.9 * self.state + 0.1 * np.resize(action, SIZE) + 0.1 * self.np_random.normal(size=SIZE)
        self.left -= 1
        return self.state.copy(), float(self.state[0] - (action**2).sum()), self.left == 0, False, {}


if TOY not in gymnasium.registry:
    gymnasium.register(TOY, Toy, max_episode_steps=30)
    gymnasium.register(ENDLESS, Toy)  # for all that anyone can tell


def make_episodes(lengths=(7, 1, 30, 12, 3, 25, 9, 18), seed=0, noise=0.0):
    """Episodes whose actions follow from observations, but for noise."""
    random = np.random.default_rng(seed)
    steps = sum(lengths)
    observations = (random.normal(size=(steps, SIZE)) * [1, 2, 3, 4] + [0, 1, 2, 3]).astype(np.float32)
    actions = np.tanh(observations[:, :ACTIONS] + noise * random.normal(size=(steps, ACTIONS))).astype(np.float32)
    rewards = random.normal(size=steps).astype(np.float32)
    return Episodes(observations, actions, rewards, np.asarray(lengths, np.int64), np.arange(len(lengths)) % 2 == 0)


def save_episodes(episodes, folder):
    """As .npz files."""
    folder.mkdir()
    for e, (first, length) in enumerate(zip(episodes.starts, episodes.lengths, strict=True)):
        rows = slice(first, first + length)
        np.savez(
            folder / f"{e:03}.npz",
            observations=episodes.observations[rows],
            actions=episodes.actions[rows],
            rewards=episodes.rewards[rows],
            terminated=episodes.terminated[e : e + 1],
        )
    return folder


def make_backbone(mixer, width=16, layers=2):
    """A small backbone of a system; options as published, but where they would be large."""
    table = usual(mixer)
    names = {each.name for each in dataclasses.fields(BackboneConfig)}
    backbone = {name: value for name, value in table.items() if name in names}
    backbone |= {"width": width, "layers": layers, "dropout": 0.0}
    if mixer == "s4":
        backbone["mixer_options"] = {"inner_options": {"state": 4}}
    if mixer in ("mingru", "minlstm"):  # so that they remember from the first
        backbone["mixer_options"] = {"forget_bias": 3.0} | ({"normalize": False} if mixer == "minlstm" else {})
    if mixer == "attention":
        backbone["mixer_options"] = {**table["mixer_options"], "dropout": 0.0}
    return BackboneConfig(**backbone)


def make_model(mixer="mingru", size=SIZE, actions=ACTIONS, *, width=16, dtype=torch.float32, **config):
    """A model whose actions depend on all that it reads."""
    torch.manual_seed(0)
    settings = {"context": 6, "max_timestep": 25, "return_scale": 10.0, "layout": usual(mixer)["layout"], **config}
    model = DecisionModel(DecisionConfig(size, actions, make_backbone(mixer, width), **settings))
    random = np.random.default_rng(0)
    scales = (
        random.normal(size=size),
        random.random(size) + 0.5,
        -random.random(actions) - 1,
        random.random(actions) + 1,
    )
    model.set_scales(Scales(*scales))
    torch.nn.init.normal_(model.head.weight, std=0.2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mixer.output.weight"):
                weight *= 5
    return model.to(dtype).eval()
