"""Outlier channels planted into a trained model without changing its function.

Large transformers have a few channels whose activations dwarf the rest; a small one trained on
small images has none, and quantizes too easily. For a gain k in one channel of the input of a group
of linears, their weight column is divided by k, and what folding would divide by s is multiplied by
k, so that the input grows k-fold:

- `x(1 + scale) + shift`: the channel's shift row is multiplied by k (weight and bias), its scale
  row too, and the scale's bias is `k(b + 1) − 1`.
- a table of the block's own beside a vector that all blocks share: the same of the table's rows;
  the vector's linear is multiplied once, so that the gains are those of all blocks.
- an affine norm: weight and bias are multiplied by k.
- rows of a linear in whose output the input is linear: the channel's row (weight and bias).
- what takes no smoothing, as behind GELU, takes no gain.

Equal in real arithmetic; in the parameters' float type, equal to rounding.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ditas_export.errors import CalibrationError
from ditas_export.families.base import (
    FamilyModel,
    Fold,
    Modulation,
    Multiply,
    Norm,
    Rows,
    Table,
)
from ditas_export.families.registry import family_of


def plant_outliers(
    model: FamilyModel,
    *,
    channels: int = 4,
    gain: tuple[float, float] = (20.0, 60.0),
    seed: int = 0,
) -> FamilyModel:
    """Return a copy of the model with outliers in the input of every linear that can have them.

    Args:
        model: float32 or float64; left untouched.
        channels: input channels to enlarge per group, chosen at random.
        gain: smallest and largest gain, both > 0; drawn evenly in the logarithm.
        seed: of the choice of channels and gains.

    Raises:
        CalibrationError: more channels than an input has, or a gain that is not positive.
    """
    low, high = gain
    if not 0 < low <= high < math.inf:
        raise CalibrationError(f"gain={gain} is no range of positive numbers, smallest first")
    planted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        """Return a gain per channel, 1 in all but `channels` of them, (K,)."""
        if not 0 <= channels <= width:
            raise CalibrationError(f"cannot plant {channels} outliers in {width} channels")
        gains = torch.ones(width, dtype=torch.float64)
        chosen = torch.randperm(width, generator=generator)[:channels]
        spread = torch.rand(channels, generator=generator, dtype=torch.float64)
        gains[chosen] = low * (high / low) ** spread
        return gains

    shared: dict[tuple[str, int, int], Tensor] = {}  # gains of a vector's rows
    with torch.no_grad():
        for block in family_of(model.config).blocks(model.config):
            module = planted.get_submodule(block.path)
            for group in block.groups():
                if all(isinstance(fold, Multiply) for fold in group.folds):
                    continue
                readers = [_linear(module, path) for path in group.linears]
                tables = [fold for fold in group.folds if isinstance(fold, Table)]
                known = [shared.get((fold.vector, fold.scale, fold.shift)) for fold in tables]
                gains = next((each for each in known if each is not None), None)
                if gains is None:
                    gains = draw(readers[0].in_features)
                for fold in group.folds:
                    if isinstance(fold, Multiply):
                        gains[fold.channels] = 1
                for linear in readers:
                    linear.weight /= gains.to(linear.weight)
                for fold in group.folds:
                    _multiply(module, fold, gains[fold.channels])
                for fold in tables:
                    rows = fold.vector, fold.scale, fold.shift
                    if rows not in shared:
                        shared[rows] = gains
                        _multiply_vector(_linear(planted, fold.vector), fold, gains)
    return planted


def _multiply(block: nn.Module, fold: Fold, gains: Tensor) -> None:
    """Multiply what makes some channels of an input, in place; (K,) gains."""
    match fold:
        case Rows():
            _multiply_rows(_linear(block, fold.linear), fold.rows, gains)
        case Modulation():
            adaln = _linear(block, fold.linear)
            _multiply_rows(adaln, fold.shift, gains)
            _multiply_rows(adaln, fold.scale, gains)
            adaln.bias[fold.scale] += (gains - 1).to(adaln.bias)  # k b + (k - 1) = k (b + 1) - 1
        case Table():
            table = block.get_parameter(fold.table)
            table[fold.shift] *= gains.to(table)
            table[fold.scale] = (gains * (table[fold.scale] + 1) - 1).to(table)
        case Norm():
            for parameter in block.get_submodule(fold.norm).parameters():
                parameter.mul_(gains.to(parameter))
        case Multiply():
            pass  # its gains are 1


def _multiply_vector(linear: nn.Linear, fold: Table, gains: Tensor) -> None:
    """Multiply the rows of a shared vector's linear that go to a table's rows, in place."""
    for row in (fold.scale, fold.shift):
        _multiply_rows(linear, slice(row * len(gains), (row + 1) * len(gains)), gains)


def _linear(block: nn.Module, path: str) -> nn.Linear:
    """Return a linear of a module."""
    linear = block.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _multiply_rows(linear: nn.Linear, rows: slice, gains: Tensor) -> None:
    """Multiply some outputs of a linear, weight and bias, in place."""
    linear.weight[rows] *= gains[:, None].to(linear.weight)
    linear.bias[rows] *= gains.to(linear.bias)
