"""Selective copying: some tokens stand far apart among blanks, and are to be said again in their order.

B batch, L positions, K tokens to copy, V vocabulary.
"""

from typing import Literal, get_args

import numpy as np

from minrnn.tasks.answers import AnswerTask, Questions, questions

Convention = Literal["minrnn", "s4"]


class SelectiveCopying(AnswerTask):
    """K of L positions, drawn without replacement, hold data tokens drawn from V - 2; K cues follow, and after each the
    next data token is wanted. Accuracy is that of single tokens; chance is 1 / (V - 2).

    Two published conventions. "minrnn": blank V - 1, cue 0, L + K tokens. "s4": blank 0, cue V - 1, and the data lie
    among L + K positions, L + 2K tokens. Data tokens are 1 ... V - 2 in both.

    Args:
        length: L.
        tokens: K.
        vocabulary: V, blank and cue included.
        batch_size: B.
        convention: "minrnn" or "s4".
        examination: batches in the evaluation set.

    Raises:
        ValueError: an argument is out of its range.

    Source: Feng et al., "Were RNNs All We Needed?" (2024), section 4.2; Gu and Dao, "Mamba" (2023), section 4.1.1;
    Jing et al., "Gated orthogonal recurrent units" (2019).
    """

    def __init__(
        self,
        length: int = 4096,
        tokens: int = 16,
        vocabulary: int = 16,
        batch_size: int = 64,
        convention: Convention = "minrnn",
        examination: int = 20,
    ) -> None:
        super().__init__(vocabulary, batch_size, examination)
        if convention not in get_args(Convention):
            raise ValueError(f"SelectiveCopying: convention must be one of {get_args(Convention)}, got {convention!r}")
        if not 1 <= tokens <= length:
            raise ValueError(f"SelectiveCopying: tokens must be between 1 and length = {length}, got {tokens}")
        if vocabulary < 3:
            raise ValueError(f"SelectiveCopying: vocabulary must be at least 3, got {vocabulary}")
        self.tokens, self.convention = tokens, convention
        self.places = length + (tokens if convention == "s4" else 0)

    def make(self, rng: np.random.Generator, *, held_out: bool) -> Questions:
        """(B, L + K) or (B, L + 2K) tokens; what is held out is drawn as what is trained on."""
        blank, cue = (self.vocabulary - 1, 0) if self.convention == "minrnn" else (0, self.vocabulary - 1)
        data = rng.integers(1, self.vocabulary - 1, (self.batch_size, self.tokens))
        drawn = rng.random((self.batch_size, self.places), dtype=np.float32)
        # Multiples of 2^-24, so that two may be equal: then the earlier counts as less, whatever the processor does.
        drawn = drawn + np.arange(self.places) * 2.0**-52
        where = np.sort(np.argpartition(drawn, self.tokens - 1, axis=1)[:, : self.tokens], axis=1)
        series = np.full((self.batch_size, self.places + self.tokens), blank)
        np.put_along_axis(series, where, data, axis=1)
        series[:, self.places :] = cue
        return questions(series, data)
