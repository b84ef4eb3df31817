"""minGRU and minLSTM: recurrent layers that train in parallel over time and run with one small state."""

from minrnn.ops import linear_scan

__all__ = ["linear_scan"]
__version__ = "0.1.0"
