"""Which extra brings a module that is not installed."""

_OF_RL = ("gymnasium", "mujoco", "minari", "h5py", "stable_baselines3", "sb3_contrib", "imageio")


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """What is missing, and how to get it; None if no extra has it."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "minrnn", "torch"):
        return None
    extra = "rl" if package in _OF_RL else "train"
    return f"needs {error.name}, which is not installed: pip install minrnn[{extra}]"
