"""FID, sFID, KID, precision and recall of two sets of features, each with its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ditas_export.errors import EvaluationError
from ditas_export.evaluation.bootstrap import Figure
from ditas_export.evaluation.gaussians import frechet_distance
from ditas_export.evaluation.judged_sets import FeatureSet, JudgedSet
from ditas_export.evaluation.kernel_distance import kernel_distances
from ditas_export.evaluation.manifolds import memberships

OnProgress = Callable[[str, int, int], None]
"""Called with a stage, what of it is done, and the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetFigures:
    """Figures of two sets; None where a note says why there is none."""

    fid: Figure
    sfid: Figure | None
    kid: Figure | None
    precision: Figure | None
    recall: Figure | None
    notes: tuple[str, ...]


def set_figures(
    samples: JudgedSet,
    reference: JudgedSet,
    sample_counts: Tensor,
    reference_counts: Tensor,
    *,
    on_progress: OnProgress,
) -> SetFigures:
    """Compare two sets by their features.

    Of precision and recall the manifolds are those of all images in every resample: which images
    lie within them is found once.

    Args:
        samples: features of M images.
        reference: features of N images.
        sample_counts: (1 + B, M), see `resample_counts`.
        reference_counts: (1 + B, N).
        on_progress: called with a stage, what of it is done, and the whole.

    Raises:
        EvaluationError: features of different networks.
    """
    counts, notes = (sample_counts, reference_counts), []
    fid = _frechet("FID", samples.pooled, reference.pooled, *counts, on_progress)
    sfid = kid = precision = recall = None
    if samples.spatial and reference.spatial:
        sfid = _frechet("sFID", samples.spatial, reference.spatial, *counts, on_progress)
    else:
        notes.append("no sFID: there are no spatial features of both")
    x, y = samples.pooled.rows, reference.pooled.rows
    if x is None or y is None:
        notes.append("no KID, precision and recall: of one set the moments alone are known")
    else:
        distances = kernel_distances(x, y, *counts, partial(on_progress, "Kernel distances"))
        value, *resampled = distances.tolist()
        kid = Figure.of(value, resampled)
        found = memberships(x, y, partial(on_progress, "Precision and recall"))
        precision = Figure.of_means(found.samples, sample_counts, low=0.0, high=1.0)
        recall = Figure.of_means(found.reference, reference_counts, low=0.0, high=1.0)
    least = min((len(rows) for rows in (x, y) if rows is not None), default=None)
    if least is not None and least <= samples.pooled.width:
        notes.append(
            f"{least} images and {samples.pooled.width} features: FID is far above what more "
            f"images give; compare it with that of as many images alone"
        )
    return SetFigures(
        fid=fid, sfid=sfid, kid=kid, precision=precision, recall=recall, notes=tuple(notes)
    )


def _frechet(
    name: str,
    samples: FeatureSet,
    reference: FeatureSet,
    sample_counts: Tensor,
    reference_counts: Tensor,
    on_progress: OnProgress,
) -> Figure:
    """Return a Fréchet distance.

    Raises:
        EvaluationError: features of different widths.
    """
    if samples.width != reference.width:
        raise EvaluationError(
            f"{name}: {samples.width} features of the samples, {reference.width} of the "
            f"reference; expected features of one network"
        )
    if samples.stated and reference.stated:  # nothing is drawn
        sample_counts, reference_counts = sample_counts[:1], reference_counts[:1]
    found: list[float] = []
    for mine, theirs in zip(sample_counts, reference_counts, strict=True):
        found.append(frechet_distance(samples.moments(mine), reference.moments(theirs)))
        on_progress(f"Resampling {name}", len(found), len(sample_counts))
    return Figure.of(found[0], found[1:], low=0.0)
