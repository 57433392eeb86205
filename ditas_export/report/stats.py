"""What an export leaves for its report beside the manifest: out.stats.safetensors.

It holds what can be shown and not computed again without a walk: maxima of activations, smoothing
scales, small pictures of weights and samples. Settings, α, SNR, bytes and seconds are in the
manifest alone. Wide tensors are pooled by their largest values, so that the file of a DiT-XL/2
stays below 8 MiB and no outlier is lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.dit.fitting import Wanted, require_fits
from ditas_export.errors import ArtifactError
from ditas_export.paths import StrPath
from ditas_export.saved_records import check_fields, from_record

STATS_KIND = "ditas-export statistics"
STATS_FORMAT = f"{STATS_KIND} 1"

PictureKind = Literal["pixels", "decoded", "latents"]
"""Pixels of the model itself, latents that a VAE decoded, or latents shown as colours."""

MOST_STEPS, MOST_CHANNELS = 64, 512
"""Size of a picture of activations by time step and channel, at most."""

MOST_ROWS, MOST_COLUMNS = 64, 256
"""Size of a picture of a weight, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNames:
    """A block of the model, and its quantized linears by their paths within it."""

    path: str
    linears: tuple[str, ...]

    def __post_init__(self) -> None:
        """Hold the fields against their hints."""
        check_fields(self, ArtifactError)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsHeader:
    """What the file says in words and single numbers."""

    file_sha256: str  # of the ONNX file that it is of
    command: tuple[str, ...]  # that made it
    notes: tuple[str, ...]  # what was found, chosen or assumed of the checkpoint
    blocks: tuple[BlockNames, ...]
    times: tuple[float, ...]  # of the calibration's steps; none where they are not known
    pictures: PictureKind | None  # what the samples are, None where there are none
    labels: tuple[int, ...]  # of the samples, in order
    missing: tuple[str, ...]  # what this export could not know, and why

    def __post_init__(self) -> None:
        """Hold the fields against their hints.

        Raises:
            ArtifactError: names what does not fit.
        """
        check_fields(self, ArtifactError)
        if not re.fullmatch(r"[0-9a-f]{64}", self.file_sha256):
            raise ArtifactError(f"file_sha256={self.file_sha256[:40]!r} is no SHA-256")
        if len(set(self.linears)) < len(self.linears):
            raise ArtifactError("a linear is listed twice")

    @property
    def linears(self) -> tuple[str, ...]:
        """Module paths of all linears, in walk order."""
        return tuple(f"{block.path}.{path}" for block in self.blocks for path in block.linears)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearStats:
    """What a linear reads."""

    smoothing_scale: Tensor  # s, (K,) float32
    step_ranges: Tensor  # (steps,) float32: max|x / s| at each time step
    channel_maxima: Tensor | None  # (K,) float32: max|x_c| over all steps; None: not known
    step_maxima: Tensor | None  # (steps,) float32: max|x| at each time step

    @property
    def smoothed_maxima(self) -> Tensor | None:
        """Largest |x_c / s_c| over all steps, (K,)."""
        return None if self.channel_maxima is None else self.channel_maxima / self.smoothing_scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightPictures:
    """Magnitudes of a weight, pooled by their largest: (rows, columns) float32 of one size."""

    before: Tensor  # |W|
    smoothed: Tensor  # |W · s|
    error: Tensor  # |Ŵ − W · s|, the low-rank branch in Ŵ
    codes: Tensor  # (2 · largest code + 1,) int64: how often each code is used, lowest first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Pictures from the same noise, (N, H, W, 1 or 3) uint8."""

    reference: Tensor  # of the float model
    quantized: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportStats:
    """What an export leaves for its report."""

    header: StatsHeader
    linears: Mapping[str, LinearStats]
    maps: Mapping[str, Tensor]  # of the most uneven inputs: (steps, channels) float32, pooled
    weights: Mapping[str, WeightPictures]  # of the linears that lose most
    samples: Samples | None

    def save(self, path: StrPath) -> None:
        """Write one safetensors file; atomic.

        Raises:
            ArtifactError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            tensors[f"linears.{name}.smoothing_scale"] = linear.smoothing_scale
            tensors[f"linears.{name}.step_ranges"] = linear.step_ranges
            if linear.channel_maxima is not None and linear.step_maxima is not None:
                tensors[f"linears.{name}.channel_maxima"] = linear.channel_maxima
                tensors[f"linears.{name}.step_maxima"] = linear.step_maxima
        tensors |= {f"maps.{name}": picture for name, picture in self.maps.items()}
        for name, pictures in self.weights.items():
            tensors |= {f"weights.{name}.{part}": getattr(pictures, part) for part in _WEIGHT_PARTS}
        if self.samples is not None:
            tensors["samples.reference"] = self.samples.reference
            tensors["samples.quantized"] = self.samples.quantized
        save_tensors(Path(path), tensors, file_format=STATS_FORMAT, header=asdict(self.header))

    @classmethod
    def load(cls, path: StrPath) -> ExportStats:
        """Read what `save` wrote.

        Raises:
            ArtifactError: no such file, another kind of file, or a damaged one.
        """
        path = Path(path)
        tensors, values = load_tensors(path, file_format=STATS_FORMAT)
        try:
            header = from_record(StatsHeader, values, error=ArtifactError)
            require_fits(tensors, _wanted(tensors, header), error=ArtifactError)
            return cls(
                header=header,
                linears={name: _linear(tensors, name) for name in header.linears},
                maps=_maps(tensors),
                weights={name: _weight(tensors, name) for name in _weight_names(tensors)},
                samples=_samples(tensors, header),
            )
        except ArtifactError as error:
            raise ArtifactError(f"{path} is damaged: {error}; run the export again") from error


_WEIGHT_PARTS = ("before", "smoothed", "error", "codes")


def pooled(picture: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix of `rows` × `columns` at most, each element the largest of its cell.

    Args:
        picture: (N, K) float.
        rows: at most.
        columns: at most.
    """
    size = (min(rows, picture.shape[0]), min(columns, picture.shape[1]))
    return torch.nn.functional.adaptive_max_pool2d(picture[None, None].float(), size)[0, 0]


