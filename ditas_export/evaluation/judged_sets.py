"""What a set of images is judged by, read from an .npz file or computed from its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.errors import EvaluationError
from ditas_export.evaluation.array_files import ArrayFile, ArrayHeader
from ditas_export.evaluation.extractors import Extractor
from ditas_export.evaluation.gaussians import Moments

IMAGES = "arr_0"
"""Images, (N, H, W, 1 or 3) uint8: as ADM's files and those of ditas-sample have them."""

FEATURES, SPATIAL = "features", "spatial"
"""Pooled features (N, D) and spatial ones (N, S), of any float type."""

MOMENTS, SPATIAL_MOMENTS = ("mu", "sigma"), ("mu_s", "sigma_s")
"""Mean (D,) and covariance (D, D) of either, as ADM's reference files have them."""

ARRAYS = frozenset({IMAGES, FEATURES, SPATIAL, *MOMENTS, *SPATIAL_MOMENTS})

BATCH = 64
"""Images at once."""

LARGEST_SIDE = 16_384
"""Pixels of an image's side."""

MOST_FEATURES = 16_384
"""Features of an image: a covariance of 2 GiB."""

LARGEST_FEATURE = 1e9
"""Magnitude of a feature; its powers are finite."""

_ROUNDING = 1e-3
"""Of a covariance's largest entry: what rounding to float32 may make of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureSet:
    """One kind of features of a set; at least one of the two is there."""

    rows: Tensor | None  # (N, D) float64
    stated: Moments | None  # as the file states them

    def moments(self, counts: Tensor) -> Moments:
        """Return the moments that the file states, else those of the rows.

        Args:
            counts: (N,) how often each row is drawn; nothing to moments that are stated.
        """
        if self.stated is not None:
            return self.stated
        assert self.rows is not None
        return Moments.of(self.rows, counts)

    @property
    def width(self) -> int:
        """D."""
        found = self.rows if self.stated is None else self.stated.covariance
        assert found is not None
        return found.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedSet:
    """A set's features."""

    pooled: FeatureSet
    spatial: FeatureSet | None


def check_arrays(file: ArrayFile) -> None:
    """Refuse arrays of other shapes and types than they are read as.

    Raises:
        EvaluationError: such an array, arrays that belong together of different sizes, or none.
    """
    arrays = file.arrays
    if not arrays:
        raise EvaluationError(
            f"{file.path} has none of {', '.join(sorted(ARRAYS))}; expected images as ditas-sample "
            f"writes them, features, or the moments of a reference"
        )
    for name, header in arrays.items():
        if not _IS_FIT[name](header):
            raise EvaluationError(f"{file.path}: {name} is {header}; expected {_EXPECTED[name]}")
    for mean, covariance in (MOMENTS, SPATIAL_MOMENTS):
        if {mean, covariance} & arrays.keys():
            _require(file, (mean, covariance))
            if arrays[mean].shape * 2 != arrays[covariance].shape:
                raise EvaluationError(
                    f"{file.path}: {mean} is {arrays[mean]}, {covariance} {arrays[covariance]}; "
                    f"expected the moments of the same features"
                )
    counts = {name: arrays[name].shape[0] for name in (IMAGES, FEATURES, SPATIAL) if name in arrays}
    if len(set(counts.values())) > 1:
        raise EvaluationError(
            f"{file.path}: {counts} rows; expected as many of each, one per image"
        )


def given_set(file: ArrayFile, *, device: str) -> JudgedSet:
    """Return the features or moments that a file has.

    Raises:
        EvaluationError: it has none, or they are damaged or not finite.
    """
    if FEATURES not in file.arrays and MOMENTS[0] not in file.arrays:
        raise EvaluationError(
            f"{file.path} has neither {FEATURES} nor {' and '.join(MOMENTS)}; name what its images "
            f"are judged by, --features digits or inception"
        )
    return _with_stated(file, _read_rows(file, FEATURES), _read_rows(file, SPATIAL), device)


def extracted_set(
    file: ArrayFile,
    extractor: Extractor,
    *,
    device: str,
    on_images: Callable[[int, int], None],
) -> JudgedSet:
    """Return the features of a file's images, and its moments where it states them.

    Raises:
        EvaluationError: it has neither images nor moments, or is damaged.
    """
    if IMAGES not in file.arrays and MOMENTS[0] not in file.arrays:
        raise EvaluationError(
            f"{file.path} has no images ({IMAGES}) and no moments ({' and '.join(MOMENTS)}); "
            f"features that it has are judged by --features given"
        )
    pooled, spatial, done = [], [], 0
    if IMAGES in file.arrays:
        for batch in file.batches(IMAGES, most=BATCH):
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(device)
            with torch.inference_mode():
                rows, patches = extractor(pixels)
            pooled.append(rows.double())
            spatial += [] if patches is None else [patches.double()]
            done += len(batch)
            on_images(done, file.arrays[IMAGES].shape[0])
    joined = [torch.cat(each) if each else None for each in (pooled, spatial)]
    return _with_stated(file, joined[0], joined[1], device)


