"""Images against a reference: figures of pairs, and of the two sets, each with its interval.

Pairs are images of the same noise. Sets are compared by features: FID, sFID, KID, precision and
recall. Intervals are over images drawn with replacement, pairs together; a reference of which the
moments alone are known is not drawn.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ditas_export import __version__
from ditas_export.artifact_files import atomic_path
from ditas_export.errors import EvaluationError
from ditas_export.evaluation.array_files import ArrayFile, open_arrays
from ditas_export.evaluation.bootstrap import Figure, resample_counts
from ditas_export.evaluation.digit_features import SHAPES
from ditas_export.evaluation.extractors import Extractor, open_extractor
from ditas_export.evaluation.judged_sets import (
    ARRAYS,
    FEATURES,
    IMAGES,
    MOMENTS,
    JudgedSet,
    check_arrays,
    extracted_set,
    given_set,
)
from ditas_export.evaluation.manifolds import NEIGHBOURS
from ditas_export.evaluation.options import EvaluateOptions, FeatureSource
from ditas_export.evaluation.pair_figures import PairFigures, pair_figures
from ditas_export.evaluation.set_figures import OnProgress, SetFigures, set_figures
from ditas_export.figures import finite_or_none
from ditas_export.generation.pixels import NPZ_COMMENT
from ditas_export.job_files import JobFiles, Output, json_kind

KIND = "ditas-export evaluation"
FORMAT = f"{KIND} 1"

MOST_IMAGES = 1_000_000
"""Images of a set, whose features are held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was found."""

    options: EvaluateOptions
    images: int | None  # samples; None where their moments alone are known
    reference_images: int | None
    features: str  # what the sets are judged by
    pairs: PairFigures | None
    sets: SetFigures
    notes: tuple[str, ...]  # why figures are missing, and what to know of those that are not

    @property
    def figures(self) -> dict[str, Figure | None]:
        """All figures by name, those of pairs first; None where a note says why there is none."""
        return {
            "psnr_db": None if self.pairs is None else self.pairs.psnr_db,
            "ssim": None if self.pairs is None else self.pairs.ssim,
            "lpips": None if self.pairs is None else self.pairs.lpips,
            "fid": self.sets.fid,
            "sfid": self.sets.sfid,
            "kid": self.sets.kid,
            "precision": self.sets.precision,
            "recall": self.sets.recall,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values; a value that is infinite is null."""
        settings = dataclasses.asdict(self.options)
        return {
            "options": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in settings.items()
            },
            "images": self.images,
            "reference_images": self.reference_images,
            "features": self.features,
            "figures": {
                name: figure
                and {
                    "value": finite_or_none(figure.value),
                    "interval": figure.interval and list(map(finite_or_none, figure.interval)),
                }
                for name, figure in self.figures.items()
            },
            "notes": list(self.notes),
            "versions": {"ditas-export": __version__, "torch": version("torch")},
        }


