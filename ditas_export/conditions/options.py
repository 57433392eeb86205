"""What a text encoder may be asked. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

EncoderPrecision = Literal["fp32", "bf16"]
"""What a text encoder computes in."""
