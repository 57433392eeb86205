"""From what an export has at hand to the statistics that it leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ditas_export.calibration.quantized_model import QuantizedLinear, QuantizedModel
from ditas_export.families.base import ModelConfig
from ditas_export.families.registry import family_of
from ditas_export.generation.pixels import to_pixels
from ditas_export.generation.sampler import PICTURE_CHANNELS
from ditas_export.quantization.integer import max_code
from ditas_export.report.stats import (
    MOST_CHANNELS,
    MOST_COLUMNS,
    MOST_ROWS,
    MOST_STEPS,
    BlockNames,
    LinearStats,
    PictureKind,
    Samples,
    WeightPictures,
    pooled,
)
from ditas_export.vae.decoder import Decoder

SHOWN_LINEARS = 4
"""Linears whose inputs, and whose weights, are shown as pictures."""

MOST_SAMPLES = 8
LARGEST_SIDE = 256
"""Pixels of a sample that is kept."""

MOST_SAMPLE_BYTES = 2**20
"""Of the float model's samples; the quantized ones take as many."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """What calibration saw of every linear's input."""

    times: Tensor  # (steps,): what the model was fed
    maxima: Mapping[str, Tensor]  # module path -> (steps, K) float32: max|x_c| at each step


def block_names(config: ModelConfig) -> tuple[BlockNames, ...]:
    """Return a model's blocks, with the paths of their linears within them."""
    return tuple(
        BlockNames(
            path=block.path,
            linears=tuple(name.removeprefix(f"{block.path}.") for name in block.linears),
        )
        for block in family_of(config).blocks(config)
    )


def linear_stats(
    quantized: QuantizedModel, activations: Activations | None
) -> dict[str, LinearStats]:
    """Return what every linear reads, as far as it is known."""
    found = {}
    for name, linear in quantized.linears.items():
        maxima = None if activations is None else activations.maxima[name].float().cpu()
        found[name] = LinearStats(
            smoothing_scale=linear.smoothing_scale,
            step_ranges=linear.step_ranges,
            channel_maxima=None if maxima is None else maxima.amax(dim=0),
            step_maxima=None if maxima is None else maxima.amax(dim=1),
        )
    return found


def unevenness(channel_maxima: Tensor) -> float:
    """Return the largest over the median of channel maxima; 1 is even, infinity half dead.

    Args:
        channel_maxima: (K,), ≥ 0.
    """
    median, largest = float(channel_maxima.median()), float(channel_maxima.amax())
    if largest == 0:
        return 1.0
    return largest / median if median > 0 else math.inf


def activation_maps(
    linears: Mapping[str, LinearStats], activations: Activations | None, config: ModelConfig
) -> dict[str, Tensor]:
    """Return pictures, time step by channel, of the most uneven inputs; one for each input."""
    if activations is None:
        return {}
    firsts = [
        block.name(group.linears[0])
        for block in family_of(config).blocks(config)
        for group in block.groups()
    ]
    uneven: dict[str, float] = {}
    for name in firsts:
        maxima = linears[name].channel_maxima
        assert maxima is not None  # known with the activations
        uneven[name] = unevenness(maxima)
    chosen = sorted(firsts, key=lambda name: -uneven[name])[:SHOWN_LINEARS]
    return {
        name: pooled(activations.maxima[name].cpu(), MOST_STEPS, MOST_CHANNELS) for name in chosen
    }


def weight_pictures(
    quantized: QuantizedModel, parameters: Mapping[str, Tensor]
) -> dict[str, WeightPictures]:
    """Return pictures of the weights that lose most of their linears' outputs.

    Args:
        quantized: the model.
        parameters: the float model's, by name.
    """

    def snr(name: str) -> float:
        found = quantized.linears[name].output_snr_db
        return math.inf if math.isnan(found) else found

    worst = sorted(quantized.linears, key=snr)[:SHOWN_LINEARS]
    return {
        name: _pictures(quantized.linears[name], parameters[f"{name}.weight"]) for name in worst
    }


def _pictures(linear: QuantizedLinear, weight: Tensor) -> WeightPictures:
    """Return pictures of one weight (N, K)."""
    weight = weight.detach().float().cpu()
    smoothed = weight * linear.smoothing_scale
    rounded = linear.weight.dequantize().float()
    if linear.low_rank is not None:
        rounded = rounded + linear.low_rank.dequantize(linear.weight.row_scale).float()
    most = max_code(linear.weight.bits)
    codes = torch.bincount(linear.weight.codes.flatten().int() + most, minlength=2 * most + 1)
    shown = (weight, smoothed, rounded - smoothed)
    before, after, error = (pooled(each.abs(), MOST_ROWS, MOST_COLUMNS) for each in shown)
    return WeightPictures(before=before, smoothed=after, error=error, codes=codes)


def pictures_of(
    reference: Sequence[Tensor], quantized: Sequence[Tensor], decoder: Decoder | None
) -> tuple[PictureKind, Samples] | None:
    """Return final latents of the same noise as pictures; None where one is not finite.

    Latents without a decoder are shown as they are: three channels as colours, between the float
    model's least and largest values. Of what is no image, all channels are rows of one picture.

    Args:
        reference: of the float model, (images, C, H, W) or (images, C, frames) float32 by seed.
        quantized: the same of the file.
        decoder: of the model's VAE, if there is one.
    """
    pairs = list(zip(reference, quantized, strict=False))
    finals = [torch.cat([pair[side] for pair in pairs]) for side in (0, 1)]
    if not all(bool(latents.isfinite().all()) for latents in finals):
        return None
    is_image = finals[0].ndim == 4
    if not is_image:  # what each channel does, a row of grey each
        finals = [latents.flatten(1, -2)[:, None] for latents in finals]
    channels, side = finals[0].shape[1], max(finals[0].shape[-2:])
    scale = 1 if decoder is None else decoder.scale
    finals = [latents[: _count(side * scale)] for latents in finals]
    if decoder is not None:
        return "decoded", _samples(_shrunk(decoder(latents)) for latents in finals)
    if is_image and channels in PICTURE_CHANNELS:
        return "pixels", _samples(_shrunk(latents) for latents in finals)
    shown = [latents[:, :3] if channels >= 3 else latents[:, :1] for latents in finals]
    low, high = shown[0].amin(), shown[0].amax()
    spread = (high - low).clamp(min=1e-6)
    return "latents", _samples(_shrunk((each - low) / spread * 2 - 1) for each in shown)


def _count(side: int) -> int:
    """Return how many samples of a size are kept."""
    kept = min(side, LARGEST_SIDE)
    return max(1, min(MOST_SAMPLES, MOST_SAMPLE_BYTES // (3 * kept * kept)))


def _shrunk(images: Tensor) -> Tensor:
    """Return images whose sides are `LARGEST_SIDE` pixels at most."""
    size = [min(side, LARGEST_SIDE) for side in images.shape[-2:]]
    if list(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images.float(), size=size, mode="area")


def _samples(images: Iterable[Tensor]) -> Samples:
    """Return float and quantized images, -1 black and 1 white, as bytes."""
    reference, quantized = (torch.from_numpy(to_pixels(each)) for each in images)
    return Samples(reference=reference, quantized=quantized)
