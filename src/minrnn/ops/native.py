"""Loads and calls the C library (ops/native/)."""


def unavailable() -> str | None:
    """Why the C library cannot be used, or None."""
    return "no C library was built when minrnn was installed"


def describe() -> str:
    """The instruction set in use."""
    return ""
