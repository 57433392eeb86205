"""How sure a figure of images is: the spread of that figure over images drawn with replacement.

Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979).
The interval is the figure, 1.96 standard deviations of its resamples to either side, and not their
percentiles: an image that is drawn twice makes distances between sets larger than they are, which
moves the percentiles and not the spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DEVIATIONS = statistics.NormalDist().inv_cdf(0.975)
"""Standard deviations to either side of a mean that hold 95 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure of a set of images, and its 95 % interval; None where nothing was resampled."""

    value: float
    interval: tuple[float, float] | None

    @classmethod
    def of_means(cls, values: Tensor, counts: Tensor, *, low: float, high: float) -> Figure:
        """Return the mean of one value per image.

        Args:
            values: (N,), any real type.
            counts: (1 + B, N), see `resample_counts`.
            low: the least that the mean can be.
            high: the most.
        """
        value, *resampled = (counts @ values.double() / len(values)).tolist()
        return cls.of(value, resampled, low=low, high=high)

    @classmethod
    def of(
        cls,
        value: float,
        resampled: Sequence[float],
        *,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> Figure:
        """Return a figure with the interval that its resamples give.

        Args:
            value: of the images as they are.
            resampled: the same of each resample; fewer than two give no interval, and neither does
                what is infinite.
            low: the least that such a figure can be.
            high: the most.
        """
        if len(resampled) < 2 or not all(map(math.isfinite, (value, *resampled))):
            return cls(value=value, interval=None)
        half = _DEVIATIONS * statistics.stdev(resampled)
        return cls(value=value, interval=(max(low, value - half), min(high, value + half)))


def resample_counts(images: int, *, resamples: int, generator: torch.Generator) -> Tensor:
    """Return how often each image is in each set, the set as it is first.

    Args:
        images: N.
        resamples: B sets of N images, drawn with replacement.
        generator: what draws, on the CPU.

    Returns:
        (1 + B, N) float64 whole numbers; every row sums to N, the first is all ones.
    """
    counts = torch.ones(1 + resamples, images, dtype=torch.float64)
    for row in counts[1:]:
        drawn = torch.randint(images, (images,), generator=generator)
        row.copy_(torch.bincount(drawn, minlength=images))
    return counts
