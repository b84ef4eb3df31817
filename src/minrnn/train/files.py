"""What a run directory holds, written so that a crash, a full disk or an impostor costs nothing.

train.json         the whole configuration, with the data's checksum     config.json        the model's
tokenizer.json     of a text: to tokens and back                         model.safetensors  its weights
policy.json        of a policy: environment, returns to ask for          checkpoint.pt      what --resume needs
metrics.jsonl      one line per measurement                              curve.png          the learning curve
result.json        the end: held-out losses, time, size
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from minrnn.models import replace_files

CHECKPOINT = "checkpoint.pt"
_KEYS = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "pytorch-lightning_version"}


class CheckpointFile(TorchCheckpointIO):
    """Lightning's checkpoints, replaced as one step and read without running any code that they may hold."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        replace_files({Path(path): buffer.getvalue()})

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        try:
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # torn zip files, torn pickles and refused code come in many classes
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise ValueError(f"checkpoint: {path} is torn, or not a checkpoint of minrnn: {reason}") from None
        if not (isinstance(checkpoint, dict) and checkpoint.keys() >= _KEYS):
            raise ValueError(f"checkpoint: {path} is torn, or not a checkpoint of minrnn: it has no {sorted(_KEYS)}")
        weights = checkpoint["state_dict"]
        if not (isinstance(weights, dict) and all(isinstance(each, torch.Tensor) for each in weights.values())):
            raise ValueError(f"checkpoint: {path} is torn, or not a checkpoint of minrnn: its weights are no tensors")
        return checkpoint


class Metrics:
    """Measurements of a run as JSON lines, each with the step after which it was made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, **values: float) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def read(self) -> list[dict[str, float]]:
        """All whole lines; the last one may have been cut off by a crash."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Forget what was measured after `step`: a resumed run measures it again."""
        kept = [json.dumps(line) + "\n" for line in self.read() if line["step"] <= step]
        replace_files({self.path: "".join(kept).encode()})
