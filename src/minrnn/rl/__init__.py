"""Offline reinforcement learning: logged episodes, decision models, policies that act.

Nothing here imports Gymnasium, Minari, h5py or stable-baselines3 until it is used: they are `pip install minrnn[rl]`.
"""

from minrnn.rl.decision import DecisionConfig, DecisionModel, Scales, Trajectory
from minrnn.rl.episodes import Episodes, concatenate
from minrnn.rl.policy import Policy, PolicyFacts
from minrnn.rl.scores import normalized, reference
from minrnn.rl.sources import load_episodes
from minrnn.rl.systems import SYSTEMS
from minrnn.rl.task import OfflineConfig, OfflineTask

__all__ = [
    "SYSTEMS",
    "DecisionConfig",
    "DecisionModel",
    "Episodes",
    "OfflineConfig",
    "OfflineTask",
    "Policy",
    "PolicyFacts",
    "Scales",
    "Trajectory",
    "concatenate",
    "load_episodes",
    "normalized",
    "reference",
]
