"""The systems of the comparison in offline RL: what surrounds each mixer, and how it was trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Table = Mapping[str, Any]  # keys as in a run's table: of the task, the backbone and the training


class System(NamedTuple):
    """A row of the comparison.

    Args:
        name: as people call it.
        usual: what it has that the decision shell has not.
    """

    name: str
    usual: Table


# Chen et al. (2021), Ota (2024), Feng et al. (2024): around any mixer.
SHELL: Table = {
    "layout": "interleaved",
    "width": 128,
    "layers": 3,
    "conv": 0,
    "mlp": 4.0,
    "mlp_kind": "gelu",
    "norm": "layer",
    "dropout": 0.1,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "beta2": 0.999,
    "clip": 0.25,
}

# By mixer. (Ota's block has an MLP behind Mamba, too. How wide the minimal RNNs were is not published: as the model.)
SYSTEMS: dict[str, System] = {
    "attention": System(
        "Decision Transformer",
        {"mlp_kind": "relu", "mixer_options": {"heads": 1, "positions": "none", "dropout": 0.1, "bias": True}},
    ),
    "s4": System(
        "Decision S4",
        {
            "layout": "concatenated",
            "width": 96,
            "mlp": 0.0,
            "mixer_options": {"inner_options": {"state": 96}, "dropout": 0.1},
        },
    ),
    "aaren": System("DAaren", {"mlp_kind": "relu", "mixer_options": {"heads": 1, "bias": True}}),
    "mamba": System("Decision Mamba", {}),
    "minlstm": System("DminLSTM", {}),
    "mingru": System("DminGRU", {}),
}

# Training as published, by all of them alike.
PUBLISHED: Table = {
    "context": 20,
    "batch_size": 64,
    "return_scale": 1000.0,
    "steps": 100_000,
    "warmup": 10_000,
    "decay": "constant",
}
# Of what was tuned: (width, learning rate) where Ota departs from (128, 1e-3), by data set of D4RL.
_TUNED = {
    "hopper-medium": (256, 1e-4),
    "hopper-medium-replay": (256, 1e-4),
    "walker2d-medium": (128, 1e-4),
}


def usual(mixer: str) -> dict[str, Any]:
    """What surrounds a mixer in the decision shell, as keys of a run's table; the plain shell where it has no row.

    Args:
        mixer: one of those that `minrnn info --mixers` lists.
    """
    return {**SHELL, **(SYSTEMS[mixer].usual if mixer in SYSTEMS else {}), "mixer": mixer}


def published(mixer: str, dataset: str) -> dict[str, Any]:
    """`usual`, with the width and the training that are published for a data set.

    The Decision Transformer and Aaren have one setting for all (width 128, learning rate 1e-4); the others follow
    Decision Mamba's code, set by set. S4 has the Decision Transformer's learning rate: its authors' is not known here.

    Args:
        mixer: a key of `SYSTEMS`.
        dataset: such as `hopper-medium`, as D4RL names it without its version.
    """
    table = {**usual(mixer), **PUBLISHED}
    if mixer in ("attention", "aaren", "s4"):
        return {**table, "lr": 1e-4}
    width, rate = _TUNED.get(dataset, (128, 1e-3))
    return {**table, "width": width, "lr": rate}
