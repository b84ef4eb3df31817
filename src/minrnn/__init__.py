"""minGRU and minLSTM: recurrent layers that train in parallel over time and run with one small state.

Here are the layers and what goes with them; `minrnn.ops` has the scans, `minrnn.mixers` every system of the comparison
(`make_mixer`), `minrnn.models` stacks of them, text generation and `parameter_groups` for the optimiser.
"""

from minrnn.convert import convert_mingru
from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell
from minrnn.mixers import detach_state
from minrnn.models import load
from minrnn.ops import linear_scan
from minrnn.replace import replace_rnn
from minrnn.warmup import warmup

__all__ = [
    "MinGRU",
    "MinGRUCell",
    "MinLSTM",
    "MinLSTMCell",
    "convert_mingru",
    "detach_state",
    "linear_scan",
    "load",
    "replace_rnn",
    "warmup",
]
__version__ = "0.1.0"
