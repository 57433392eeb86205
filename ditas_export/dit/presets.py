"""The published sizes of DiT.

Source: Peebles and Xie 2023, table 1; patch sizes 2, 4 and 8; latents of 256- and 512-pixel images
are 8 times smaller (32 and 64).
"""

from __future__ import annotations

from dataclasses import dataclass

from ditas_export.dit.model import DiTConfig
from ditas_export.errors import CheckpointError

PATCH_SIZES = (2, 4, 8)
LATENT_DOWNSCALE = 8
"""Image pixels per latent pixel, each way, of the autoencoder of the published models."""


@dataclass(frozen=True, slots=True)
class Size:
    """One row of the table: what a preset's letter stands for."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES = {
    "S": Size(depth=12, hidden_size=384, num_heads=6),
    "B": Size(depth=12, hidden_size=768, num_heads=12),
    "L": Size(depth=24, hidden_size=1024, num_heads=16),
    "XL": Size(depth=28, hidden_size=1152, num_heads=16),
}

PRESET_NAMES = tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)
"""DiT-S/2 to DiT-XL/8."""


def preset_config(name: str, *, image_size: int = 256, num_classes: int = 1000) -> DiTConfig:
    """Return the configuration of a published model.

    Args:
        name: one of `PRESET_NAMES`, such as "DiT-XL/2".
        image_size: pixels of the image's side; the latent's is an eighth.
        num_classes: classes, the null class not counted.

    Raises:
        CheckpointError: an unknown name, or an image size that is no multiple of 8 times the patch.
    """
    if name not in PRESET_NAMES:
        raise CheckpointError(f"unknown preset {name!r}; choose one of {', '.join(PRESET_NAMES)}")
    letter, patch = name.removeprefix("DiT-").split("/")
    if image_size % (LATENT_DOWNSCALE * int(patch)):
        raise CheckpointError(
            f"image_size={image_size} is no multiple of {LATENT_DOWNSCALE * int(patch)} pixels, "
            f"a patch of {name}"
        )
    size = SIZES[letter]
    return DiTConfig(
        input_size=image_size // LATENT_DOWNSCALE,
        patch_size=int(patch),
        hidden_size=size.hidden_size,
        depth=size.depth,
        num_heads=size.num_heads,
        num_classes=num_classes,
    )


def preset_num_heads(*, depth: int, hidden_size: int) -> int | None:
    """Return the heads of the published size with this depth and width; None if there is none."""
    for size in SIZES.values():
        if (size.depth, size.hidden_size) == (depth, hidden_size):
            return size.num_heads
    return None
