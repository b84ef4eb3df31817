"""ListOps: nested operations on lists of digits, written as one long sequence; the value is a digit.

B batch, T length.
"""

import statistics

import numpy as np
import torch

from minrnn.tasks.answers import IGNORED, AnswerTask, Questions

OPERATIONS = ("MIN", "MAX", "MED", "SM")
# 0 ... 9 are digits.
OPEN, CLOSE, PAD = 10, 10 + len(OPERATIONS), 11 + len(OPERATIONS)  # OPEN + i opens operation i
NESTED = 0.25  # the probability that an argument is a list, where the levels allow it
TRIES = 10_000  # at a question of an allowed length


def value(operation: int, arguments: list[int]) -> int:
    """Smallest, largest, median (the lower integer) or sum modulo 10 of the arguments."""
    if operation < 2:
        return (min, max)[operation](arguments)
    return int(statistics.median(arguments)) if operation == 2 else sum(arguments) % 10


class ListOps(AnswerTask):
    """Lists such as [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]: the value is wanted after the last bracket.

    Lengths lie between `shortest` and `length`; shorter questions are followed by padding that wants no answer.
    There are ten answers, not equally likely.

    Args:
        length: most tokens of a question.
        shortest: fewest.
        batch_size: B.
        depth: levels at most, of which the digits of the innermost lists are one; 2 at least.
        arguments: how many arguments a list has at most; 2 at least.
        examination: batches in the evaluation set.

    Raises:
        ValueError: an argument is out of its range.

    Source: Nangia and Bowman, "ListOps" (2018); Tay et al., "Long Range Arena" (2021), section 2.2.1, whose questions
    have 500 to 2,000 tokens, 10 levels and 10 arguments.
    """

    def __init__(
        self,
        length: int = 2000,
        shortest: int = 500,
        batch_size: int = 32,
        depth: int = 10,
        arguments: int = 10,
        examination: int = 20,
    ) -> None:
        super().__init__(PAD + 1, batch_size, examination)
        for name, least, got in (("depth", 2, depth), ("arguments", 2, arguments), ("shortest", 4, shortest)):
            if got < least:
                raise ValueError(f"ListOps: {name} must be at least {least}, got {got}")
        if length < shortest + arguments:
            raise ValueError(f"ListOps: length must be at least shortest + arguments, got {length}")
        self.length, self.shortest, self.depth, self.arguments = length, shortest, depth, arguments
        self._question(np.random.default_rng(0))  # or there are none

    def make(self, rng: np.random.Generator, *, held_out: bool) -> Questions:
        """Questions of random lengths, padded on the right to the longest of the batch."""
        made = [self._question(rng) for _ in range(self.batch_size)]
        longest = max(len(tokens) for tokens, _ in made)
        tokens = torch.full((self.batch_size, longest), PAD)
        targets = torch.full_like(tokens, IGNORED)
        for row, (question, answer) in enumerate(made):
            tokens[row, : len(question)] = torch.tensor(question)
            targets[row, len(question) - 1] = answer
        return Questions(tokens, targets)

    def _question(self, rng: np.random.Generator) -> tuple[list[int], int]:
        """One question of an allowed length, and its value."""
        for _ in range(TRIES):
            tokens: list[int] = []
            answer = self._list(rng, 1, tokens)
            if self.shortest <= len(tokens) <= self.length:
                return tokens, answer
        raise ValueError(
            f"ListOps: depth and arguments must make questions of {self.shortest} to {self.length} tokens likely, got "
            f"{self.depth} and {self.arguments}"
        )

    def _list(self, rng: np.random.Generator, depth: int, tokens: list[int]) -> int:
        # Python's numbers: on short lists NumPy's take several times as long.
        operation, count = int(rng.integers(len(OPERATIONS))), int(rng.integers(2, self.arguments + 1))
        tokens.append(OPEN + operation)
        arguments = []
        for chance, digit in zip(rng.random(count).tolist(), rng.integers(10, size=count).tolist(), strict=True):
            if chance < NESTED and depth + 1 < self.depth and len(tokens) < self.length:
                arguments.append(self._list(rng, depth + 1, tokens))
            else:
                tokens.append(digit)
                arguments.append(digit)
        tokens.append(CLOSE)
        return value(operation, arguments)
