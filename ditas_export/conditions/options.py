"""What a text encoder may be asked, and what PixArts have in common. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

EncoderPrecision = Literal["fp32", "bf16"]
"""What a text encoder computes in."""

PIXELS_PER_LATENT = 8
"""Of the VAE of every PixArt."""

MICRO_CONDITIONED = 128
"""Side of the latents at which diffusers takes a PixArt that does not say it for one that is asked
for a size too: α at 1024 pixels."""
