"""Scans: tensors in, tensors out; knows no modules."""

from minrnn.ops.backends import BACKENDS, describe, last_backend, why_not
from minrnn.ops.gates import ACTIVATIONS
from minrnn.ops.scan import linear_scan, mingru_scan, minlstm_scan

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "describe",
    "last_backend",
    "linear_scan",
    "mingru_scan",
    "minlstm_scan",
    "why_not",
]
