"""minGRU and minLSTM: recurrent layers that train in parallel over time and run with one small state.

Here are the layers and what goes with them; `minrnn.ops` has the scans, `minrnn.mixers` every system of the comparison
(`make_mixer`), `minrnn.models` stacks of them, text generation and `parameter_groups` for the optimiser.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minrnn.convert import convert_mingru
from minrnn.layers import MinGRU, MinGRUCell, MinLSTM, MinLSTMCell
from minrnn.ops import linear_scan
from minrnn.replace import replace_rnn

if TYPE_CHECKING:
    from minrnn import mixers as mixers
    from minrnn import models as models
    from minrnn._warmup import warmup
    from minrnn.mixers import detach_state
    from minrnn.models import load

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
_LATER = {"detach_state": "minrnn.mixers", "load": "minrnn.models", "warmup": "minrnn._warmup"}


def __getattr__(name: str) -> Any:
    """Mixers, models and what needs them, when they are first asked for: importing them takes as long as the rest."""
    if name in ("mixers", "models"):
        return import_module(f"minrnn.{name}")
    if name in _LATER:
        globals()[name] = value = getattr(import_module(_LATER[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