def _with_stated(
    file: ArrayFile, pooled: Tensor | None, spatial: Tensor | None, device: str
) -> JudgedSet:
    """Return features with the moments that a file states of them."""
    stated = [_read_moments(file, names, device) for names in (MOMENTS, SPATIAL_MOMENTS)]
    sets = []
    for rows, moments, names in zip(
        (pooled, spatial), stated, (MOMENTS, SPATIAL_MOMENTS), strict=True
    ):
        if rows is not None and moments is not None and rows.shape[1] != len(moments.mean):
            raise EvaluationError(
                f"{file.path}: {names[0]} is of {len(moments.mean)} features, and its images have "
                f"{rows.shape[1]} of them; judge them by the network that the moments are of"
            )
        is_there = rows is not None or moments is not None
        on_device = None if rows is None else rows.to(device)
        sets.append(FeatureSet(rows=on_device, stated=moments) if is_there else None)
    assert sets[0] is not None
    return JudgedSet(pooled=sets[0], spatial=sets[1])


def _read_rows(file: ArrayFile, name: str) -> Tensor | None:
    """Return features that a file has."""
    return _read_numbers(file, name) if name in file.arrays else None


def _read_moments(file: ArrayFile, names: tuple[str, str], device: str) -> Moments | None:
    """Return the moments that a file states, None where it states none.

    Raises:
        EvaluationError: what is called a covariance is none.
    """
    if names[0] not in file.arrays:
        return None
    mean, covariance = (_read_numbers(file, name).to(device) for name in names)
    moments = Moments(mean=mean, covariance=covariance)
    off = (moments.root @ moments.root.T - covariance).abs().max()
    if off > _ROUNDING * covariance.abs().max():
        raise EvaluationError(
            f"{file.path}: {names[1]} is no covariance: it is not symmetric, or has a negative "
            f"eigenvalue"
        )
    return moments


def _read_numbers(file: ArrayFile, name: str) -> Tensor:
    """Return an array as float64; refuse what is not finite or beyond bounds."""
    numbers = torch.from_numpy(file.read(name).astype("float64"))
    if not bool((numbers.abs() <= LARGEST_FEATURE).all()):  # not a number is not
        raise EvaluationError(
            f"{file.path}: {name} has values that are not finite or beyond {LARGEST_FEATURE:g}"
        )
    return numbers


def _require(file: ArrayFile, names: tuple[str, ...]) -> None:
    """Refuse a file without some arrays."""
    if lost := [name for name in names if name not in file.arrays]:
        raise EvaluationError(
            f"{file.path} has no {' and '.join(lost)}; expected {' with '.join(names)}"
        )


def _is_images(header: ArrayHeader) -> bool:
    """Return whether an array holds grey or coloured images."""
    if header.dtype.str != "|u1" or len(header.shape) != 4 or header.turned:
        return False
    return max(header.shape[1:3]) <= LARGEST_SIDE and header.shape[3] in (1, 3)


def _is_float(header: ArrayHeader, dimensions: int) -> bool:
    """Return whether an array holds features or their moments."""
    shape = header.shape
    return header.dtype.kind == "f" and len(shape) == dimensions and shape[-1] <= MOST_FEATURES


_IS_FIT: dict[str, Callable[[ArrayHeader], bool]] = {
    IMAGES: _is_images,
    **{name: (lambda header: _is_float(header, 2)) for name in (FEATURES, SPATIAL)},
    **{mean: (lambda header: _is_float(header, 1)) for mean, _ in (MOMENTS, SPATIAL_MOMENTS)},
    **{sigma: (lambda header: _is_float(header, 2)) for _, sigma in (MOMENTS, SPATIAL_MOMENTS)},
}

_EXPECTED = {
    IMAGES: "uint8 (images, height, width, 1 or 3) in C's order",
    **dict.fromkeys((FEATURES, SPATIAL), f"floats (images, features), {MOST_FEATURES} at most"),
    **dict.fromkeys(("mu", "mu_s"), f"floats (features,), {MOST_FEATURES} at most"),
    **dict.fromkeys(("sigma", "sigma_s"), "floats (features, features)"),
}
