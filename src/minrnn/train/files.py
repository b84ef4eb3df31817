"""What a run directory holds, written so that neither a crash, a full disk nor an untrusted file does harm.

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

from minrnn._files import replace_files

CHECKPOINT = "checkpoint.pt"
# Of a checkpoint. What is missing or empty Lightning would pass by in silence, to begin anew there.
_PARTS = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "pytorch-lightning_version": str,
}


class CheckpointFile(TorchCheckpointIO):
    """Lightning's checkpoints, replaced as one step and read without running any code that they may hold."""

    has_read = False  # what fails before is not the checkpoint's fault

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        replace_files({Path(path): buffer.getvalue()})

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        try:
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (OSError, MemoryError):  # of the machine, not of the file
            raise
        except Exception as error:  # torn zip files, torn pickles and refused code come in many classes
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise ValueError(f"checkpoint: {path} is torn, or not a checkpoint of minrnn: {reason}") from None
        parts = checkpoint if isinstance(checkpoint, dict) else {}
        for name, kind in _PARTS.items():
            if not (isinstance(parts.get(name), kind) and parts[name]):
                raise ValueError(f"checkpoint: {path} is torn, or not a checkpoint of minrnn: its {name} is missing")
        if not parts["callbacks"].get("Journal"):
            raise ValueError(f"checkpoint: {path} is torn, or not a checkpoint of minrnn: its Journal is missing")
        if not all(isinstance(each, torch.Tensor) for each in parts["state_dict"].values()):
            raise ValueError(f"checkpoint: {path} is torn, or not a checkpoint of minrnn: its weights are no tensors")
        self.has_read = True
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
