"""Diffusion Transformers in 4-bit weights and 8-bit activations, from checkpoint to images."""

from ditas_export.telemetry import turn_off_onnxruntime_telemetry

__version__ = "0.1.0"

turn_off_onnxruntime_telemetry()  # before anything imports it
