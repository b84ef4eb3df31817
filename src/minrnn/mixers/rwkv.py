"""RWKV-4.

B batch, T time, D model width.
"""

import torch
from torch import Tensor, nn

from minrnn.mixers.contract import Mixer, Place, Tuning, check_series, check_state


class ChannelMix(Mixer):
    """placeholder"""

    def __init__(self, width: int, hidden: int, place: Place) -> None:
        raise NotImplementedError
