"""`minrnn bench`: time and peak memory of the layers against the library's, public ones, and the limits of the machine.

Needs no extra; matplotlib, where it is installed, adds the figure.
"""

from minrnn.bench.cli import main

__all__ = ["main"]
