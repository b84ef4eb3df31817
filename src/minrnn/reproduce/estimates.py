"""Which of several means can be told apart."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, seeds: Sequence[float], deviation: float, within: float) -> "Estimate":
        """The mean over seeds, of which each has one value.

        Args:
            seeds: the values.
            deviation: the standard deviation over seeds.
            within: the standard error that the mean would have if all seeds were alike, as of a finite examination.
        """
        return cls(statistics.mean(seeds), math.hypot(deviation / len(seeds) ** 0.5, within))

    def apart(self, other: "Estimate", digits: int) -> bool:
        """Whether two differ by more than twice the standard error of their difference, and by what is shown."""
        least = 2 * math.hypot(self.error, other.error)
        return abs(self.mean - other.mean) > least and f"{self.mean:.{digits}f}" != f"{other.mean:.{digits}f}"


def pooled(samples: Iterable[Sequence[float]]) -> float:
    """The standard deviation within samples, which two or three seeds of one system would not tell; 0 if none has two
    seeds."""
    several = [sample for sample in samples if len(sample) > 1]
    freedom = sum(len(sample) - 1 for sample in several)
    return (sum((len(each) - 1) * statistics.variance(each) for each in several) / freedom) ** 0.5 if several else 0.0