def evaluate(
    options: EvaluateOptions,
    *,
    report: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Judge images by a reference.

    Args:
        options: the two files, what they are judged by, and how often they are drawn anew.
        report: a JSON to write all findings to.
        on_progress: called with a stage, what of it is done, and the whole.

    Raises:
        EvaluationError: a file that is damaged or has nothing to judge by, sets that do not go
            together, an extractor that is not at hand, or no GPU for `device`.
        ArtifactError: the report cannot be written, or something else is there.
    """
    job_files(options, report).check()
    advance = on_progress or (lambda _stage, _done, _total: None)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("there is no GPU that PyTorch can use; leave out --device cuda")
    with (
        open_arrays(options.samples, ARRAYS) as samples,
        open_arrays(options.reference, ARRAYS) as reference,
    ):
        for file in (samples, reference):
            check_arrays(file)
        evaluation = _evaluate(options, samples, reference, advance)
    if report is not None:
        text = json.dumps({"format": FORMAT, **evaluation.to_dict()}, indent=2, allow_nan=False)
        with atomic_path(report) as partial_file:
            partial_file.write_text(text + "\n", encoding="utf-8")
    return evaluation


def job_files(options: EvaluateOptions, report: Path | None = None) -> JobFiles:
    """Return the files of an evaluation."""
    outputs = (
        [] if report is None else [Output(path=report, what="evaluation", is_ours=json_kind(KIND))]
    )
    return JobFiles(
        inputs={"SAMPLES.npz": options.samples, "REFERENCE.npz": options.reference},
        outputs=tuple(outputs),
    )


def _evaluate(
    options: EvaluateOptions, samples: ArrayFile, reference: ArrayFile, advance: OnProgress
) -> Evaluation:
    """Judge the images of an open file by another."""
    numbers = [_images(file) for file in (samples, reference)]
    is_paired, why_not = _pairing(options, samples, reference)
    extractor = _extractor(options, samples, reference)
    generator = torch.Generator().manual_seed(options.seed)
    draw = partial(resample_counts, resamples=options.resamples, generator=generator)
    sample_counts = draw(numbers[0] or 1)
    reference_counts = sample_counts if is_paired else draw(numbers[1] or 1)
    pairs = None
    if is_paired:
        pairs = pair_figures(
            samples,
            reference,
            sample_counts,
            device=options.device,
            on_pairs=partial(advance, "Comparing pairs"),
        )

    def judged(file: ArrayFile, name: str) -> JudgedSet:
        if extractor is None:
            return given_set(file, device=options.device)
        on_images = partial(advance, f"Features of {name}")
        return extracted_set(file, extractor, device=options.device, on_images=on_images)

    sets = set_figures(
        judged(samples, "samples"),
        judged(reference, "reference"),
        sample_counts.to(options.device),
        reference_counts.to(options.device),
        on_progress=advance,
    )
    notes = [*([why_not] if why_not else ()), *(pairs.notes if pairs else ()), *sets.notes]
    return Evaluation(
        options=options,
        images=numbers[0],
        reference_images=numbers[1],
        features="given in the files" if extractor is None else extractor.description,
        pairs=pairs,
        sets=sets,
        notes=tuple(notes),
    )


def _images(file: ArrayFile) -> int | None:
    """Return how many images a file has or has features of; None of moments alone.

    Raises:
        EvaluationError: fewer than distances between neighbours need, or too many.
    """
    counts = [file.arrays[name].shape[0] for name in (IMAGES, FEATURES) if name in file.arrays]
    if not counts:
        return None
    if not NEIGHBOURS < counts[0] <= MOST_IMAGES:
        raise EvaluationError(
            f"{file.path} has {counts[0]} images; expected {NEIGHBOURS + 1} to {MOST_IMAGES:,}"
        )
    return counts[0]


def _pairing(
    options: EvaluateOptions, samples: ArrayFile, reference: ArrayFile
) -> tuple[bool, str | None]:
    """Return whether images are compared one by one; with it, why they are not.

    Raises:
        EvaluationError: pairs were asked for, and there are none.
    """
    shapes = [
        file.arrays[IMAGES].shape if IMAGES in file.arrays else None
        for file in (samples, reference)
    ]
    if options.paired is False:
        return False, "no pairs, as asked"
    if shapes[0] is None or shapes[0] != shapes[1]:
        found = f"no pairs: the images are {shapes[0] or 'none'} and {shapes[1] or 'none'}"
        if options.paired:
            raise EvaluationError(f"{found}; expected as many of the same shape for --paired")
        return False, found
    if options.paired is None and {samples.comment, reference.comment} != {NPZ_COMMENT}:
        return False, (
            "no pairs: ditas-sample did not write both files; say --paired where the images of one "
            "place are of the same noise"
        )
    return True, None


def _extractor(
    options: EvaluateOptions, samples: ArrayFile, reference: ArrayFile
) -> Extractor | None:
    """Return what makes features of images; None where those that are given are judged.

    Raises:
        EvaluationError: features of images that it does not take, or one that is not at hand.
    """
    source = options.features
    if source == "auto":
        source = _source_for(samples, reference)
    if source == "given":
        return None
    for file in (samples, reference):
        shape = file.arrays[IMAGES].shape[1:] if IMAGES in file.arrays else None
        if source == "digits" and shape not in (None, *SHAPES):
            raise EvaluationError(
                f"{file.path} has images of {shape}; the digit classifier takes {SHAPES[0]}, "
                f"others take --features inception"
            )
    return open_extractor(source, device=options.device)


def _source_for(*files: ArrayFile) -> FeatureSource:
    """Return what files are judged by that do not say it: what they have, else what fits."""
    if all(FEATURES in file.arrays or MOMENTS[0] in file.arrays for file in files):
        return "given"
    shapes = {file.arrays[IMAGES].shape[1:] for file in files if IMAGES in file.arrays}
    return "digits" if shapes and shapes <= set(SHAPES) else "inception"
