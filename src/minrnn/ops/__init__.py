"""Scans: tensors in, tensors out; knows no modules."""

from minrnn.ops.backends import BACKENDS, describe, last_backend, why_not
from minrnn.ops.fft import long_conv
from minrnn.ops.gates import ACTIVATIONS
from minrnn.ops.scan import linear_scan, mingru_scan, minlstm_scan
from minrnn.ops.selective import selective_scan
from minrnn.ops.short_conv import short_conv
from minrnn.ops.slstm import SLSTMState, slstm_scan
from minrnn.ops.wkv import WKVState, wkv

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "SLSTMState",
    "WKVState",
    "describe",
    "last_backend",
    "linear_scan",
    "long_conv",
    "mingru_scan",
    "minlstm_scan",
    "selective_scan",
    "short_conv",
    "slstm_scan",
    "why_not",
    "wkv",
]
