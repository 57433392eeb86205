"""Diffusion Transformers in 4-bit weights and 8-bit activations, from checkpoint to images."""

__version__ = "0.1.0"
