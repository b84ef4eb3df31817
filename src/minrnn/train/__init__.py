"""Training: `minrnn.train.run.train` takes a run from its configuration to its learning curve, on Lightning.

The configuration alone is light to import; Lightning comes with `minrnn.train.run`.
"""

from minrnn.train.config import RunConfig, TrainConfig

__all__ = ["RunConfig", "TrainConfig"]
