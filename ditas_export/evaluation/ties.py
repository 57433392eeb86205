"""How far a right file may be from the fake-quantized forward: as far as that is from itself.

Between two right computations of one quantized model lie rounding ties: a code flips by one where
a float differs in its last bits, and every later linear sees it. How much that makes depends on the
model. So it is measured: the fake-quantized forward answers once more, at latents that are
disturbed by as little as the float type rounds. What a file loses beyond that, on average over the
probed time steps, is not rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditas_export.diffusion.runner import Closing, Runner
from ditas_export.families.base import ModelConfig, ModelInputs
from ditas_export.figures import decibels, finite_or_none

DISTURBANCE = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative size of the disturbance, by float type: in halves their rounding, in float32 a few last
bits, by which sums in another order differ."""

DRAWS = (0, 1)
"""Seeds of the disturbances; their noise is averaged."""

MOST_EXCESS_DB = 3.0
"""Noise beyond that of ties above which a file does not compute what was calibrated. Right files of
the bundled model have −0.4 to 1.0; an s that is wrong by 0.3 % in one linear's every channel makes
1.3 to 4.0 in float32."""

FEW_FLIPS = 10
"""Codes that may flip in one linear's input whatever was measured: a small model may have no tie at
all where the file has one."""

FLIP_ENERGY = 6e-4
"""Energy of one flip beside that of one number: a step is 1/127 of a range of about three standard
deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """How a file answers the probes beside the fake-quantized forward; dB."""

    db: float  # worst SNR of the file's answers
    ties_db: float  # worst SNR of the disturbed forward's
    excess_db: float  # the file's noise beyond that of ties, their ratio's mean over the probes

    @property
    def is_right(self) -> bool:
        """Whether the file computes what was calibrated."""
        return self.excess_db <= MOST_EXCESS_DB

    @property
    def description(self) -> str:
        """The figures in words."""
        return (
            f"{self.db:.1f} dB, where rounding alone leaves {self.ties_db:.1f}: "
            f"{max(0.0, self.excess_db):.1f} dB more noise, expected {MOST_EXCESS_DB} at most"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; null for what is infinite or no number."""
        return {
            "match_db": finite_or_none(self.db),
            "ties_db": finite_or_none(self.ties_db),
            "excess_db": finite_or_none(self.excess_db),
            "most_excess_db": MOST_EXCESS_DB,
        }


NO_MATCH = Match(db=float("-inf"), ties_db=float("nan"), excess_db=float("inf"))
"""Where something put out NaN or infinity."""


def match_of(
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    disturbed: Sequence[Sequence[Tensor]],
    *,
    numbers: int,
) -> Match:
    """Return how a file's answers match.

    Args:
        expected: the fake-quantized forward's answer to each probe.
        found: the file's.
        disturbed: of each draw, the disturbed forward's answers.
        numbers: in the input of a linear that reads the hidden states, rows · tokens · width.
    """
    negligible = FEW_FLIPS * FLIP_ENERGY / numbers
    if not all(bool(answer.isfinite().all()) for each in (found, *disturbed) for answer in each):
        return NO_MATCH
    found_db, ties_db, ratios = [], [], []
    for index, wanted in enumerate(expected):
        signal = _energy(wanted)
        noise = _energy(found[index] - wanted)
        ties = sum(_energy(draw[index] - wanted) for draw in disturbed) / len(disturbed)
        found_db.append(decibels(signal, noise))
        ties_db.append(decibels(signal, ties))
        least = negligible * signal
        ratios.append(max(noise, least) / max(ties, least))
    excess_db = decibels(sum(ratios) / len(ratios), 1.0)
    return Match(db=min(found_db), ties_db=min(ties_db), excess_db=excess_db)


def _energy(x: Tensor) -> float:
    """Return Σ x² in float64."""
    return float(x.double().square().sum())


class DisturbedRunner(Closing):
    """A runner whose latents are multiplied by 1 + ε z, z normal: the same z at every call."""

    def __init__(self, runner: Runner, *, size: float, seed: int) -> None:
        self._runner = runner
        self._size = size
        self._seed = seed

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._runner.config

    @property
    def description(self) -> str:
        """The runner's own."""
        return self._runner.description

    @property
    def device(self) -> torch.device:
        """The runner's own."""
        return self._runner.device

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Answer at the disturbed latents."""
        latents = inputs.latents
        z = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self._seed))
        return self._runner(inputs.replaced({next(iter(inputs)): latents * (1 + self._size * z)}))

    def close(self) -> None:
        """Leave the runner to whoever opened it."""
