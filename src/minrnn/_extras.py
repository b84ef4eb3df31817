"""Which extra brings a module that is not installed."""

_MODULES = {
    "train": (
        "lightning", "jsonargparse", "yaml", "rich", "tokenizers", "pooch", "numpy", "safetensors", "matplotlib",
        "jinja2",
    ),
    "rl": ("gymnasium", "mujoco", "minari", "h5py", "stable_baselines3", "sb3_contrib", "imageio"),
    "peers": ("minGRU_pytorch", "accelerated_scan", "mambapy", "transformers", "xlstm"),
}  # fmt: skip


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """What is missing, and how to get it; None if no extra has it."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in _MODULES.items() if package in modules), None)
    return extra and f"needs {error.name}, which is not installed: pip install minrnn[{extra}]"
