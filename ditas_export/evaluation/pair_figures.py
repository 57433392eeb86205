"""PSNR, SSIM and LPIPS of two files whose images are pairs, read in step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.evaluation.array_files import ArrayFile
from ditas_export.evaluation.bootstrap import Figure
from ditas_export.evaluation.image_pairs import (
    WINDOW,
    psnr_db,
    squared_errors,
    structural_similarities,
)
from ditas_export.evaluation.judged_sets import BATCH, IMAGES
from ditas_export.evaluation.perceptual_distance import (
    LEAST_SIDE,
    PerceptualDistance,
    why_absent,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """Figures over all pairs; None where a note says why there is none."""

    psnr_db: Figure  # of the mean squared error over all pairs
    ssim: Figure | None  # mean over pairs
    lpips: Figure | None  # mean over pairs
    notes: tuple[str, ...]


def pair_figures(
    samples: ArrayFile,
    reference: ArrayFile,
    counts: Tensor,
    *,
    device: str,
    on_pairs: Callable[[int, int], None],
) -> PairFigures:
    """Compare images one by one.

    Args:
        samples: with images.
        reference: with images of the same shape.
        counts: (1 + B, N), see `resample_counts`.
        device: where LPIPS is computed.
        on_pairs: called with (pairs done, in all).

    Raises:
        EvaluationError: a file is damaged.
    """
    total, *sides, _ = samples.arrays[IMAGES].shape
    notes = []
    has_ssim = min(sides) >= WINDOW
    if not has_ssim:
        notes.append(
            f"no SSIM: its windows are of {WINDOW} pixels, the images {sides[0]}×{sides[1]}"
        )
    if (reason := why_absent()) is None and min(sides) < LEAST_SIDE:
        reason = f"no LPIPS: it takes {LEAST_SIDE} pixels and more"
    notes += [reason] if reason else []
    lpips = None if reason else PerceptualDistance(device=device)
    errors, similarities, distances, done = [], [], [], 0
    parts = (file.batches(IMAGES, most=BATCH) for file in (samples, reference))
    for pair in zip(*parts, strict=True):
        x, y = (torch.from_numpy(part).permute(0, 3, 1, 2).to(device) for part in pair)
        errors.append(squared_errors(x, y))
        similarities += [structural_similarities(x, y)] if has_ssim else []
        distances += [lpips(x, y)] if lpips else []
        done += len(x)
        on_pairs(done, total)
    decibels = [psnr_db(value) for value in (counts @ torch.cat(errors).cpu() / total).tolist()]
    if decibels[0] == float("inf"):
        notes.append("all pairs are equal: their PSNR is infinite")
    return PairFigures(
        psnr_db=Figure.of(decibels[0], decibels[1:]),
        ssim=_mean(similarities, counts, low=-1.0, high=1.0),
        lpips=_mean(distances, counts, low=0.0, high=float("inf")),
        notes=tuple(notes),
    )


def _mean(parts: list[Tensor], counts: Tensor, *, low: float, high: float) -> Figure | None:
    """Return the mean over pairs of what was computed by batches, None where nothing was."""
    return Figure.of_means(torch.cat(parts).cpu(), counts, low=low, high=high) if parts else None
