"""The runtimes that a model can be opened in. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

Runtime = Literal["auto", "onnxruntime", "openvino", "torch", "tensorrt", "nv-tensorrt-rtx"]
"""Backends to choose from; `auto` leaves the choice to `open_runner`."""
