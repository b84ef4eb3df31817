"""Language modelling of one text: predict each token from those before it.

The first 90% of the characters train, the last 10% are held out. B batch, T window length.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minrnn._config import check_at_least, check_types
from minrnn.tasks.corpus import read_corpus
from minrnn.tasks.task import Model
from minrnn.tasks.vocabulary import encode, make_tokenizer


@dataclass(frozen=True)
class TextConfig:
    """Which text, in which tokens, and in windows of which size.

    Args:
        data: pydoc, shakespeare, or a UTF-8 file
        tokens: chars, bytes, or a JSON file of the tokenizers library
        length: tokens in a training window
        batch_size: windows in a training step, over all devices
        sha256: checksum that the text must have; a run notes the one that it began with
    """

    data: str = "pydoc"
    tokens: str = "chars"
    length: int = 256
    batch_size: int = 8
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "length", "batch_size")

    @property
    def name(self) -> str:
        """Of the text, for people."""
        return Path(self.data).stem

    @property
    def unit(self) -> str:
        """What one token is, for people."""
        return {"chars": "character", "bytes": "byte"}.get(self.tokens, "token")


class TextTask:
    """The data of a `TextConfig`, with the loss that trains on it and the metric on what is held out.

    Args:
        config: which text, and how it is cut.
        tokenizer: the one of an earlier run; by default made from the config and the text.

    Raises:
        ValueError: the text cannot be had, is not the one that is meant, is too short, or has characters that the given
            tokenizer does not know.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | None = None) -> None:
        text = read_corpus(config.data)
        cut = len(text) * 9 // 10
        self.config = config
        self.sha256 = checksum(text)
        if config.sha256 not in (None, self.sha256):
            raise ValueError(
                f"data: {config.data} must have SHA-256 {config.sha256}, not {self.sha256}: it has changed"
            )
        self.tokenizer = tokenizer or make_tokenizer(config.tokens, text)
        self.train = torch.from_numpy(encode(self.tokenizer, text[:cut]))
        held_out = torch.from_numpy(encode(self.tokenizer, text[cut:]))
        if len(self.train) <= config.length or not len(held_out):
            raise ValueError(
                f"data: 90% of {config.data} must be longer than the training window of {config.length} tokens, "
                f"got {len(self.train)} tokens; choose a longer text or a smaller --length"
            )
        # The last training token is the first context, so that every held-out token is predicted.
        self.held_out = torch.cat([self.train[-1:], held_out])

    @property
    def vocabulary(self) -> int:
        """How many different tokens there are; of a tokenizer that leaves out numbers, one more than the highest."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def batch(self, seed: int, step: int) -> Tensor:
        """Windows drawn at random from the training text: (B, T + 1) int64, a function of (seed, step) alone."""
        starts = np.random.default_rng((seed, step)).integers(
            len(self.train) - self.config.length, size=self.config.batch_size
        )
        return self.train.unfold(0, self.config.length + 1, 1)[torch.from_numpy(starts)].long()

    def loss(self, model: Model, batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of a batch (B, T + 1), each window from zero state."""
        logits, _ = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: Model, *, device: torch.device | str = "cpu") -> dict[str, float]:
        """`score` on all that is held out, in windows from zero state."""
        return {"held_out": score(model, self.held_out, self.config, device=device)}


def checksum(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def score(
    model: Model, tokens: Tensor, config: TextConfig, *, carried: bool = False, device: torch.device | str = "cpu"
) -> float:
    """Nats per token that the model needs for `tokens[1:]`, every one of them.

    Args:
        model: gives (logits, state) for (tokens, state); in eval mode.
        tokens: (N,), N at least 2.
        config: its `length` cuts windows, its `batch_size` says how many windows are worked on at once.
        carried: False: windows of the training length, each from zero state. True: one sequence from the first token
            to the last, its state carried on.
        device: where the model is.

    Raises:
        ValueError: fewer than 2 tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"score: tokens must be at least 2, got {len(tokens)}")
    inputs, targets = tokens[:-1].to(device, torch.int64), tokens[1:].to(device, torch.int64)
    total, state = 0.0, None
    step = config.length * config.batch_size
    for x, y in zip(inputs.split(step), targets.split(step), strict=True):
        whole = 0 if carried else len(x) // config.length * config.length  # the last window of all may be shorter
        for rows, wanted in ((x[:whole].view(-1, config.length), y[:whole]), (x[whole:][None], y[whole:])):
            if len(wanted):
                logits, after = model(rows, state)
                state = after if carried else None
                total += F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum").item()
    return total / len(targets)
