"""How far apart two tensors are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.figures import decibels


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far outputs are from their reference; `+` joins what was found in several tensors."""

    signal: float = 0.0  # Σ reference²
    noise: float = 0.0  # Σ (output − reference)²
    reference_sum: float = 0.0  # Σ |reference|
    error_sum: float = 0.0  # Σ |output − reference|
    max_abs: float = 0.0  # max |output − reference|
    count: int = 0  # elements

    @classmethod
    def between(cls, reference: Tensor, output: Tensor) -> Difference:
        """Return the difference of two tensors, summed in float64.

        Args:
            reference: any shape but an empty one, any float type.
            output: the same shape.
        """
        wanted = reference.double()
        error = output.double() - wanted
        return cls(
            signal=float((wanted**2).sum()),
            noise=float((error**2).sum()),
            reference_sum=float(wanted.abs().sum()),
            error_sum=float(error.abs().sum()),
            max_abs=float(error.abs().max()),
            count=error.numel(),
        )

    def __add__(self, other: Difference) -> Difference:
        """Return the difference over the elements of both; not a number stays not a number."""
        peaks = torch.tensor([self.max_abs, other.max_abs], dtype=torch.float64)
        return Difference(
            signal=self.signal + other.signal,
            noise=self.noise + other.noise,
            reference_sum=self.reference_sum + other.reference_sum,
            error_sum=self.error_sum + other.error_sum,
            max_abs=float(peaks.max()),
            count=self.count + other.count,
        )

    @property
    def snr_db(self) -> float:
        """10 · log10(Σ reference² / Σ error²); infinity if equal, −infinity if not finite."""
        return decibels(self.signal, self.noise)

    @property
    def is_finite(self) -> bool:
        """Whether both outputs are finite."""
        return math.isfinite(self.noise)

    @property
    def mean_abs(self) -> float:
        """Mean of |error|."""
        return self.error_sum / self.count

    @property
    def relative(self) -> float:
        """Σ |error| / Σ |reference|; of zeros, 0 without an error and infinity with one."""
        if self.reference_sum:
            return self.error_sum / self.reference_sum
        return math.inf if self.error_sum else 0.0


def psnr_db(reference: Tensor, output: Tensor) -> float:
    """Return 10 · log10((max − min of the reference)² / mean squared error) in dB.

    Infinity if equal, minus infinity if not finite.

    Args:
        reference: any shape.
        output: the same shape.
    """
    found = Difference.between(reference, output)
    spread = float(reference.max()) - float(reference.min())
    return decibels(found.count * spread**2, found.noise)


def snr_db(reference: Tensor, output: Tensor) -> float:
    """Return 10 · log10(Σ reference² / Σ (output − reference)²) in dB; infinity if equal.

    Args:
        reference: any shape.
        output: the same shape.
    """
    return Difference.between(reference, output).snr_db
