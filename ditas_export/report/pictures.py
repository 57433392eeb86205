"""Sample grids of a report: float, quantized, and their difference, as pictures in the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO

from PIL import Image
from torch import Tensor

from ditas_export.generation.pixels import Pixels, grid
from ditas_export.report.markup import Html, tag
from ditas_export.report.stats import PictureKind, Samples

SMALL_SIDE = 64
"""Pixels of a sample up to which grids are lossless and every pixel is seen."""

GAINS = (16, 8, 4, 2, 1)
"""What differences are multiplied by: the largest that clips none."""

JPEG_QUALITY = 90

WHAT: dict[PictureKind, str] = {
    "pixels": "The model makes pixels.",
    "decoded": "Latents decoded by the VAE that was exported beside the model.",
    "latents": "No VAE was exported: latents as they are, three channels as red, green and blue.",
}
"""What samples are, in words."""


def sample_grids(samples: Samples, kind: PictureKind, labels: Sequence[int]) -> Html:
    """Return three figures of the same noise."""
    gain = _gain(samples)
    difference = ((samples.quantized.int() - samples.reference.int()).abs() * gain).byte()
    noise = f"{len(labels)} samples, labels {', '.join(map(str, labels))}"
    is_small = max(samples.reference.shape[1:3]) <= SMALL_SIDE

    def figure(images: Tensor, name: str, says: str) -> Html:
        pictures: Sequence[Pixels] = list(images.numpy())
        picture = tag(
            "img",
            src=_data_uri(grid(pictures, columns=min(4, len(pictures))), lossless=is_small),
            alt=f"{name}: {noise}, from the same noise as the other two grids",
            class_="pixelated" if is_small else None,
        )
        return tag("figure", picture, tag("figcaption", tag("strong", name), f" {says}"))

    return tag(
        "div",
        figure(samples.reference, "Float", "the model as it was trained"),
        figure(samples.quantized, "Quantized", "the exported file"),
        figure(difference, f"Difference × {gain}", "magnitudes; black is equal"),
        class_="grids",
    )


def _gain(samples: Samples) -> int:
    """Return what the difference can be multiplied by."""
    largest = int((samples.quantized.int() - samples.reference.int()).abs().amax())
    return next(gain for gain in GAINS if gain * largest <= 255 or gain == 1)


def _data_uri(pixels: Pixels, *, lossless: bool) -> str:
    """Return a picture as an address that holds it."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    raw = BytesIO()
    if lossless:
        image.save(raw, format="PNG", optimize=True)
    else:
        image.save(raw, format="JPEG", quality=JPEG_QUALITY)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(raw.getvalue()).decode()}"
