"""Tasks whose questions are made, not read: a model reads tokens and answers at some of the positions.

B batch, T length. A batch is a function of (seed, step): the same on any machine, whoever makes it.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minrnn.tasks.task import Model

IGNORED = -100  # the target where no answer is wanted; torch's cross-entropy passes it by
HELD_OUT = 1  # the last number of an evaluation batch's seed; training batches have only two


class Questions(NamedTuple):
    """A batch.

    Args:
        tokens: int64 (B, T), what is read.
        targets: int64 (B, T), the answer wanted after each token, or `IGNORED`.
    """

    tokens: Tensor
    targets: Tensor


class AnswerTask(ABC):
    """Made questions, with the loss that trains on them and the accuracy of the answers.

    Args:
        vocabulary: how many different tokens and answers there are; both are counted from 0.
        batch_size: questions in a batch.
        examination: batches in the evaluation set.
    """

    def __init__(self, vocabulary: int, batch_size: int, examination: int) -> None:
        for name, got in (("batch_size", batch_size), ("examination", examination)):
            if got < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {got}")
        self.vocabulary, self.batch_size, self.examination = vocabulary, batch_size, examination

    @abstractmethod
    def make(self, rng: np.random.Generator, *, held_out: bool) -> Questions:
        """A batch of questions, to train on or to be examined by."""

    def batch(self, seed: int, step: int) -> Questions:
        """The training batch of a step; seeds are below 2**32."""
        return self.make(np.random.default_rng((seed, step)), held_out=False)

    def held_out(self, index: int) -> Questions:
        """The evaluation batch `index`, always the same; no training batch shares its random numbers."""
        return self.make(np.random.default_rng((0, index, HELD_OUT)), held_out=True)

    def constant_accuracy(self) -> float:
        """The accuracy, as `evaluate` has it, of always giving the one answer that is right most often."""
        shares = torch.zeros(self.vocabulary, dtype=torch.float64)
        for index in range(self.examination):
            targets = self.held_out(index).targets
            answers = targets[targets != IGNORED]
            shares += torch.bincount(answers, minlength=self.vocabulary).double() / len(answers)
        return shares.max().item() / self.examination

    def loss(self, model: Model, batch: Questions) -> Tensor:
        """Mean cross-entropy of the answers in nats."""
        logits, _ = model(batch.tokens)
        wanted = batch.targets != IGNORED
        return F.cross_entropy(logits[wanted], batch.targets[wanted])

    @torch.no_grad()
    def evaluate(self, model: Model, *, device: torch.device | str = "cpu") -> dict[str, float]:
        """The mean cross-entropy of all answers in nats, and the share of right ones, a mean over the batches.

        Batches count alike, as in the paper's code: those of longer words have more answers in some languages.

        Args:
            model: gives (logits, state) for tokens; in eval mode.
            device: where the model is.
        """
        right, nats, answers = 0.0, 0.0, 0
        for index in range(self.examination):
            tokens, targets = (each.to(device) for each in self.held_out(index))
            wanted = targets != IGNORED
            logits, answer = model(tokens)[0][wanted], targets[wanted]
            right += (logits.argmax(-1) == answer).cpu().double().mean().item()
            nats += F.cross_entropy(logits.float(), answer, reduction="sum").item()
            answers += len(answer)
        return {"held_out": nats / answers, "accuracy": right / self.examination}


def questions(tokens: np.ndarray, answers: np.ndarray) -> Questions:
    """A batch whose last K positions want `answers` (B, K)."""
    targets = np.full_like(tokens, IGNORED)
    targets[:, tokens.shape[1] - answers.shape[1] :] = answers
    return Questions(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
