"""Outlier channels planted into a trained DiT without changing its function.

Large DiTs have a few channels whose activations dwarf the rest; a small one trained on small images
has none, and quantizes too easily. For a gain k in one channel of a linear's input, with the
matching weight column divided by k:

- qkv, fc1: `x(1 + scale) + shift` grows k-fold when the channel's shift row is multiplied by k
  (weight and bias), its scale row too, and the scale's bias is `k(b + 1) − 1`.
- proj: softmax(q kᵀ) v grows k-fold with the channel's V row of qkv (weight and bias).
- fc2: impossible, GELU is not homogeneous.

Equal in real arithmetic; in the parameters' float type, equal to rounding.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ditas_export.dit.model import DiT, DiTBlock
from ditas_export.dit.sites import adaln_rows, value_rows
from ditas_export.errors import CalibrationError


def plant_outliers(
    model: DiT, *, channels: int = 4, gain: tuple[float, float] = (20.0, 60.0), seed: int = 0
) -> DiT:
    """Return a copy of the model with outliers in the input of every qkv, proj and fc1.

    Args:
        model: float32 or float64; left untouched.
        channels: input channels to enlarge per linear, chosen at random.
        gain: smallest and largest gain, both > 0; drawn evenly in the logarithm.
        seed: of the choice of channels and gains.

    Raises:
        CalibrationError: more channels than the model is wide, or a gain that is not positive.
    """
    width = model.config.hidden_size
    if not 0 <= channels <= width:
        raise CalibrationError(f"cannot plant {channels} outliers in {width} channels")
    low, high = gain
    if not 0 < low <= high < math.inf:
        raise CalibrationError(f"gain={gain} is no range of positive numbers, smallest first")
    planted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        """Return a gain per channel, 1 in all but `channels` of them, (D,)."""
        gains = torch.ones(width, dtype=torch.float64)
        chosen = torch.randperm(width, generator=generator)[:channels]
        spread = torch.rand(channels, generator=generator, dtype=torch.float64)
        gains[chosen] = low * (high / low) ** spread
        return gains

    with torch.no_grad():
        for block in planted.blocks:
            assert isinstance(block, DiTBlock)
            _enlarge_modulated(block, "msa", block.attn.qkv, draw())
            _enlarge_values(block, draw())
            _enlarge_modulated(block, "mlp", block.mlp.fc1, draw())
    return planted


def _enlarge_modulated(block: DiTBlock, chunk: str, linear: nn.Linear, gains: Tensor) -> None:
    """Multiply one modulated input by `gains` (D,), and divide the columns of its linear."""
    adaln = block.adaLN_modulation[1]
    assert isinstance(adaln, nn.Linear)
    shift = adaln_rows(f"shift_{chunk}", len(gains))
    scale = adaln_rows(f"scale_{chunk}", len(gains))
    _multiply_rows(adaln, shift, gains)
    _multiply_rows(adaln, scale, gains)
    adaln.bias[scale] += (gains - 1).to(adaln.bias)  # k b + (k - 1) = k (b + 1) - 1
    _divide_columns(linear, gains)


def _enlarge_values(block: DiTBlock, gains: Tensor) -> None:
    """Multiply V by `gains` (D,), and divide the columns of proj."""
    _multiply_rows(block.attn.qkv, value_rows(len(gains)), gains)
    _divide_columns(block.attn.proj, gains)


def _multiply_rows(linear: nn.Linear, rows: slice, gains: Tensor) -> None:
    """Multiply some outputs of a linear, weight and bias, in place."""
    linear.weight[rows] *= gains[:, None].to(linear.weight)
    linear.bias[rows] *= gains.to(linear.bias)


def _divide_columns(linear: nn.Linear, gains: Tensor) -> None:
    """Divide a linear's input columns, in place."""
    linear.weight /= gains.to(linear.weight)
