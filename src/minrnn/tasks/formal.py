"""Formal languages: seven functions of a word, learned on short words and examined on longer ones.

B batch, L length of the word. All words of a batch have one length.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minrnn.tasks.answers import AnswerTask, Questions, questions

TRAINED, EXAMINED = (1, 40), (40, 256)  # shortest and longest words


class Language(NamedTuple):
    """A function of words.

    Args:
        symbols: a word is made of 0 ... symbols - 1.
        answers: an answer is one of 0 ... answers - 1.
        answer: (B, L) words, with the batch's random numbers, to the tokens that follow them (B, E) and the answers
            (B, K), wanted after the last K of all tokens. `symbols` is the token that is empty.
    """

    symbols: int
    answers: int
    answer: Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _empty(words: np.ndarray, symbols: int, count: int = 1) -> np.ndarray:
    return np.full((len(words), count), symbols)


def _bucket_sort(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The word's symbols in order, asked for one by one."""
    return _empty(words, 10, words.shape[1]), np.sort(words, axis=1)


def _missing_duplicate(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The word begins a second time and breaks off: the next symbol."""
    length = int(rng.integers(words.shape[1]))
    return np.concatenate([words[:, :length], _empty(words, 9)], axis=1), words[:, length : length + 1]


def _cycle_navigation(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where steps of -1, 0 and +1 end on a ring of five."""
    return _empty(words, 3), (words - 1).sum(1, keepdims=True) % 5


def _even_pairs(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whether the number of unequal neighbours is odd, that is, whether the ends differ."""
    return _empty(words, 2), words[:, :1] ^ words[:, -1:]


def _counts(words: np.ndarray) -> np.ndarray:
    return (words[:, :, None] == np.arange(63)).sum(1)


def _majority(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent symbol, of several the largest."""
    return _empty(words, 63), 62 - _counts(words)[:, ::-1].argmax(1, keepdims=True)


def _majority_count(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How often the most frequent symbol occurs, at most 63."""
    return _empty(words, 63), _counts(words).max(1, keepdims=True).clip(max=63)


def _parity(words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The sum of bits modulo 2."""
    return _empty(words, 2), words.sum(1, keepdims=True) % 2


LANGUAGES: dict[str, Language] = {
    "bucket_sort": Language(10, 10, _bucket_sort),
    "missing_duplicate": Language(9, 9, _missing_duplicate),
    "cycle_navigation": Language(3, 5, _cycle_navigation),
    "even_pairs": Language(2, 2, _even_pairs),
    "majority": Language(63, 63, _majority),
    "majority_count": Language(63, 64, _majority_count),
    "parity": Language(2, 2, _parity),
}


class FormalLanguage(AnswerTask):
    """Words of 1 to 40 symbols to train on, of 40 to 256 to be examined by; answers as `LANGUAGES` has them.

    Args:
        language: a key of `LANGUAGES`.
        batch_size: B.
        trained, examined: the shortest and the longest word.
        examination: batches in the evaluation set.

    Raises:
        ValueError: no language has this name, or lengths are no range.

    Source: Deletang et al., "Neural networks and the Chomsky hierarchy" (2023); Beck et al., "xLSTM" (2024), section
    4.1; Feng et al., "Were RNNs All We Needed?" (2024), appendix.
    """

    def __init__(
        self,
        language: str,
        batch_size: int = 256,
        trained: tuple[int, int] = TRAINED,
        examined: tuple[int, int] = EXAMINED,
        examination: int = 20,
    ) -> None:
        if language not in LANGUAGES:
            raise ValueError(f"FormalLanguage: language must be one of {', '.join(LANGUAGES)}, got {language!r}")
        self.language = LANGUAGES[language]
        super().__init__(max(self.language.symbols + 1, self.language.answers), batch_size, examination)
        for name, (shortest, longest) in (("trained", trained), ("examined", examined)):
            if not 1 <= shortest <= longest:
                raise ValueError(f"FormalLanguage: {name} must be (shortest, longest) >= 1, got {shortest, longest}")
        self.trained, self.examined = trained, examined

    def make(self, rng: np.random.Generator, *, held_out: bool) -> Questions:
        """Words of one random length, what follows them, and their answers."""
        shortest, longest = self.examined if held_out else self.trained
        length = int(rng.integers(shortest, longest + 1))
        words = rng.integers(self.language.symbols, size=(self.batch_size, length))
        after, answers = self.language.answer(words, rng)
        return questions(np.concatenate([words, after], axis=1), answers)