def _wanted(tensors: Mapping[str, Tensor], header: StatsHeader) -> dict[str, Wanted]:
    """Return what the file must hold; which optional parts it has is its own matter."""
    wanted: dict[str, Wanted] = {}
    any_size, plain = Wanted((None,), low=0), Wanted((None, None), low=0)
    for name in header.linears:
        start = f"linears.{name}."
        wanted |= {f"{start}smoothing_scale": any_size, f"{start}step_ranges": any_size}
        if header.times:
            wanted[f"{start}channel_maxima"] = Wanted(
                _shape(tensors, f"{start}smoothing_scale"), low=0
            )
            wanted[f"{start}step_maxima"] = Wanted((len(header.times),), low=0)
    names = set(header.linears)
    wanted |= {f"maps.{name}": plain for name in _maps(tensors) if name in names}
    for name in _weight_names(tensors):
        if name in names:
            wanted |= {f"weights.{name}.{part}": plain for part in _WEIGHT_PARTS[:3]}
            wanted[f"weights.{name}.codes"] = Wanted((None,), torch.int64, low=0)
    if header.pictures is not None:
        shape = (len(header.labels), None, None, None)
        wanted["samples.reference"] = Wanted(shape, torch.uint8)
        wanted["samples.quantized"] = Wanted(_shape(tensors, "samples.reference"), torch.uint8)
    return wanted


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor, of one that is not there none."""
    return tuple(tensors[name].shape) if name in tensors else ()


def _linear(tensors: Mapping[str, Tensor], name: str) -> LinearStats:
    """Return what the file has of a linear."""
    start = f"linears.{name}."
    return LinearStats(
        smoothing_scale=tensors[f"{start}smoothing_scale"],
        step_ranges=tensors[f"{start}step_ranges"],
        channel_maxima=tensors.get(f"{start}channel_maxima"),
        step_maxima=tensors.get(f"{start}step_maxima"),
    )


def _maps(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the pictures of activations, in the order of their names."""
    return {
        name.removeprefix("maps."): tensor
        for name, tensor in sorted(tensors.items())
        if name.startswith("maps.")
    }


def _weight_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the linears that have pictures of their weights."""
    suffix = ".codes"
    return sorted(
        name.removeprefix("weights.").removesuffix(suffix)
        for name in tensors
        if name.startswith("weights.") and name.endswith(suffix)
    )


def _weight(tensors: Mapping[str, Tensor], name: str) -> WeightPictures:
    """Return the pictures of a weight."""
    parts = {part: tensors[f"weights.{name}.{part}"] for part in _WEIGHT_PARTS}
    return WeightPictures(**parts)


def _samples(tensors: Mapping[str, Tensor], header: StatsHeader) -> Samples | None:
    """Return the samples, where there are any.

    Raises:
        ArtifactError: pictures of neither one nor three channels.
    """
    if header.pictures is None:
        return None
    reference = tensors["samples.reference"]
    if reference.shape[-1] not in (1, 3) or not reference.numel():
        raise ArtifactError(f"samples of shape {tuple(reference.shape)} are no pictures")
    return Samples(reference=reference, quantized=tensors["samples.quantized"])
